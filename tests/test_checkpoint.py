"""Checkpoints: interrupted, damaged, hostile, and resumed."""

import io
import os
import pathlib
import random
import re
import signal
import time
import zipfile
from dataclasses import asdict, dataclass

import pytest
import torch
from torch import nn

from kdmini import checkpoint
from kdmini.checkpoint import (
    KEEP,
    existing,
    load,
    newest,
    numbered,
    restore,
    save,
    save_atomic,
    verify,
)
from kdmini.contracts import UserError

OLD, NEW = (
    {"weights": torch.arange(6.0), "epoch": 3},
    {"weights": torch.arange(6.0) + 1, "epoch": 4},
)
CONFIG = {"run": "runs/a", "data": {"imgsz": 64, "limit": None}}
fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def refused(function, *words):
    with pytest.raises(UserError) as caught:
        function()
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


def same(content, expected):
    return content["epoch"] == expected["epoch"] and torch.equal(
        content["weights"], expected["weights"]
    )


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "best.pt"
    save_atomic(OLD, path)
    return path


def test_saved_and_loaded(path):
    assert same(load(path), OLD)
    save_atomic(NEW, path)
    assert same(load(path), NEW)
    assert os.listdir(path.parent) == ["best.pt"]
    assert same(torch.load(path, weights_only=True), NEW)  # readable without kdmini


# --- interrupted ---

POINTS = ["before", "torch.save", "os.fsync", "os.replace", "verify"]


def strike(monkeypatch, point, blow):
    """Lets `blow()` happen at that point; torch.save has written half of the file by then.

    os.open is that of the folder, when the new file has its name already.
    """

    def half(content, file):
        whole = io.BytesIO()
        saving(content, whole)
        file.write(whole.getvalue()[: whole.tell() // 2])
        file.flush()
        blow()

    saving = torch.save
    if point == "before":
        monkeypatch.setattr(torch, "save", lambda content, file: blow())
    elif point == "torch.save":
        monkeypatch.setattr(torch, "save", half)
    elif point == "verify":
        monkeypatch.setattr(checkpoint, "verify", lambda path: blow())
    else:
        monkeypatch.setattr(os, point.split(".")[1], lambda *args: blow())


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize(
    ("error", "seen_as"),
    [
        (OSError(28, "No space left on device"), UserError),
        (RuntimeError("PytorchStreamWriter failed writing file"), UserError),
        (UserError("it is damaged"), UserError),
        (TypeError("cannot pickle"), TypeError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_an_error_at_any_point_leaves_the_old_file_and_nothing_else(
    path, monkeypatch, point, error, seen_as
):
    def blow():
        raise error

    with monkeypatch.context() as patched:
        strike(patched, point, blow)
        with pytest.raises(seen_as) as caught:
            save_atomic(NEW, path)
    if isinstance(error, OSError | RuntimeError):
        assert (
            str(path) in str(caught.value)
            and "MB" in str(caught.value)
            and "\n" not in str(caught.value)
        )
    assert same(load(path), OLD)
    assert os.listdir(path.parent) == ["best.pt"]
    save_atomic(NEW, path)
    assert same(load(path), NEW)


@fork
@pytest.mark.parametrize("point", POINTS)
def test_a_process_that_ends_at_any_point_leaves_the_old_file(path, monkeypatch, point):
    child = os.fork()
    if child == 0:
        try:
            strike(monkeypatch, point, lambda: os._exit(7))
            save_atomic(NEW, path)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert same(load(path), OLD)
    save_atomic(NEW, path)  # over whatever it left
    assert same(load(path), NEW)
    assert os.listdir(path.parent) == ["best.pt"]


@fork
def test_a_process_killed_while_it_saves_again_and_again_leaves_whole_files(tmp_path):
    rng = random.Random(0)
    folder = tmp_path / "ckpt"
    part = Tensors(20_000)
    save(folder, 0, {"part": part}, CONFIG)
    for round_ in range(1, 13):
        child = os.fork()
        if child == 0:
            try:
                for step in range(10_000):
                    save(folder, 10_000 * round_ + step, {"part": part}, CONFIG)
            finally:
                os._exit(1)
        until = time.monotonic() + 30
        while (
            not numbered(folder, 10_000 * round_) <= existing(folder)[-1]
            and time.monotonic() < until
        ):
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.03))
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        files = existing(folder)
        assert KEEP <= len(files) <= KEEP + 1 and files[-1] >= numbered(folder, 10_000 * round_)
        for path in files:
            assert torch.equal(load(path)["part"]["value"], part.value)


@dataclass
class Progress:
    """A part of a run made of numbers."""

    epoch: int = 0
    best: float = -1.0
    best_epoch: int = 0

    def state_dict(self):
        return asdict(self)

    def load_state_dict(self, state):
        self.__init__(**state)


class Tensors:
    """A part of a run made of tensors."""

    def __init__(self, count, fill=0.5):
        self.value = torch.full((count,), fill)

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]


def test_the_data_are_on_the_disk_before_the_name_and_the_name_after(path, monkeypatch):
    seen = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda fd: (seen.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd))
    )
    monkeypatch.setattr(os, "replace", lambda a, b: (seen.append("replace"), replace(a, b)))
    save_atomic(NEW, path)
    assert seen == [f"{path}.tmp", "replace", str(path.parent)]


# --- damaged ---


@pytest.mark.parametrize("masks", [[0xFF], [1, 2, 4, 8, 16, 32, 64, 128]], ids=["byte", "bit"])
def test_every_flipped_byte_is_detected_or_without_effect(path, masks):
    whole = path.read_bytes()
    detected = 0
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= masks[place % len(masks)]
        path.write_bytes(damaged)
        try:
            content = load(path)
        except UserError as error:
            assert "\n" not in str(error) and str(path) in str(error)
            detected += 1
        else:
            assert same(content, OLD), place  # padding, dates and the like
    assert detected > len(whole) / 3


def test_a_tensor_marked_as_a_folder_is_detected(path):
    # found by the test above: zipfile passes it, and torch then hands out memory as it finds it
    with zipfile.ZipFile(path) as archive:
        files = [(info, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(path, "w") as archive:
        for info, content in files:
            info.external_attr |= 0x10 if info.filename.endswith("/data/0") else 0
            archive.writestr(info, content)
    assert zipfile.ZipFile(path).testzip() is None
    refused(lambda: load(path), str(path), "archive/data/0")


def test_a_flipped_byte_among_the_weights_is_detected_by_verify(tmp_path):
    path = tmp_path / "a.pt"
    save_atomic({"weights": torch.full((1000,), 1.5)}, path)
    verify(path)
    whole = bytearray(path.read_bytes())
    at = whole.index(torch.full((4,), 1.5).numpy().tobytes()) + 2001
    whole[at] ^= 16
    path.write_bytes(whole)
    assert not torch.equal(
        torch.load(path, weights_only=True)["weights"], torch.full((1000,), 1.5)
    )  # torch is silent
    refused(lambda: verify(path), str(path), "damaged")


@pytest.mark.parametrize("length", [0, 1, 100, -1, -30])
def test_a_file_cut_short_is_refused(path, length):
    whole = path.read_bytes()
    path.write_bytes(whole[:length])
    refused(lambda: load(path), str(path))


def test_what_is_no_checkpoint_is_refused(tmp_path):
    refused(lambda: load(tmp_path / "absent.pt"), "absent.pt")
    refused(lambda: load(tmp_path), str(tmp_path))
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    refused(lambda: load(tmp_path / "tensor.pt"), "tensor.pt")
    with zipfile.ZipFile(tmp_path / "other.pt", "w") as archive:
        archive.writestr("hello.txt", "hello")
    refused(lambda: load(tmp_path / "other.pt"), "other.pt")


# --- hostile ---


class Hostile:
    """Unpickling it makes a file."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return pathlib.Path.touch, (self.canary,)


def test_a_hostile_pickle_is_refused_and_not_run(tmp_path):
    canary, path = tmp_path / "CANARY", tmp_path / "hostile.pt"
    torch.save({"model": Hostile(canary)}, path)
    verify(path)
    refused(lambda: load(path), str(path), "not a kdmini checkpoint")
    assert not canary.exists()
    torch.load(path, weights_only=False)
    assert canary.exists()  # it would have worked


@pytest.mark.parametrize(
    "program",
    [
        b"",
        b".",
        b"\x80\x02.",
        b"\x80\x02}",
        b"\x80\x02}0.",
        b"\x80\x02K\x01K\x02s.",
        b"\x80\x02(K\x01u.",
        b"\x80\x02}K\x01b.",
        b"\x80\x02h\x07.",
        b"\x80\x02K\x01Q.",
        b"\x80\x02X\xff\xff\xff\xff.",
        b"\x80\x02X\x01\x00\x00\x00\xff.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.",
        b"\x80\x02cposix\nsystem\nX\x04\x00\x00\x00true\x85R.",
        b"garbage\xfe\xfd",
    ],
)
def test_a_pickle_of_nonsense_is_refused_in_one_line(path, program):
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in files.items():
            archive.writestr(name, program if name.endswith("/data.pkl") else content)
    verify(path)
    refused(lambda: load(path), str(path), "not a kdmini checkpoint")


# --- a run ---


def resume(folder, parts):
    path, content = newest(folder)
    restore(content, parts, path)
    assert content["config"] == CONFIG
    return path


def parts_of(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1 * seed, momentum=0.9)
    return {"model": model, "optimizer": optimizer, "progress": Progress()}


def train_step(parts):
    parts["optimizer"].zero_grad()
    parts["model"](torch.randn(5, 3)).square().mean().backward()
    parts["optimizer"].step()
    parts["progress"].epoch += 1


def test_a_resumed_run_goes_on_exactly(tmp_path):
    parts = parts_of(1)
    for _ in range(3):
        train_step(parts)
    parts["progress"].best, parts["progress"].best_epoch = 0.25, 2
    save(tmp_path / "ckpt", 3, parts, CONFIG)
    for _ in range(3):
        train_step(parts)  # draws its images from torch's generator

    other = parts_of(2)
    torch.manual_seed(99)
    assert resume(tmp_path / "ckpt", other) == numbered(tmp_path / "ckpt", 3)
    assert other["progress"] == Progress(3, 0.25, 2)
    for _ in range(3):
        train_step(other)
    for name, value in parts["model"].state_dict().items():
        assert torch.equal(value, other["model"].state_dict()[name]), name
    assert other["optimizer"].param_groups[0]["lr"] == 0.1


def test_only_the_newest_are_kept(tmp_path):
    folder = tmp_path / "ckpt"
    for step in (5, 900, 10, 1000, 99_999_999):
        save(folder, step, {"progress": Progress(step)}, CONFIG)
        assert len(existing(folder)) <= KEEP == 2
    assert existing(folder) == [folder / "step_00001000.pt", folder / "step_99999999.pt"]
    for foreign in ("step_00000001.pt.tmp", "step_1.pt", "other.pt"):
        (folder / foreign).write_text("")
    save(folder, 99_999_998, {"progress": Progress()}, CONFIG)
    assert [path.name for path in existing(folder)] == ["step_99999998.pt", "step_99999999.pt"]
    assert len(list(folder.iterdir())) == 5


def saved_twice(folder):
    for step in (10, 20):
        save(folder, step, {"progress": Progress(step)}, CONFIG)
    return existing(folder)


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "hostile"])
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(tmp_path, capsys, damage):
    _, last = saved_twice(tmp_path / "ckpt")
    whole = bytearray(last.read_bytes())
    if damage == "hostile":
        torch.save({"progress": Hostile(tmp_path / "CANARY"), "config": CONFIG}, last)
    else:
        whole[whole.index(b"best_epoch")] ^= 1
        last.write_bytes({"flip": whole, "cut": whole[:-200], "empty": b""}[damage])
    progress = Progress()
    assert resume(tmp_path / "ckpt", {"progress": progress}).name == "step_00000010.pt"
    assert progress.epoch == 10
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and lines[0].startswith("skipped: ") and str(last) in lines[0]
    assert last.exists() and not (tmp_path / "CANARY").exists()


def test_a_missing_part_is_named(tmp_path):
    saved_twice(tmp_path / "ckpt")
    progress, align = Progress(7), Tensors(3)
    refused(lambda: resume(tmp_path / "ckpt", {"progress": progress, "align": align}), "align")
    assert progress == Progress(7)  # nothing was restored
    content = load(numbered(tmp_path / "ckpt", 20))
    save_atomic(
        {name: value for name, value in content.items() if name != "rng"},
        numbered(tmp_path / "ckpt", 20),
    )
    refused(lambda: resume(tmp_path / "ckpt", {"progress": progress}), "rng")


@pytest.mark.parametrize("state", ["no folder", "empty", "temporary", "all damaged"])
def test_nothing_to_resume_from_is_said(tmp_path, state):
    folder = tmp_path / "ckpt"
    if state != "no folder":
        folder.mkdir()
    if state == "temporary":
        (folder / "step_00000010.pt.tmp").write_bytes(b"half")
    if state == "all damaged":
        for path in saved_twice(folder):
            path.write_bytes(path.read_bytes()[:-50])
    refused(lambda: resume(folder, {"progress": Progress()}), str(folder), "no checkpoint")


def test_a_disk_without_room_is_told_with_what_is_free(path, monkeypatch):
    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=rf"{re.escape(str(path))}.*No space left.*\d+ MB"):
        save_atomic(NEW, path)


def test_a_folder_that_is_gone_is_told_in_one_line(tmp_path):
    refused(lambda: save_atomic(NEW, tmp_path / "gone" / "best.pt"), "gone")
    save(
        tmp_path / "moved" / "ckpt", 1, {"progress": Progress()}, CONFIG
    )  # nothing is lost where it can be saved
    assert existing(tmp_path / "moved" / "ckpt")
