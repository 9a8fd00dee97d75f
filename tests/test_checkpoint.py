"""Checkpoints: saved whole or not at all, whatever interrupts it, and resumed from."""

import io
import os
import random
import re
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kdmini import checkpoint
from kdmini.checkpoint import KEEP, existing, load, newest, numbered, restore, save, save_atomic
from kdmini.contracts import UserError

OLD = {"weights": torch.arange(6.0), "epoch": 3}
NEW = {"weights": torch.arange(6.0) + 1, "epoch": 4}
CONFIG = {"run": "runs/a", "data": {"imgsz": 64, "limit": None}}
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def refused(function: Callable[[], object], *words: str) -> None:
    with pytest.raises(UserError) as caught:
        function()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def same(content: dict[str, Any], expected: dict[str, Any]) -> bool:
    equal = torch.equal(content["weights"], expected["weights"])
    return equal and content["epoch"] == expected["epoch"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file with OLD in it, alone in its folder."""
    path = tmp_path / "best.pt"
    save_atomic(OLD, path)
    return path


def test_saved_and_loaded(path):
    assert same(load(path), OLD)
    save_atomic(NEW, path)
    assert same(load(path), NEW)
    assert os.listdir(path.parent) == ["best.pt"]
    assert same(torch.load(path, weights_only=True), NEW)  # readable without kdmini


# --- interrupted

POINTS = ["before", "torch.save", "os.fsync", "os.replace", "verify"]


def strike(monkeypatch: pytest.MonkeyPatch, point: str, blow: Callable[[], None]) -> None:
    """Lets `blow()` happen at that point of the next save.

    torch.save has written half of the file by then; os.open is that of the folder, when
    the new file has its name already.
    """
    write = torch.save

    def half(content: Any, file: Any) -> None:
        whole = io.BytesIO()
        write(content, whole)
        file.write(whole.getvalue()[: whole.tell() // 2])
        file.flush()
        blow()

    if point == "before":
        monkeypatch.setattr(torch, "save", lambda content, file: blow())
    elif point == "torch.save":
        monkeypatch.setattr(torch, "save", half)
    elif point == "verify":
        monkeypatch.setattr(checkpoint, "verify", lambda path: blow())
    else:
        monkeypatch.setattr(os, point.removeprefix("os."), lambda *args: blow())


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
    def blow() -> None:
        raise error

    with monkeypatch.context() as patched:
        strike(patched, point, blow)
        with pytest.raises(seen_as) as caught:
            save_atomic(NEW, path)
    if isinstance(error, OSError | RuntimeError):
        message = str(caught.value)
        assert str(path) in message
        assert "MB" in message
        assert "\n" not in message
    assert same(load(path), OLD)
    assert os.listdir(path.parent) == ["best.pt"]

    save_atomic(NEW, path)
    assert same(load(path), NEW)


def in_a_child(work: Callable[[], object]) -> int:
    """-> its process id. The child ends with code 1 unless the work ends it before."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(1)
    return child


def exit_code(child: int) -> int:
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


@needs_fork
@pytest.mark.parametrize("point", POINTS)
def test_a_process_that_ends_at_any_point_leaves_the_old_file(path, monkeypatch, point):
    def work() -> None:
        strike(monkeypatch, point, lambda: os._exit(7))
        save_atomic(NEW, path)

    assert exit_code(in_a_child(work)) == 7
    assert same(load(path), OLD)
    save_atomic(NEW, path)  # over whatever it left
    assert same(load(path), NEW)
    assert os.listdir(path.parent) == ["best.pt"]


class Tensors:
    """A part of a run made of tensors."""

    def __init__(self, count: int, fill: float = 0.5):
        self.value = torch.full((count,), fill)

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


PAUSE_S = 0.001
PATIENCE_S = 30


@needs_fork
def test_a_process_killed_while_it_saves_again_and_again_leaves_whole_files(tmp_path):
    rng = random.Random(0)
    folder = tmp_path / "ckpt"
    part = Tensors(20_000)
    save(folder, 0, {"part": part}, CONFIG)
    for attempt in range(1, 13):
        first = 10_000 * attempt  # no attempt comes as far as the next

        def work(first: int = first) -> None:
            for step in range(first, first + 10_000):
                save(folder, step, {"part": part}, CONFIG)

        child = in_a_child(work)
        end = time.monotonic() + PATIENCE_S
        # beyond the first, so that what the attempt before had no time to delete is deleted
        while existing(folder)[-1] <= numbered(folder, first) and time.monotonic() < end:
            time.sleep(PAUSE_S)
        time.sleep(rng.uniform(0, 0.03))
        os.kill(child, signal.SIGKILL)
        assert exit_code(child) == -signal.SIGKILL

        files = existing(folder)
        assert KEEP <= len(files) <= KEEP + 1
        assert files[-1] >= numbered(folder, first)
        for file in files:
            assert torch.equal(load(file)["part"]["value"], part.value)


def test_the_data_are_on_the_disk_before_the_name_and_the_name_after(path, monkeypatch):
    calls = []
    fsync = os.fsync
    replace = os.replace

    def watched_fsync(descriptor: int) -> None:
        calls.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def watched_replace(source: Path, target: Path) -> None:
        calls.append("replace")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    save_atomic(NEW, path)
    assert calls == [f"{path}.tmp", "replace", str(path.parent)]


def test_a_disk_without_room_is_reported_with_what_is_free(path, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=rf"{re.escape(str(path))}.*No space left.*\d+ MB"):
        save_atomic(NEW, path)


def test_a_folder_that_is_gone_is_reported_in_one_line(tmp_path):
    refused(lambda: save_atomic(NEW, tmp_path / "gone" / "best.pt"), "gone")


# --- a run


@dataclass
class Progress:
    """A part of a run made of numbers."""

    epoch: int = 0
    best: float = -1.0
    best_epoch: int = 0

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


def test_the_folder_is_made_where_it_is_missing(tmp_path):
    folder = tmp_path / "moved" / "ckpt"
    save(folder, 1, {"progress": Progress()}, CONFIG)  # nothing is lost where it can be saved
    assert existing(folder)


def resume(folder: Path, parts: dict[str, Any]) -> Path:
    path, content = newest(folder)
    restore(content, parts, path)
    assert content["config"] == CONFIG
    return path


def parts_of(seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1 * seed, momentum=0.9)
    return {"model": model, "optimizer": optimizer, "progress": Progress()}


def train_step(parts: dict[str, Any]) -> None:
    """Draws its images from torch's generator."""
    parts["optimizer"].zero_grad()
    parts["model"](torch.randn(5, 3)).square().mean().backward()
    parts["optimizer"].step()
    parts["progress"].epoch += 1


def test_a_resumed_run_goes_on_exactly(tmp_path):
    folder = tmp_path / "ckpt"
    parts = parts_of(1)
    for _ in range(3):
        train_step(parts)
    parts["progress"].best = 0.25
    parts["progress"].best_epoch = 2
    save(folder, 3, parts, CONFIG)
    for _ in range(3):
        train_step(parts)

    other = parts_of(2)
    torch.manual_seed(99)
    assert resume(folder, other) == numbered(folder, 3)
    assert other["progress"] == Progress(3, 0.25, 2)
    for _ in range(3):
        train_step(other)
    for name, value in parts["model"].state_dict().items():
        assert torch.equal(value, other["model"].state_dict()[name]), name
    assert other["optimizer"].param_groups[0]["lr"] == 0.1


def names(folder: Path) -> list[str]:
    return [path.name for path in existing(folder)]


def test_only_the_newest_are_kept(tmp_path):
    for step in (5, 900, 10, 1000, 99_999_999):
        save(tmp_path, step, {"progress": Progress(step)}, CONFIG)
        assert len(existing(tmp_path)) <= KEEP == 2
    assert names(tmp_path) == ["step_00001000.pt", "step_99999999.pt"]


def test_files_of_others_are_left_alone(tmp_path):
    others = ["step_00000001.pt.tmp", "step_1.pt", "other.pt"]
    for name in others:
        (tmp_path / name).write_text("")
    for step in (1000, 99_999_999, 99_999_998):
        save(tmp_path, step, {"progress": Progress()}, CONFIG)
    kept = ["step_99999998.pt", "step_99999999.pt"]
    assert names(tmp_path) == kept
    assert sorted(os.listdir(tmp_path)) == sorted([*others, *kept])


def save_twice(folder: Path) -> list[Path]:
    for step in (10, 20):
        save(folder, step, {"progress": Progress(step)}, CONFIG)
    return existing(folder)


def test_a_missing_part_is_named(tmp_path):
    save_twice(tmp_path)
    progress = Progress(7)
    parts = {"progress": progress, "align": Tensors(3)}
    refused(lambda: resume(tmp_path, parts), "align")
    assert progress == Progress(7)  # nothing was restored


def test_missing_random_numbers_are_named(tmp_path):
    _, last = save_twice(tmp_path)
    content = load(last)
    del content["rng"]
    save_atomic(content, last)
    refused(lambda: resume(tmp_path, {"progress": Progress()}), "rng")


@pytest.mark.parametrize("state", ["no folder", "empty", "temporary", "all damaged"])
def test_nothing_to_resume_from_is_an_error(tmp_path, state):
    folder = tmp_path / "ckpt"
    if state != "no folder":
        folder.mkdir()
    if state == "temporary":
        (folder / "step_00000010.pt.tmp").write_bytes(b"half")
    if state == "all damaged":
        for path in save_twice(folder):
            path.write_bytes(path.read_bytes()[:-50])
    refused(lambda: resume(folder, {"progress": Progress()}), str(folder), "no checkpoint")


# --- crafted: of the right form, with checksums that are right


def spoil_rng(content: dict[str, Any]) -> None:
    content["rng"].fill_(255)


def name_other_parameters(content: dict[str, Any]) -> None:
    content["optimizer"]["param_groups"][0]["params"] = [0, 0, 1, 2]


def number_parameters_anew(content: dict[str, Any]) -> None:
    content["optimizer"]["param_groups"][0]["params"] = [3, 2, 1, 0]


def ascend(content: dict[str, Any]) -> None:
    content["optimizer"]["param_groups"][0]["maximize"] = True


def rate_beyond_float32(content: dict[str, Any]) -> None:
    content["optimizer"]["param_groups"][0]["lr"] = 1e308


def count_beyond_floats(content: dict[str, Any]) -> None:
    content["progress"]["best_epoch"] = 10**400


@pytest.mark.parametrize(
    ("craft", "word"),
    [
        (spoil_rng, "is of no run"),
        (name_other_parameters, "param_groups.0.params"),
        (number_parameters_anew, "param_groups.0.params"),
        (rate_beyond_float32, "param_groups.0.lr is 1e+308"),
        (count_beyond_floats, "progress.best_epoch is 1000"),
        (ascend, "param_groups.0.maximize is True"),
    ],
)
def test_a_crafted_checkpoint_is_refused_in_one_line(tmp_path, craft, word):
    save(tmp_path, 1, parts_of(1), CONFIG)
    path = numbered(tmp_path, 1)
    content = load(path)
    craft(content)
    save_atomic(content, path)
    refused(lambda: resume(tmp_path, parts_of(1)), str(path), word)


def test_the_random_states_of_more_cards_than_there_are_are_cut(tmp_path, monkeypatch):
    save(tmp_path, 1, {"progress": Progress()}, CONFIG)
    content = load(numbered(tmp_path, 1))
    states = [torch.full((16,), number, dtype=torch.uint8) for number in range(4)]
    content["cuda_rng"] = states
    given = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", given.extend)
    restore(content, {"progress": Progress()}, numbered(tmp_path, 1))
    assert [state[0].item() for state in given] == [0, 1]


def test_a_folder_with_the_name_of_a_checkpoint_hinders_no_save(tmp_path):
    numbered(tmp_path, 1).mkdir()
    for step in range(2, 6):
        save(tmp_path, step, {"progress": Progress()}, CONFIG)
    assert [path.name for path in existing(tmp_path) if path.is_file()] == [
        "step_00000004.pt",
        "step_00000005.pt",
    ]
