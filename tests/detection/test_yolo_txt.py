"""Images with text files: against the VOC reader and torchvision's boxes; faulty files."""

import json
import os
import shutil
import unicodedata

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.ops import box_convert

import train as train_script
from examples.shapes import SHAPE_NAMES
from kdmini.contracts import UserError
from kdmini.data.store import Store
from kdmini.detection.voc import VOC
from kdmini.detection.yolo_txt import YoloTxt
from tests.commands import run

NAMES = ["cat", "dog", "emu"]


def add(root, name, text=None, size=(40, 30), **saving):
    """One image, and its label file where there is a text, in the folder `train`."""
    for part in ("images", "labels"):
        (root / part / "train").mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (200, 30, 60)).save(root / "images/train" / name, **saving)
    if text is not None:
        label = root / "labels/train" / f"{name.rpartition('.')[0]}.txt"
        label.write_bytes(text if isinstance(text, bytes) else text.encode())


def one(root, text, **saving):
    """A dataset of one image, a.jpg, with that label file."""
    add(root, "a.jpg", text, **saving)
    return YoloTxt(str(root), names=NAMES)


@pytest.fixture(scope="module")
def converted(tmp_path_factory, shapes):
    """The generated set in this form; images without objects keep no label file."""
    root = tmp_path_factory.mktemp("yolo") / "set"
    for split in ("train", "val"):
        voc = VOC(str(shapes), [split], names=SHAPE_NAMES)
        for part in ("images", "labels"):
            (root / part / split).mkdir(parents=True)
        for index in range(len(voc)):
            image, target = voc[index]
            name = target["id"].split("/")[1]
            shutil.copy(shapes / f"JPEGImages/{name}.jpg", root / f"images/{split}")
            (root / f"labels/{split}/{name}.txt").write_text(label_lines(image, target))
    lines = ["path: ../elsewhere", "nc: 6", f"names: {json.dumps(SHAPE_NAMES)}", ""]
    (root / "data.yaml").write_text("\n".join(lines))
    return root


def label_lines(image, target):
    boxes_xyxy = torch.from_numpy(target["boxes_xyxy"]).double()
    height, width = image.shape[:2]
    sides = torch.tensor([width, height, width, height])
    parts = box_convert(boxes_xyxy, "xyxy", "cxcywh") / sides
    lines = []
    for label, (cx, cy, w, h) in zip(target["labels"], parts.tolist(), strict=True):
        lines.append(f"{label} {cx:.8f} {cy:.8f} {w:.8f} {h:.8f}")
    return "\n".join(lines)


@pytest.mark.parametrize("split, images", [("train", 24), ("val", 8)])
def test_a_set_in_both_forms_gives_the_same_images_and_targets(converted, shapes, split, images):
    voc = VOC(str(shapes), [split], names=SHAPE_NAMES)
    yolo = YoloTxt(str(converted), f"images/{split}")
    assert yolo.names == voc.names
    assert len(yolo) == len(voc) == images
    for index in range(len(voc)):
        image, target = yolo[index]
        expected_image, expected = voc[index]
        np.testing.assert_array_equal(image, expected_image)
        np.testing.assert_allclose(target["boxes_xyxy"], expected["boxes_xyxy"], atol=1e-4)
        np.testing.assert_array_equal(target["labels"], expected["labels"])
        assert target["boxes_xyxy"].dtype == np.float32
        assert target["labels"].dtype == np.int64
        assert target["difficult"].dtype == bool
        assert not target["difficult"].any()
        assert target["id"] == expected["id"].split("/")[1] + ".jpg"
    assert yolo.report() == ""


def train_on(config_file, root, train, val):
    """A short run on the set in `root`; train, val: the folders of images."""
    overrides = [
        f"data.root={root}",
        f"data.train={{build: kdmini.detection.yolo_txt:YoloTxt, images: {train}}}",
        f"data.val={{build: kdmini.detection.yolo_txt:YoloTxt, images: {val}}}",
    ]
    run(train_script, "--config", config_file, *overrides, "train.epochs=2", "distill=null")


def test_a_run_trains_and_is_scored_on_it(converted, config_file, tmp_path):
    train_on(config_file, converted, "images/train", "images/val")
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert len(lines) == 2
    record = json.loads(lines[-1])
    assert record["loss/box"] > 0
    assert record["score/AP50-95"] >= 0


def test_a_run_that_would_train_on_what_it_validates_is_refused(converted, config_file):
    with pytest.raises(SystemExit, match="24 images are in train and val both"):
        train_on(config_file, converted, "images/train", "images/train")


def test_boxes_are_clipped_and_dropped_under_one_pixel(tmp_path):
    lines = [
        "1 0.5 0.5 0.25 0.2",
        "",
        "0 0 1 0.5 0.5",
        "2 1.0 0.5 0.03 0.5",
        "2.0 0.99 0.5 1.005 1",
        "1 0.5 0.5 0 1",
    ]
    dataset = one(tmp_path, "\r\n".join(lines))
    for _ in range(2):  # a second look is not a second loss
        _, target = dataset[0]
        expected = [[15, 12, 25, 18], [0, 22.5, 10, 30], [19.5, 0, 40, 30]]
        np.testing.assert_allclose(target["boxes_xyxy"], expected, rtol=1e-6)
        assert target["labels"].tolist() == [1, 0, 2]
        assert target["difficult"].tolist() == [False] * 3
    assert dataset.report() == "2 boxes under 1 px dropped in 1 images"


def test_images_without_labels_are_background_and_endings_of_all_kinds_are_found(tmp_path):
    add(tmp_path, "b.png")
    add(tmp_path, "a.JPG", "")
    add(tmp_path, "a.png", "")
    add(tmp_path, "c.webp", b"\xef\xbb\xbf0 .5 .5 .5 .5\n")  # with a byte order mark
    # as some tools leave it there
    (tmp_path / "labels/train/classes.txt").write_text("cat\ndog\n")
    dataset = YoloTxt(str(tmp_path), names=NAMES)
    targets = [dataset[i][1] for i in range(len(dataset))]
    assert [target["id"] for target in targets] == ["a.JPG", "a.png", "b.png", "c.webp"]
    assert [target["boxes_xyxy"].shape for target in targets] == [(0, 4)] * 3 + [(1, 4)]
    assert all(target["labels"].dtype == np.int64 for target in targets)
    assert dataset.report() == "1 images without a label file"


@pytest.mark.parametrize(
    "line, message",
    [
        ("1 .5 .5 .5", "is not `class cx cy w h`"),
        ("1 .5 .5 .5 .5 .9", "is not `class cx cy w h`"),
        ("0 .1 .1 .2 .1 .2 .2 .1 .2", "is not `class cx cy w h`"),  # a polygon
        ("dog .5 .5 .5 .5", "'dog .5 .5 .5 .5' is not `class cx cy w h`"),
        ("1 .5 nan .5 .5", "is not `class cx cy w h`"),
        ("1 .5 .5 inf .5", "is not `class cx cy w h`"),
        (b"1 .5 .5 .5 \xff\xfe", "is not `class cx cy w h`"),
        ("\0", "is not `class cx cy w h`"),
        ("3 .5 .5 .5 .5", "class 3, but names go from 0 to 2"),
        ("-1 .5 .5 .5 .5", "class -1, but"),
        ("0.5 .5 .5 .5 .5", "class 0.5, but"),
        ("1 20 15 10 6", "not parts of the image's sides, from 0 to 1; divide pixels"),
        ("1 .5 .5 -.5 .5", "not parts of"),
        ("1 .5 -.02 .5 .5", "not parts of"),
    ],
)
def test_a_faulty_line_is_named(tmp_path, line, message):
    good = b"1 .5 .5 .5 .5"
    faulty = line if isinstance(line, bytes) else line.encode()
    dataset = one(tmp_path, b"\n".join([good, b"", faulty, good, b""]))
    with pytest.raises(UserError) as error:
        dataset[0]
    assert "labels/train/a.txt:3: " in str(error.value)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_all_faulty_files_are_named_at_once_and_can_be_left_out(tmp_path, capsys):
    for name in "abcde":
        add(tmp_path, f"{name}.png", "0 .5 .5 .5 .5")
    (tmp_path / "labels/train/a.txt").write_text("0 .5 .5")
    (tmp_path / "images/train/b.png").write_text("<html>")
    outside = tmp_path / "outside"
    outside.mkdir()
    for path in (tmp_path / "images/train/c.png", tmp_path / "labels/train/d.txt"):
        shutil.move(path, outside)
        path.symlink_to(outside / path.name)
    dataset = YoloTxt(str(tmp_path), names=NAMES)
    with pytest.raises(UserError, match="4 of 5 images are bad"):
        Store(dataset, 32)
    lines = [line for line in capsys.readouterr().err.splitlines() if str(tmp_path) in line]
    messages = ["a.txt:1:", "b.png: not a usable", "train/c.png: a link that", "d.txt: a link that"]
    for line, message in zip(lines, messages, strict=True):
        assert message in line
    assert [target["id"] for target in Store(dataset, 32, on_bad="skip").targets] == ["e.png"]


def test_only_the_line_is_left_out_where_only_that_is_bad(tmp_path, capsys):
    dataset = one(tmp_path, "1 .5 .5 .5 .5\n0 .1 .1 .2 .1 .2 .2 .1 .2\n")  # a polygon
    with pytest.raises(UserError, match=r"val: 1 objects are bad, as .*a\.txt:2: "):
        Store(dataset, 32, name="val")
    store = Store(dataset, 32, name="val", on_bad="skip")
    assert store.targets[0]["labels"].tolist() == [1]
    assert "val: 1 objects are bad and left out" in capsys.readouterr().err


@pytest.mark.parametrize("label, refused", [("1 .5 .5 .5 .5", True), ("", False), (None, False)])
def test_two_images_cannot_have_the_labels_of_one(tmp_path, label, refused):
    add(tmp_path, "a.jpg", label)
    add(tmp_path, "a.png", label)
    dataset = YoloTxt(str(tmp_path), names=NAMES)
    for index in range(2):
        if refused:
            with pytest.raises(UserError, match=r"a\.jpg: 'a\.png' has the same name; which"):
                dataset[index]
        else:
            assert len(dataset[index][1]["labels"]) == 0


def test_labels_are_found_in_either_spelling_and_macos_leaves_nothing(tmp_path):
    add(tmp_path, f"{unicodedata.normalize('NFD', '사진')}.jpg")
    add(tmp_path, "b.png")
    (tmp_path / "labels/train/사진.txt").write_text("2 .5 .5 .5 .5")
    for part in ("images/train/._b.png", "labels/train/._사진.txt"):
        (tmp_path / part).write_bytes(b"\0\5\26\7")
    (tmp_path / "images/train/more").mkdir()
    dataset = YoloTxt(str(tmp_path), names=NAMES)
    assert sorted(len(dataset[index][1]["labels"]) for index in range(2)) == [0, 1]
    assert dataset.report() == "1 images without a label file, 1 folders below not read"


@pytest.mark.parametrize("orientation", [3, 6])
def test_an_image_that_exif_turns_is_refused_unless_it_is_background(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    with pytest.raises(UserError, match=r"a\.jpg: 40x30 pixels, turned by EXIF: boxes may"):
        one(tmp_path, "1 .5 .5 .5 .5", exif=exif)[0]
    image, _ = one(tmp_path, "", exif=exif)[0]
    assert image.shape == (30, 40, 3)
    add(tmp_path, "a.jpg", "1 .5 .5 .5 .5", exif=exif)
    image, target = YoloTxt(str(tmp_path), names=NAMES, as_stored=True)[0]
    assert image.shape == (30, 40, 3)
    assert target["boxes_xyxy"].tolist() == [[10, 7.5, 30, 22.5]]


def test_labels_follow_images_in_either_layout(tmp_path):
    add(tmp_path, "a.jpg", "2 .5 .5 .5 .5")
    (tmp_path / "valid").mkdir()
    for part in ("images", "labels"):
        os.rename(tmp_path / part / "train", tmp_path / "valid" / part)
    _, target = YoloTxt(str(tmp_path), "valid/images", NAMES)[0]
    assert target["labels"].tolist() == [2]


def test_labels_stand_in_the_place_of_the_last_part_that_is_images(tmp_path):
    add(tmp_path / "images", "b.jpg")
    with pytest.raises(UserError, match=r"images/images: holds no image"):
        YoloTxt(str(tmp_path), "images/images", NAMES)


@pytest.mark.parametrize(
    "images, message",
    [
        ("../set/images/train", "is no folder in root"),
        ("/images/train", "is no folder in root"),
        ("pictures", "pictures: no such folder"),
        ("", "set: holds no image"),
        ("images/test", "images/test: no such folder"),
        ("images/bare", "labels/bare: no such folder"),
    ],
)
def test_a_wrong_folder_is_named(tmp_path, images, message):
    add(tmp_path / "set", "a.jpg")
    (tmp_path / "set/images/bare").mkdir()
    with pytest.raises(UserError, match=message):
        YoloTxt(str(tmp_path / "set"), images, NAMES)


@pytest.mark.parametrize(
    "text", ["names: [cat, dog]", "names: {1: dog, 0: cat}", "names: {0: cat, 1: dog}"]
)
def test_names_come_from_a_yaml_file(tmp_path, text):
    add(tmp_path, "a.jpg")
    (tmp_path / "data.yaml").write_text(text)
    assert YoloTxt(str(tmp_path)).names == ["cat", "dog"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("names: {1: cat, 2: dog}", "names: no list of texts"),
        ("names: [cat, no]", "quote names like `no`"),
        ("names: cat", "names: no list of texts"),
        ("nc: 2", "names: no list of texts"),
        ("names: []", "empty"),
        ("names: [cat, cat]", "names a class twice"),
        ("names: [cat\nnc: 2", r"data.yaml:2: "),
        (None, r"data.yaml: cannot be read"),
    ],
)
def test_a_yaml_file_without_names_is_refused(tmp_path, text, message):
    add(tmp_path, "a.jpg")
    if text is not None:
        (tmp_path / "data.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        YoloTxt(str(tmp_path))
