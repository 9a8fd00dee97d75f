"""The set of the evidence, rebuilt from photographs at their original size, is the set that was
measured on.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bench.make_voc320 import IDS, make, place_of
from kdmini.contracts import UserError
from kdmini.detection.voc import VOC, read_annotation
from tests.conftest import ROOT

DATA = ROOT.parent / "shared/data"
ORIGINAL, SMALL = DATA / "voc-original", DATA / "voc20-320"
needs_photographs = pytest.mark.skipif(
    not SMALL.is_dir(), reason=f"needs the photographs in {DATA}"
)


def ids(split: str) -> list[str]:
    return (IDS / f"{split}.txt").read_text().split()


def test_the_splits_are_apart_and_as_many_as_is_said() -> None:
    train, val = ids("train"), ids("val")
    assert (len(set(train)), len(set(val)), len(set(train) & set(val))) == (3000, 800, 0)


@needs_photographs
def test_the_ids_are_those_of_the_set() -> None:
    for split in ("train", "val"):
        assert ids(split) == (SMALL / f"ImageSets/Main/{split}.txt").read_text().split()


@needs_photographs
def test_photographs_and_boxes_come_out_as_they_are_in_the_set(tmp_path: Path) -> None:
    both = sorted(
        {path.stem for path in ORIGINAL.glob("JPEGImages/*.jpg")} & {*ids("train"), *ids("val")}
    )
    assert len(both) == 23
    for folder in ("Annotations", "JPEGImages"):
        shutil.copytree(ORIGINAL / folder, tmp_path / "VOCdevkit/VOC2012" / folder)
    (tmp_path / "VOCdevkit/VOC2007").mkdir()
    (tmp_path / "ids").mkdir()
    (tmp_path / "ids/train.txt").write_text("\n".join(both))
    make(tmp_path / "VOCdevkit", tmp_path / "made", tmp_path / "ids")
    for name in both:
        found, expected = (
            np.asarray(Image.open(root / f"JPEGImages/{name}.jpg"))
            for root in (tmp_path / "made", SMALL)
        )
        assert np.array_equal(found, expected), name
        mine, theirs = (
            read_annotation(root / f"Annotations/{name}.xml") for root in (tmp_path / "made", SMALL)
        )
        assert (
            mine.size == theirs.size and mine.classes == theirs.classes and not mine.difficult.any()
        )
        assert np.array_equal(mine.boxes_xyxy, theirs.boxes_xyxy), name
    assert len(VOC(str(tmp_path / "made"), ["train"])) == 23
    with pytest.raises(UserError, match="is there already"):
        make(tmp_path / "VOCdevkit", tmp_path / "made", tmp_path / "ids")


def test_an_id_says_its_year() -> None:
    assert place_of(Path("voc"), "000004") == Path("voc/VOC2007")
    assert place_of(Path("voc"), "2007_000027") == Path("voc/VOC2012")


def test_what_is_missing_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"VOC2007: no such folder; .*kdmini\.tools\.download"):
        make(tmp_path, tmp_path / "made")
    for year in ("VOC2007", "VOC2012"):
        (tmp_path / year).mkdir()
    with pytest.raises(UserError, match="cannot be read"):
        make(tmp_path, tmp_path / "made")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["VOC2007", "VOC2012"]
