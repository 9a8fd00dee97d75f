"""Class folders: what is read, what is said, what is refused."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kdmini.classification.folders import Folders
from kdmini.contracts import UserError
from kdmini.sections import make_sets
from tests.classification.labelled import add
from tests.house.source import ROOT

GROCERIES = ROOT.parent / "shared/data/groceries-72"
BUILD = {"build": "kdmini.classification.folders:Folders"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    add(tmp_path, "train/dog/b.jpg", "train/dog/a.png", "train/cat/1.JPG", "val/cat/9.jpg")
    add(tmp_path, "val/dog/a.png")
    return tmp_path


def test_classes_are_the_folders_in_the_order_of_their_names(root: Path) -> None:
    dataset = Folders(str(root), "train")
    assert dataset.names == ["cat", "dog"]
    samples = [dataset[index] for index in range(len(dataset))]
    assert [target for _, target in samples] == [
        {"label": 0, "id": "cat/1.JPG"},
        {"label": 1, "id": "dog/a.png"},
        {"label": 1, "id": "dog/b.jpg"},
    ]
    with Image.open(root / "train/dog/a.png") as picture:
        np.testing.assert_array_equal(samples[1][0], np.asarray(picture))
    assert dataset.report() == ""


def test_names_give_the_order(root: Path) -> None:
    dataset = Folders(str(root), "train", names=["dog", "cat"])
    assert [dataset[index][1]["label"] for index in range(3)] == [0, 0, 1]
    assert dataset[2][1]["id"] == "cat/1.JPG"


def test_a_share_is_drawn_of_folders_without_splits(tmp_path: Path) -> None:
    names = [f"{kind}/{number}.jpg" for kind in ("cat", "dog") for number in range(8)]
    add(tmp_path, *names)
    sets = make_sets({**BUILD, "split": "."}, {"share": 0.25}, str(tmp_path))
    parts = [
        [part[index][1]["id"] for index in range(len(part))] for part in (sets.train, sets.val)
    ]
    assert [len(part) for part in parts] == [12, 4]
    assert sorted(parts[0] + parts[1]) == names


def test_a_split_may_be_the_root_itself(root: Path) -> None:
    assert Folders(str(root / "train"), ".").names == ["cat", "dog"]


def test_what_is_no_image_is_passed_over_and_counted(root: Path) -> None:
    (root / "train/cat/notes.txt").write_text("x")
    (root / "train/dog/more").mkdir()
    for hidden in (".DS_Store", "dog/.hidden", "dog/._b.jpg"):
        (root / "train" / hidden).write_text("x")
    (root / "train/.checkpoints").mkdir()
    dataset = Folders(str(root), "train")
    assert len(dataset) == 3
    assert dataset.report() == f"2 of no image passed over, as {root}/train/cat/notes.txt"


def test_images_that_exif_turns_are_counted(root: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    add(root, "train/cat/2.jpg", exif=exif)
    dataset = Folders(str(root), "train")
    assert [dataset[index][0].shape for index in range(2)] == [(9, 12, 3)] * 2
    assert dataset.report() == "1 images that EXIF turns, taken as stored"


# --- refused


def refused(*args: object, **settings: object) -> str:
    with pytest.raises(UserError) as error:
        Folders(*args, **settings)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_class_without_images_is_refused(root: Path) -> None:
    (root / "train/fish").mkdir()
    (root / "train/fish/notes.txt").write_text("x")
    said = refused(str(root), "train")
    assert said.startswith(f"{root}/train/fish: no image of class 'fish'")
    assert said.endswith("add some, or take the class out of the set")


def test_a_class_without_a_folder_is_refused(root: Path) -> None:
    said = refused(str(root), "train", names=["cat", "dog", "fish"])
    assert said.startswith(f"{root}/train/fish: no image of class 'fish'")


def test_a_folder_that_the_names_lack_is_refused(root: Path) -> None:
    add(root, "train/doge/1.jpg", "train/fish/1.jpg")
    said = refused(str(root), "train", names=["cat", "dog"])
    assert said.startswith(f"{root}/train/doge: unknown class 'doge', the nearest known is 'dog'")
    assert said.endswith("list it in `names`, or move the folder (2 such folders)")


@pytest.mark.parametrize("split", ["test", "../val", "train/cat/1.JPG", "a\0b"])
def test_a_split_that_is_no_folder_is_refused(root: Path, split: str) -> None:
    assert "no such folder; correct `root` or `split`" in refused(str(root), split)


def test_a_split_without_classes_is_refused(root: Path) -> None:
    assert "has no folder of a class" in refused(str(root), "train/dog")


def test_a_class_twice_in_the_names_is_refused(root: Path) -> None:
    assert "names a class twice" in refused(str(root), "train", names=["cat", "dog", "cat"])


def test_a_class_that_only_one_split_has_is_refused(root: Path) -> None:
    add(root, "val/fish/1.jpg")
    with pytest.raises(UserError, match=r"only in data\.val: 'fish'"):
        make_sets({**BUILD, "split": "train"}, {**BUILD, "split": "val"}, root=str(root))


def test_one_split_in_both_places_is_refused(root: Path) -> None:
    same = {**BUILD, "split": "train"}
    with pytest.raises(UserError, match="3 images are in train and val both"):
        make_sets(same, same, root=str(root))


def test_a_link_out_of_the_set_is_refused(root: Path, tmp_path_factory) -> None:
    add(tmp_path_factory.mktemp("other"), "0.jpg")
    os.symlink(tmp_path_factory.getbasetemp() / "other0/0.jpg", root / "train/cat/0.jpg")
    os.symlink(root / "train/dog/b.jpg", root / "train/dog/c.jpg")
    dataset = Folders(str(root), "train")
    with pytest.raises(UserError, match=r"cat/0\.jpg: a link that leads out of the set"):
        dataset[0]
    assert dataset[4][1]["id"] == "dog/c.jpg"


def test_a_damaged_image_is_refused_when_it_is_asked_for(root: Path) -> None:
    path = root / "train/cat/1.JPG"
    path.write_bytes(path.read_bytes()[:40])
    dataset = Folders(str(root), "train")
    with pytest.raises(UserError, match=r"1\.JPG: not a usable image"):
        dataset[0]


# --- photographs


@pytest.mark.skipif(not GROCERIES.is_dir(), reason="no real photographs beside the repository")
def test_the_groceries_are_read() -> None:
    train = Folders(str(GROCERIES), "train")
    val = Folders(str(GROCERIES), "val")
    assert (len(train), len(val), len(train.names)) == (2640, 2485, 81)
    assert train.names == val.names
    assert not train.photographs & val.photographs
    assert train[0][0].shape[2] == 3
