"""Missing, damaged, foreign and odd masks, from the folder to the metric and through train.py;
and those that change while a run is stopped.
"""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kdmini.contracts import UserError
from kdmini.data.palette import with_palette
from kdmini.segmentation.voc import VOC
from tests.conftest import SEGMENTATION, SEGMENTED
from tests.faults.children import Done, one_line
from tests.faults.own import Own
from tests.faults.record import survived
from tests.faults.runs import Runs, stop_at
from tests.faults.test_kinds_of_file import pipe

BAD = "Data: missing, damaged and foreign masks"
LISTS = "Data: lists of masks empty, overlapping, of files elsewhere"
CHANGED = "Saving: resumed on other masks"
VOID = 255


@pytest.fixture
def masked(own: Own) -> Own:
    """The copy of the set, with the lists of its masks."""
    return Own(own.folder, "Segmentation")


@pytest.fixture
def learn(train: Callable[..., Done]) -> Callable[..., Done]:
    """-> a call of train.py that learns the masks of the copy."""
    return lambda *overrides: train(*SEGMENTATION, *overrides)


def indices(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image)


# --- what is wrong with a mask


def missing(path: Path) -> str:
    path.unlink()
    return "no such file; restore"


def smaller(path: Path) -> str:
    with_palette(indices(path)[:-1]).save(path)
    return r"a mask of (\d+x\d+) pixels, but \S+\.jpg is (?!\1)\d+x\d+; restore the one"


def of_colours(path: Path) -> str:
    with_palette(indices(path)).convert("RGB").save(path)
    return "a mask of RGB colours, which are no class indices; map each colour to its index"


def of_a_class_too_many(path: Path) -> str:
    mask = indices(path)
    mask[0, :3] = len(SEGMENTED)
    with_palette(mask).save(path)
    return r"index 7 in 3 pixels, but `names` has 7 classes, 0 to 6, .*; correct `names`"


def cut(path: Path) -> str:
    whole = path.read_bytes()
    path.write_bytes(whole[:-60])
    return r"not a usable image \(.+\); replace the file"


def flipped(path: Path) -> str:
    whole = path.read_bytes()
    at = len(whole) - 40  # among the pixels
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    return r"not a usable image \(.+\); replace the file"


def empty(path: Path) -> str:
    path.write_bytes(b"")
    return r"not a usable image \(.+\); replace the file"


def of_jpeg(path: Path) -> str:
    """Whose indices are no longer what they were."""
    Image.fromarray(indices(path)).save(path, format="JPEG")
    return r"not a usable image \(.+\); replace the file"


def bomb(path: Path) -> str:
    """A few kB that claim 81 million pixels: nothing of them is decoded."""
    Image.new("P", (9000, 9000)).save(path)
    return r"a mask of 9000x9000 pixels, but \S+\.jpg is \d+x\d+; restore the one"


def a_pipe(path: Path) -> str:
    path.unlink()
    pipe(path)
    return "no such file; restore"


SPOILT = (
    *(missing, smaller, of_colours, of_a_class_too_many, cut),
    *(flipped, empty, of_jpeg, bomb, a_pipe),
)


def test_masks_that_cannot_be_used_are_listed_together_or_left_out(masked: Own, learn) -> None:
    names = masked.names()
    reasons = {}
    for spoil, name in zip(SPOILT, names, strict=False):
        reasons[name] = spoil(masked.mask(name))

    done = learn()
    one_line(done, f"train: {len(SPOILT)} of 24 images are bad", "data.on_bad=skip")
    for name, reason in reasons.items():
        assert re.search(rf"^\S*/{name}\.png: {reason}", done.text, re.MULTILINE), done.text
    assert not (masked.folder.parent / "run" / "ckpt").exists()

    done = learn("data.on_bad=skip")
    assert done.code == 0, done.text
    assert f"train: {len(SPOILT)} of 24 images are bad and left out" in done.text
    assert f"data: {24 - len(SPOILT)} images" in done.text
    survived(BAD, tried=len(SPOILT))


def test_a_mask_of_the_validation_set_is_named_as_such(masked: Own, learn) -> None:
    name = masked.names("val")[0]
    of_a_class_too_many(masked.mask(name))
    one_line(learn(), "val: 1 of 8 images are bad", f"{name}.png: index 7 in 3 pixels")
    survived(BAD)


def test_whatever_becomes_of_its_bytes_a_mask_is_as_it_was_or_refused(masked: Own) -> None:
    name = masked.names()[0]
    masked.split(name)
    path = masked.mask(name)
    dataset = VOC(str(masked.folder), ["train"], SEGMENTED)
    expected = dataset[0][1]["mask"]
    whole = path.read_bytes()
    contents = []
    for at in range(0, len(whole), 3):
        flip = whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :]
        contents += [flip, whole[:at]]
    other = 0
    refused = 0
    for content in contents:
        path.write_bytes(content)
        try:
            other += not np.array_equal(dataset[0][1]["mask"], expected)
        except UserError as error:
            assert f"{name}.png: " in str(error)
            refused += 1
    assert refused > 0.9 * len(contents)
    survived(BAD, other, of="learned from", tried=len(contents))


# --- void


def test_a_set_of_void_alone_is_refused_and_a_batch_of_it_trains(masked: Own, learn) -> None:
    names = masked.names()
    held_out = masked.names("val")
    for name in (*names[:8], *held_out):
        blank(masked.mask(name))
    told = f"the masks of all 8 images are void, index 255, alone, as own/{held_out[0]}; correct"
    one_line(learn(), f"val: {told}")

    with_palette(np.zeros_like(indices(masked.mask(held_out[0])))).save(masked.mask(held_out[0]))
    done = learn()
    assert done.code == 0, done.text
    assert f"train: 8 masks of void alone, as own/{names[0]}" in done.text
    assert f"val: 7 masks of void alone, as own/{held_out[1]}" in done.text
    survived(BAD, tried=2)


def blank(path: Path) -> None:
    with_palette(np.full_like(indices(path), VOID)).save(path)


# --- lists


def test_lists_of_masks(masked: Own, learn) -> None:
    names = masked.names()
    masked.split()
    one_line(learn(), "split 'train' lists no image")
    masked.split_file().unlink()
    one_line(learn(), "ImageSets/Segmentation/train.txt: no such split (val, and `all`)")

    held_out = masked.names("val")[0]
    masked.split(*names, held_out)
    one_line(learn(), "1 images are in train and val both", held_out, "allow_overlap")
    done = learn("data.train.exclude=[val]")
    assert done.code == 0, done.text
    assert "train: 1 of 25 images left out, as in val" in done.text
    survived(LISTS, tried=4)


def test_a_list_of_masks_elsewhere_of_which_some_are_missing(masked: Own, learn) -> None:
    """As those of SBD."""
    elsewhere = masked.folder.parent / "sbd"
    own_list = masked.folder.parent / "train_aug.txt"
    names = masked.names()
    own_list.write_text("".join(f"/JPEGImages/{name}.jpg /Aug/{name}.png\n" for name in names))
    sbd = (f"data.train.splits=[{own_list}]", f"data.train.masks={elsewhere}")
    one_line(learn(*sbd), f"{elsewhere}: no such folder; correct `masks`")

    shutil.copytree(masked.mask(names[0]).parent, elsewhere)
    lost = names[3:6]
    for name in lost:
        (elsewhere / f"{name}.png").unlink()
        masked.mask(name).unlink()
    done = learn(*sbd)
    one_line(done, "train: 3 of 24 images are bad", "data.on_bad=skip")
    line = rf"^{elsewhere}/(\w+)\.png: no such file; restore"
    assert re.findall(line, done.text, re.MULTILINE) == lost
    own_list.unlink()
    one_line(learn(*sbd), f"{own_list}: no such file")
    survived(LISTS, tried=3)


# --- changed


def test_masks_that_change_while_a_run_is_stopped_are_named(masked: Own, runs: Runs) -> None:
    changes = (f"data.root={masked.folder}", *SEGMENTATION)
    done = runs.tried(runs.watched(runs.begin(*changes), stop_at(8)))
    assert done.code == 143, done.text
    for split in ("train", "val"):
        path = masked.mask(masked.names(split)[0])
        before = path.read_bytes()
        mask = indices(path)
        mask[5, 5] = (mask[5, 5] + 1) % len(SEGMENTED)
        with_palette(mask).save(path)
        line = one_line(runs.tried(runs.resume()), "allow_changed=true")
        assert f"data.{split}, image '{path.stem}' was truth " in line
        path.write_bytes(before)
        survived(CHANGED, of="changes unnoticed")

    colours = with_palette(indices(path))
    colours.putpalette(bytes(768))  # which say nothing
    colours.save(path)
    done = runs.tried(runs.resume())
    assert done.code == 0, done.text
