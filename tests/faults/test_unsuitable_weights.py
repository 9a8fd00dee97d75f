"""Weight files that are damaged, of another kind or of another detector, through the
command line: each is called what it is.
"""

import pickle
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import eval as eval_script
from tests.faults.attempts import assert_one_line, attempts
from tests.faults.children import run, script
from tests.faults.entries import ENTRIES, Finished, finish, newest, other_run, put_back
from tests.faults.hostile import Reduced, bare
from tests.faults.record import survived


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, shapes: Path) -> Finished:
    return finish(tmp_path_factory.mktemp("finished"), shapes)


@pytest.fixture
def private(finished: Finished, tmp_path: Path) -> Iterator[Finished]:
    with put_back(finished, tmp_path / "copy") as run_as_before:
        yield run_as_before


# --- how they are written: each takes the path of the file, and that of a good best.pt

Write = Callable[[Path, Path], object]


def of_bytes(data: bytes) -> Write:
    return lambda path, best: path.write_bytes(data)


def saved(**changes: Any) -> Write:
    return lambda path, best: torch.save(content_of(best) | changes, path)


def content_of(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def with_entry(name: str, content: bytes) -> Write:
    """With one entry more, or another content of one, and right checksums."""

    def write(path: Path, best: Path) -> None:
        entries = entries_of(best)
        write_entries(path, entries | {inside(entries, name): content})

    return write


def entries_of(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write_entries(path: Path, entries: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)


def inside(entries: dict[str, bytes], name: str) -> str:
    """The name with the root folder that all entries share."""
    root = next(iter(entries)).partition("/")[0]
    return f"{root}/{name}"


def without_pickle(path: Path, best: Path) -> None:
    entries = entries_of(best)
    del entries[inside(entries, "data.pkl")]
    write_entries(path, entries)


def with_another_root(path: Path, best: Path) -> None:
    write_entries(path, entries_of(best) | {"other/data.pkl": b""})


def deflated(path: Path, best: Path) -> None:
    write_entries(path, entries_of(best), zipfile.ZIP_DEFLATED)


def twice(path: Path, best: Path) -> None:
    shutil.copy(best, path)
    with zipfile.ZipFile(path, "a") as archive:
        name = archive.namelist()[0]
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr(name, archive.read(name))


def cut_off(path: Path, best: Path) -> None:
    path.write_bytes(best.read_bytes()[:-1000])


def flipped(path: Path, best: Path) -> None:
    data = bytearray(best.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def legacy(path: Path, best: Path) -> None:
    torch.save(content_of(best), path, _use_new_zipfile_serialization=False)


def overlong(path: Path, best: Path) -> None:
    """A tensor whose strides reach beyond its storage."""
    content = content_of(best)
    storage = torch.rand(4)._typed_storage()
    content["model"]["x"] = Reduced(
        torch._utils._rebuild_tensor_v2, storage, 0, (1 << 20,), (1,), False, {}
    )
    torch.save(content, path)


def task(name: str) -> Write:
    fragment = f"cultralytics.nn.tasks\n{name}Model\n)R".encode()
    return lambda path, best: bare(path, 2, fragment)


def checkpoint_of_the_run(path: Path, best: Path) -> None:
    shutil.copy(newest(best.parent), path)


# --- the files


class File(NamedTuple):
    write: Write
    message: str


DAMAGED = {
    "entry twice": File(twice, "has an entry twice"),
    "two roots": File(with_another_root, "more than one root"),
    "deflated": File(deflated, "compressed"),
    "cut off": File(cut_off, "damaged"),
    "flipped byte": File(flipped, "damaged"),
    "no data.pkl": File(without_pickle, "without data.pkl"),
    "a storage cut off": File(with_entry("data/0", b"1234"), "damaged"),
    "a tensor without end": File(overlong, "outside its storage"),
}

TAR = b"storages".ljust(257, b"\0") + b"ustar\x0000"
SAFETENSORS = b"\2\0\0\0\0\0\0\0{}"
ONNX = b"\x08\x0a\x12\x07pytorch\x1a\x062.15.0:\x04\x0a\x02hi"

OF_ANOTHER_KIND = {
    "empty": File(of_bytes(b""), "is empty"),
    "legacy": File(legacy, "before PyTorch 1.6"),
    "tar": File(of_bytes(TAR), "before PyTorch 1.6"),
    "TorchScript": File(with_entry("constants.pkl", b""), "TorchScript"),
    "bare pickle": File(of_bytes(pickle.dumps({"model": 1})), "bare pickle"),
    "safetensors": File(of_bytes(SAFETENSORS), "safetensors"),
    "ONNX": File(of_bytes(ONNX), "ONNX"),
    "HTML": File(of_bytes(b"<!DOCTYPE html><title>404</title>"), "web page"),
    "pose": File(task("Pose"), "is a pose checkpoint"),
    "segmentation": File(task("Segmentation"), "is a segmentation checkpoint"),
    "classification": File(task("Classification"), "is a classification checkpoint"),
    "a run's checkpoint": File(checkpoint_of_the_run, "a checkpoint of a run of kdmini, which"),
}


def card(scale: str) -> dict[str, Any]:
    return {"scale": scale, "sppf_act": True, "license": ""}


ESCAPES = ["\x1b[2J" + "x" * 100, "\x1b]0;title\x07", "a\nerror: b", "\u202e", "\r", "\0"]
OTHER_ORDER = ["cross", "a", "b", "c", "d", "circle"]

OF_ANOTHER_DETECTOR = {
    "scale s": File(saved(card=card("s")), "is YOLO11s, the config says YOLO11 [0.5"),
    "scale m": File(saved(card=card("m")), "is YOLO11m, the config says YOLO11 [0.5"),
    "other names": File(saved(names=["a", "b", "c", "d", "e", "f"]), "classes: by_name"),
    "other order": File(saved(names=OTHER_ORDER), "classes: by_name"),
    "terminal escapes": File(saved(names=ESCAPES), r"'\x1b[2Jxxxx"),
    "a million names": File(
        saved(names=["x"] * 1_000_000), "has no list of names for its 6 classes"
    ),
}

# row of the table of faults -> the files in it
ROWS = {
    "Weights: file damaged": DAMAGED,
    "Weights: file of another kind": OF_ANOTHER_KIND,
    "Weights: file of another scale or other classes": OF_ANOTHER_DETECTOR,
}


@pytest.mark.parametrize("entry", ["eval", pytest.param("student", marks=pytest.mark.long)])
@pytest.mark.parametrize("row", ROWS)
def test_a_file_that_does_not_serve_is_called_what_it_is(
    entry: str, row: str, private: Finished, tmp_path: Path
) -> None:
    paths = {name: tmp_path / f"{name}.pt" for name in ROWS[row]}
    for name, file in ROWS[row].items():
        file.write(paths[name], private.best)
    calls = {name: ENTRIES[entry](path, private) for name, path in paths.items()}
    for name, attempt in attempts(calls, tmp_path / "CANARY", tmp_path / "out").items():
        assert_one_line(attempt.done, paths[name], name)
        assert ROWS[row][name].message in attempt.done.last, f"{name}: {attempt.done.last}"
        assert not attempt.traces, f"{name} left {attempt.traces}"
        survived(row)
    assert not other_run(private).exists()


@pytest.mark.parametrize(
    "scale, message",
    [("s", "other shapes in 'model."), ("m", "is YOLO11s, the config says YOLO11m")],
)
def test_a_file_of_another_scale_is_refused_even_where_it_lies(
    scale: str, message: str, private: Finished, tmp_path: Path
) -> None:
    """It says that it is YOLO11s; the tensors are those of neither."""
    path = tmp_path / "f.pt"
    saved(card=card("s"))(path, private.best)
    command = ("--config", private.config, "--weights", path, f"student.scale={scale}")
    done = run(script(eval_script, *command), tmp_path / "out")
    assert_one_line(done, path, scale)
    assert message in done.last
