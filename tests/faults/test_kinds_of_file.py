"""A pipe, a device or a folder in the place of a file that is read: named at once, for to open
a pipe would wait for ever.
"""

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kdmini import checkpoint, config, weightfile
from kdmini.contracts import UserError
from kdmini.data.pictures import decode
from kdmini.detection.coco_json import CocoJson
from kdmini.detection.voc import VOC
from kdmini.detection.voc_xml import read_annotation
from kdmini.detection.yolo_txt import read_labels
from kdmini.runlog import RunFolder
from tests.faults.record import survived

LIMIT_S = 20
NAMES = ["circle", "square", "triangle", "star", "ring", "cross"]


def pipe(path: Path) -> Path:
    os.mkfifo(path)
    return path


def device(path: Path) -> Path:
    path.symlink_to("/dev/zero")
    return path


def folder(path: Path) -> Path:
    path.mkdir()
    return path


KINDS = {"a pipe": pipe, "a device": device, "a folder": folder}


def records(path: Path) -> None:
    path.rename(path.with_name("metrics.jsonl"))
    RunFolder(path.parent, lead=False).records()


def split_list(path: Path) -> None:
    root = path.parent
    (root / "ImageSets/Main").mkdir(parents=True)
    (root / "Annotations").mkdir()
    (root / "JPEGImages").mkdir()
    path.rename(root / "ImageSets/Main/train.txt")
    VOC(str(root), ["train"], NAMES)


READERS: dict[str, Callable[[Path], object]] = {
    "config": config.load,
    "checkpoint": checkpoint.load,
    "weights": weightfile.find,
    "weights of any network": lambda path: weightfile.read(str(path)),
    "metrics.jsonl": records,
    "annotation": read_annotation,
    "image": decode,
    "COCO's JSON": lambda path: CocoJson(str(path.parent), path.name, "."),
    "labels of YOLO": lambda path: read_labels(str(path), 2),
    "list of a split": split_list,
}


def hanging(*_: object) -> None:
    raise AssertionError(f"still waiting after {LIMIT_S} s")


@pytest.fixture(autouse=True)
def _limit() -> Iterator[None]:
    before = signal.signal(signal.SIGALRM, hanging)
    signal.alarm(LIMIT_S)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_file_is_named_at_once(tmp_path, reader, kind):
    path = KINDS[kind](tmp_path / "file")
    with pytest.raises(UserError) as caught:
        READERS[reader](path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(tmp_path) in message
    survived("Data: a pipe, a device or a folder in the place of a file")


def test_a_pipe_among_the_checkpoints_is_passed_over(tmp_path, capsys):
    checkpoint.save(tmp_path, 1, {}, {"run": "a"})
    pipe(checkpoint.numbered(tmp_path, 2))
    path, _ = checkpoint.newest(tmp_path)
    assert path == checkpoint.numbered(tmp_path, 1)
    assert "is a pipe, not a file" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["JPEGImages/{}.jpg", "Annotations/{}.xml"])
def test_a_pipe_in_a_data_set_stops_the_run(tmp_path, shapes, name):
    root = tmp_path / "shapes"
    shutil.copytree(shapes, root)
    first = (root / "ImageSets/Main/train.txt").read_text().split()[0]
    spoilt = root / name.format(first)
    spoilt.unlink()
    pipe(spoilt)
    with pytest.raises(UserError, match=first):
        VOC(str(root), ["train"], NAMES)[0]
