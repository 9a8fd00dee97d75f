"""Weight files that several modules of tests read."""

import codecs
from collections.abc import Iterator
from pathlib import Path

import pytest

from kdmini.detection.yolo11 import weights
from tests.detection.yolo11.watched import watch
from tests.detection.yolo11.weight_files import (
    COCO_NAMES,
    CocoFile,
    PublicClasses,
    detector,
    own_file,
    public_classes,
    public_file,
    public_model,
    rounded,
)


@pytest.fixture(scope="module")
def public() -> Iterator[PublicClasses]:
    with public_classes() as classes:
        yield classes


@pytest.fixture(scope="module")
def coco_n(public: PublicClasses, tmp_path_factory: pytest.TempPathFactory) -> CocoFile:
    """A YOLO11n of 80 classes, as the public file is."""
    model = detector("n", COCO_NAMES)
    state = rounded(model.state_dict())
    path = tmp_path_factory.mktemp("coco") / "yolo11n.pt"
    return CocoFile(public_file(path, public_model(public, model)), state)


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    """A file that no reading may create. Nor may it import, execute, connect or start."""
    # zipfile and torch import parts of their own with the first file, and Python a codec when
    # it is first used: names in a zip are in this one
    codecs.lookup("cp437")
    weights.read(own_file(tmp_path / "first.pt"))
    watch.events.clear()
    yield tmp_path / "CANARY"
    assert not (tmp_path / "CANARY").exists()
    assert not watch.events
