"""Damaged weight files, zips that torch.save does not write, files of other kinds."""

import io
import pickle
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from kdmini.weights.archive import MAX_FILE_BYTES
from tests.detection.yolo11.watched import read, refused
from tests.detection.yolo11.weight_files import (
    ROWS,
    assert_equal,
    entries_of,
    own_content,
    own_file,
    rezipped,
)

pytestmark = pytest.mark.usefixtures("canary")

# --- the zip


def written(path: Path, *extra: tuple[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    """A good file written again, with more entries after its own."""
    entries = list(entries_of(own_file(path)).items())
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in [*entries, *extra]:
            archive.writestr(name, content)
    return path


def test_control_a_file_that_was_written_again_is_read(tmp_path: Path) -> None:
    assert read(written(tmp_path / "f.pt")).names == ["cat", "dog"]


def test_an_entry_twice_is_refused(tmp_path: Path) -> None:
    code = entries_of(own_file(tmp_path / "f.pt"))["f/data.pkl"]
    with pytest.warns(UserWarning, match="Duplicate name"):
        path = written(tmp_path / "f.pt", ("f/data.pkl", code))
    refused(path, "an entry twice")


@pytest.mark.parametrize("name", ["g/data.pkl", "data.pkl"])
def test_a_second_root_folder_is_refused(tmp_path: Path, name: str) -> None:
    code = entries_of(own_file(tmp_path / "f.pt"))["f/data.pkl"]
    refused(written(tmp_path / "f.pt", (name, code)), "more than one root")


def test_compressed_entries_are_refused(tmp_path: Path) -> None:
    refused(written(tmp_path / "f.pt", method=zipfile.ZIP_DEFLATED), "compressed")


def test_a_program_of_torchscript_is_refused(tmp_path: Path) -> None:
    refused(written(tmp_path / "f.pt", ("f/constants.pkl", b"")), "TorchScript")


def test_a_file_of_a_big_endian_machine_is_refused(tmp_path: Path) -> None:
    path = rezipped(
        own_file(tmp_path / "f.pt"), lambda entries: entries.update({"f/byteorder": b"big"})
    )
    refused(path, "big-endian")


# --- damage


def test_every_flipped_byte_of_a_tensor_is_found(tmp_path: Path) -> None:
    path = own_file(tmp_path / "f.pt")
    good = path.read_bytes()
    start = good.index(entries_of(path)["f/data/0"])
    length = 4 * own_content()["model"][ROWS[0]].numel()
    for position in range(start, start + length):
        damaged = bytearray(good)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        refused(path, "CRC")


def test_a_file_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    path = own_file(tmp_path / "f.pt")
    good = path.read_bytes()
    for length in range(0, len(good) - 1, 37):
        path.write_bytes(good[:length])
        refused(path)


@pytest.fixture
def without_checksums(tmp_path: Path) -> Path:
    """As torch.save writes it when it is told to compute none."""
    torch.serialization.set_crc32_options(False)
    try:
        return own_file(tmp_path / "f.pt")
    finally:
        torch.serialization.set_crc32_options(True)


def test_a_file_without_checksums_is_read(without_checksums: Path) -> None:
    state = torch.load(without_checksums, weights_only=True)["model"]
    assert_equal(read(without_checksums).state, state)


def test_a_file_whose_checksums_are_zero_is_read(without_checksums: Path) -> None:
    path = without_checksums
    state = torch.load(path, weights_only=True)["model"]
    data = bytearray(path.read_bytes())
    # header -> where in it the format keeps the CRC
    positions = {b"PK\3\4": 14, b"PK\1\2": 16, b"PK\7\x08": 4}
    for signature, position in positions.items():
        for match in re.finditer(re.escape(signature), bytes(data)):
            start = match.start() + position
            data[start : start + 4] = bytes(4)
    path.write_bytes(data)

    with zipfile.ZipFile(path) as archive:
        assert {info.CRC for info in archive.infolist()} == {0}
    assert_equal(read(path).state, state)


# --- files of other kinds


def torchscript() -> bytes:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(nn.Conv2d(1, 1, 1), torch.rand(1, 1, 2, 2)), buffer)
    return buffer.getvalue()


def legacy() -> bytes:
    buffer = io.BytesIO()
    torch.save({"model": torch.rand(2)}, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
@pytest.mark.parametrize(
    "content, message",
    [
        (lambda: b"", "is empty"),
        (lambda: b"\r\n<!DOCTYPE html><html><title>Not Found</title>", "web page"),
        (lambda: b"<html>", "web page"),
        (torchscript, "TorchScript"),
        (legacy, "before PyTorch 1.6"),
        (lambda: b"storages".ljust(257, b"\0") + b"ustar\x0000", "before PyTorch 1.6"),
        (lambda: pickle.dumps({"model": 1}), "bare pickle"),
        (lambda: struct.pack("<Q", 2) + b"{}", "safetensors"),
        (lambda: b"\x08\x0a\x12\x07pytorch\x1a\x062.15.0:\x04\x0a\x02hi", "ONNX"),
        (lambda: b"hello", "no weight file"),
        (lambda: b"PK\3\4", "damaged"),
    ],
)
def test_other_files_are_called_what_they_are(
    tmp_path: Path, content: Callable[[], bytes], message: str
) -> None:
    path = tmp_path / "f.pt"
    path.write_bytes(content())
    refused(path, message)


def test_a_file_larger_than_any_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "f.pt"
    with path.open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)  # sparse
    refused(path, "larger than")
