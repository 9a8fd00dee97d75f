"""The set of the evidence, rebuilt from photographs at their original size, is the set that
was measured on.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bench.make_voc320 import IDS, make, year_of
from kdmini.contracts import UserError
from kdmini.detection.voc import VOC
from kdmini.detection.voc_xml import read_annotation
from tests.conftest import ROOT

DATA = ROOT.parent / "shared/data"
ORIGINAL = DATA / "voc-original"
SMALL = DATA / "voc20-320"
needs_photographs = pytest.mark.skipif(
    not SMALL.is_dir(), reason=f"needs the photographs in {DATA}"
)


def ids(split: str) -> list[str]:
    return (IDS / f"{split}.txt").read_text().split()


def test_the_splits_are_apart_and_as_many_as_is_said() -> None:
    train = set(ids("train"))
    val = set(ids("val"))
    assert len(train) == 3000
    assert len(val) == 800
    assert not train & val


@needs_photographs
def test_the_ids_are_those_of_the_set() -> None:
    for split in ("train", "val"):
        assert ids(split) == (SMALL / f"ImageSets/Main/{split}.txt").read_text().split()


@pytest.fixture
def originals(tmp_path: Path) -> tuple[Path, Path, list[str]]:
    """The photographs of the set of which the originals are here too.

    -> the folder with both years, that of the id lists, the ids.
    """
    devkit = tmp_path / "VOCdevkit"
    for part in ("Annotations", "JPEGImages"):
        shutil.copytree(ORIGINAL / part, devkit / "VOC2012" / part)
    (devkit / "VOC2007").mkdir()
    here = {path.stem for path in ORIGINAL.glob("JPEGImages/*.jpg")}
    names = sorted(here & {*ids("train"), *ids("val")})
    (tmp_path / "ids").mkdir()
    (tmp_path / "ids/train.txt").write_text("\n".join(names))
    return devkit, tmp_path / "ids", names


@needs_photographs
def test_photographs_and_boxes_come_out_as_they_are_in_the_set(
    originals: tuple[Path, Path, list[str]], tmp_path: Path
) -> None:
    devkit, lists, names = originals
    assert len(names) == 23
    made = tmp_path / "made"
    make(devkit, made, lists)
    for name in names:
        found = np.asarray(Image.open(made / f"JPEGImages/{name}.jpg"))
        expected = np.asarray(Image.open(SMALL / f"JPEGImages/{name}.jpg"))
        assert np.array_equal(found, expected), name
        mine = read_annotation(made / f"Annotations/{name}.xml")
        theirs = read_annotation(SMALL / f"Annotations/{name}.xml")
        assert mine.size == theirs.size, name
        assert mine.classes == theirs.classes, name
        assert np.array_equal(mine.boxes_xyxy, theirs.boxes_xyxy), name
        assert not mine.difficult.any(), name
    assert len(VOC(str(made), ["train"])) == 23


@needs_photographs
def test_a_set_is_never_written_over(
    originals: tuple[Path, Path, list[str]], tmp_path: Path
) -> None:
    devkit, lists, _ = originals
    (tmp_path / "made").mkdir()
    with pytest.raises(UserError, match="is there already"):
        make(devkit, tmp_path / "made", lists)


def test_an_id_says_its_year() -> None:
    assert year_of("000004") == "VOC2007"
    assert year_of("2007_000027") == "VOC2012"


def test_what_is_missing_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"VOC2007: no such folder; .*kdmini\.tools\.download"):
        make(tmp_path, tmp_path / "made")
    for year in ("VOC2007", "VOC2012"):
        (tmp_path / year).mkdir()
    with pytest.raises(UserError, match="cannot be read"):
        make(tmp_path, tmp_path / "made")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["VOC2007", "VOC2012"]
