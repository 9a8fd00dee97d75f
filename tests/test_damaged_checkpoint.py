"""Checkpoints that are damaged, hostile, or none at all: refused by name."""

import zipfile
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch

from kdmini.checkpoint import load, save_atomic, verify
from kdmini.contracts import UserError
from tests.test_checkpoint import CONFIG, OLD, Progress, refused, resume, same, save_twice

FOLDER_BIT = 0x10  # of a zip entry's attributes


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "best.pt"
    save_atomic(OLD, path)
    return path


# --- damaged


@pytest.mark.parametrize("masks", [[0xFF], [1, 2, 4, 8, 16, 32, 64, 128]], ids=["byte", "bit"])
def test_every_flipped_byte_is_detected_or_without_effect(path, masks):
    whole = path.read_bytes()
    detected = 0
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= masks[position % len(masks)]
        path.write_bytes(damaged)
        try:
            content = load(path)
        except UserError as error:
            message = str(error)
            assert "\n" not in message
            assert str(path) in message
            detected += 1
        else:
            assert same(content, OLD), position  # padding, dates and the like
    assert detected > len(whole) / 3


def test_a_tensor_marked_as_a_folder_is_detected(path):
    # found by the test above: zipfile passes it, and torch then hands out memory as it
    # finds it
    with zipfile.ZipFile(path) as archive:
        entries = [(info, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(path, "w") as archive:
        for info, content in entries:
            if info.filename.endswith("/data/0"):
                info.external_attr |= FOLDER_BIT
            archive.writestr(info, content)
    assert zipfile.ZipFile(path).testzip() is None
    refused(lambda: load(path), str(path), "archive/data/0")


def test_a_flipped_byte_among_the_weights_is_detected_by_verify(tmp_path):
    path = tmp_path / "a.pt"
    weights = torch.full((1000,), 1.5)
    save_atomic({"weights": weights}, path)
    verify(path)
    whole = bytearray(path.read_bytes())
    start = whole.index(weights[:4].numpy().tobytes())
    whole[start + 2001] ^= 16
    path.write_bytes(whole)

    loaded = torch.load(path, weights_only=True)["weights"]  # torch is silent
    assert not torch.equal(loaded, weights)
    refused(lambda: verify(path), str(path), "damaged")


@pytest.mark.parametrize("length", [0, 1, 100, -1, -30])
def test_a_file_cut_short_is_refused(path, length):
    whole = path.read_bytes()
    path.write_bytes(whole[:length])
    refused(lambda: load(path), str(path))


def spoil(path: Path, damage: str, canary: Path) -> None:
    whole = bytearray(path.read_bytes())
    if damage == "flip":
        whole[whole.index(b"best_epoch")] ^= 1
        path.write_bytes(whole)
    elif damage == "cut":
        path.write_bytes(whole[:-200])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "hostile":
        torch.save({"progress": Hostile(canary), "config": CONFIG}, path)


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "hostile"])
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(tmp_path, capsys, damage):
    folder = tmp_path / "ckpt"
    _, last = save_twice(folder)
    spoil(last, damage, tmp_path / "CANARY")
    progress = Progress()
    assert resume(folder, {"progress": progress}).name == "step_00000010.pt"
    assert progress.epoch == 10

    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("skipped: ")
    assert str(last) in line
    assert last.exists()
    assert not (tmp_path / "CANARY").exists()


def test_entries_that_are_packed_are_refused_unread(path):
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    assert torch.load(path, weights_only=True)["epoch"] == OLD["epoch"]  # torch would unpack it
    refused(lambda: load(path), str(path), "damaged")


def test_entries_within_entries_are_refused(tmp_path):
    """Each holds the next with its header, so a file of n bytes would unfold to n^2."""
    depth = 30
    inner = bytes(1000)
    infos = []
    for number in range(depth):
        info = zipfile.ZipInfo(f"archive/data/{number:02}")
        info.CRC = zlib.crc32(inner)
        info.file_size = info.compress_size = len(inner)
        inner = info.FileHeader() + inner
        infos.append(info)
    for info in infos:  # where the header of each begins: the last is the outermost
        info.header_offset = len(inner) - (info.file_size + len(info.FileHeader()))
    path = tmp_path / "a.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.fp.write(inner)
        archive.start_dir = len(inner)
        archive.filelist.extend(infos)
        archive._didModify = True
    refused(lambda: verify(path), str(path), "it states 49,575 bytes")


# --- no checkpoint


def test_what_is_not_there_is_refused(tmp_path):
    refused(lambda: load(tmp_path / "absent.pt"), "absent.pt")
    refused(lambda: load(tmp_path), str(tmp_path))


def test_what_is_no_dict_is_refused(tmp_path):
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    refused(lambda: load(tmp_path / "tensor.pt"), "tensor.pt")


def test_what_is_another_archive_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "other.pt", "w") as archive:
        archive.writestr("hello.txt", "hello")
    refused(lambda: load(tmp_path / "other.pt"), "other.pt")


# --- hostile


class Hostile:
    """Unpickling it makes a file."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.canary,)


def test_a_hostile_pickle_is_refused_and_not_run(tmp_path):
    canary = tmp_path / "CANARY"
    path = tmp_path / "hostile.pt"
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
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in entries.items():
            archive.writestr(name, program if name.endswith("/data.pkl") else content)
    verify(path)
    refused(lambda: load(path), str(path), "not a kdmini checkpoint")
