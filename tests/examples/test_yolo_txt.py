"""Images with text files: against the VOC reader on one set in both forms, torchvision's boxes, and
faulty files.
"""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.ops import box_convert

import train as train_script
from examples.shapes import SHAPE_NAMES
from examples.yolo_txt import YoloTxt
from kdmini.contracts import UserError
from kdmini.data.store import Store
from kdmini.detection.voc import VOC
from tests.test_train import run

NAMES = ["cat", "dog", "emu"]


def add(root, name, text=None, size=(40, 30), **saving):
    """One image, and its label file where there is a text, in the folder `train`."""
    for part in ("images", "labels"):
        (root / part / "train").mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (200, 30, 60)).save(root / "images/train" / name, **saving)
    if text is not None:
        label = root / "labels/train" / f"{name.rpartition('.')[0]}.txt"
        label.write_bytes(text if isinstance(text, bytes) else text.encode())


def one(root, text, **about):
    add(root, "a.jpg", text, **about)
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
            boxes = box_convert(torch.from_numpy(target["boxes_xyxy"]).double(), "xyxy", "cxcywh")
            parts = boxes / torch.tensor(image.shape[1::-1]).repeat(2)
            rows = zip(target["labels"], parts.tolist(), strict=True)
            lines = [
                " ".join([str(label), *(f"{part:.8f}" for part in row)]) for label, row in rows
            ]
            (root / f"labels/{split}/{name}.txt").write_text("\n".join(lines))
    (root / "data.yaml").write_text(
        f"path: ../elsewhere\nnc: 6\nnames: {json.dumps(SHAPE_NAMES)}\n"
    )
    return root


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_set_in_both_forms_gives_the_same_images_and_targets(converted, shapes, split):
    voc, yolo = (
        VOC(str(shapes), [split], names=SHAPE_NAMES),
        YoloTxt(str(converted), f"images/{split}"),
    )
    assert yolo.names == voc.names and len(yolo) == len(voc) == {"train": 24, "val": 8}[split]
    for index in range(len(voc)):
        (image, target), (expected_image, expected) = yolo[index], voc[index]
        np.testing.assert_array_equal(image, expected_image)
        np.testing.assert_allclose(target["boxes_xyxy"], expected["boxes_xyxy"], atol=1e-4)
        np.testing.assert_array_equal(target["labels"], expected["labels"])
        assert [target[key].dtype for key in ("boxes_xyxy", "labels", "difficult")] == [
            np.float32,
            np.int64,
            bool,
        ]
        assert (
            target["id"] == expected["id"].split("/")[1] + ".jpg" and not target["difficult"].any()
        )
    assert yolo.report() == ""


def test_a_run_trains_and_is_scored_on_it(converted, config_file, tmp_path):
    data = [
        f"data.{s}={{build: examples.yolo_txt:YoloTxt, images: images/{s}}}"
        for s in ("train", "val")
    ]
    run(
        train_script,
        "--config",
        config_file,
        f"data.root={converted}",
        *data,
        "train.epochs=2",
        "distill=null",
    )
    records = [
        json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    ]
    assert records[-1]["box"] > 0 and records[-1]["AP50-95"] >= 0 and len(records) == 2
    same = [data[0], data[1].replace("images/val", "images/train")]
    with pytest.raises(SystemExit, match="24 images are in train and val both"):
        run(
            train_script,
            "--config",
            config_file,
            f"data.root={converted}",
            *same,
            f"run={tmp_path / 'other'}",
        )


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
        assert (
            target["labels"].tolist() == [1, 0, 2] and target["difficult"].tolist() == [False] * 3
        )
    assert dataset.report() == "2 boxes under 1 px dropped"


def test_images_without_labels_are_background_and_endings_of_all_kinds_are_found(tmp_path):
    for name, text in {
        "b.png": None,
        "a.JPG": "",
        "a.png": "",
        "c.webp": b"\xef\xbb\xbf0 .5 .5 .5 .5\n",
    }.items():
        add(tmp_path, name, text)
    (tmp_path / "labels/train/classes.txt").write_text("cat\ndog\n")  # as some tools leave it there
    dataset = YoloTxt(str(tmp_path), names=NAMES)
    targets = [dataset[i][1] for i in range(len(dataset))]
    assert [target["id"] for target in targets] == ["a.JPG", "a.png", "b.png", "c.webp"]
    assert [target["boxes_xyxy"].shape for target in targets] == [(0, 4)] * 3 + [(1, 4)]
    assert all(target["labels"].dtype == np.int64 for target in targets)
    assert dataset.report() == "1 images without a label file"


@pytest.mark.parametrize(
    ("line", "said"),
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
def test_a_faulty_line_is_named(tmp_path, line, said):
    good = b"1 .5 .5 .5 .5\n"
    dataset = one(
        tmp_path, good + b"\n" + (line if isinstance(line, bytes) else line.encode()) + b"\n" + good
    )
    with pytest.raises(UserError) as error:
        dataset[0]
    message = str(error.value)
    assert "labels/train/a.txt:3: " in message and said in message and "\n" not in message


def test_all_faulty_files_are_told_at_once_and_can_be_left_out(tmp_path, capsys):
    for name in "abcde":
        add(tmp_path, f"{name}.png", "0 .5 .5 .5 .5")
    (tmp_path / "labels/train/a.txt").write_text("0 .5 .5")
    (tmp_path / "images/train/b.png").write_text("<html>")
    outside = tmp_path / "outside"
    outside.mkdir()
    for victim in ("images/train/c.png", "labels/train/d.txt"):
        shutil.move(tmp_path / victim, outside)
        (tmp_path / victim).symlink_to(outside / victim.rpartition("/")[2])
    dataset = YoloTxt(str(tmp_path), names=NAMES)
    with pytest.raises(UserError, match="4 of 5 images are bad"):
        Store(dataset, 32)
    told = [line for line in capsys.readouterr().err.splitlines() if str(tmp_path) in line]
    for line, part in zip(
        told,
        ["a.txt:1:", "b.png: not a usable", "train/c: image or", "train/d: image or"],
        strict=True,
    ):
        assert part in line
    assert [target["id"] for target in Store(dataset, 32, on_bad="skip").targets] == ["e.png"]


@pytest.mark.parametrize("orientation", [3, 6])
def test_an_image_that_exif_turns_is_refused_unless_it_is_background(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    with pytest.raises(UserError, match=r"a\.jpg: turned by EXIF"):
        one(tmp_path, "1 .5 .5 .5 .5", exif=exif)[0]
    assert one(tmp_path, "", exif=exif)[0][0].shape == (30, 40, 3)


def test_labels_follow_images_in_either_layout(tmp_path):
    add(tmp_path, "a.jpg", "2 .5 .5 .5 .5")
    (tmp_path / "valid").mkdir()
    for part in ("images", "labels"):
        os.rename(tmp_path / part / "train", tmp_path / "valid" / part)
    assert YoloTxt(str(tmp_path), "valid/images", NAMES)[0][1]["labels"].tolist() == [2]
    (tmp_path / "images" / "images").mkdir()
    (tmp_path / "images" / "labels").mkdir()
    add(tmp_path / "images", "b.jpg")
    with pytest.raises(UserError, match=r"images/images: holds no image"):
        YoloTxt(str(tmp_path), "images/images", NAMES)


@pytest.mark.parametrize(
    ("images", "said"),
    [
        ("../set/images/train", "is no folder in root"),
        ("/images/train", "is no folder in root"),
        ("pictures", "is no folder in root"),
        ("", "is no folder in root"),
        ("images/test", "images/test: no such folder"),
        ("images/bare", "labels/bare: no such folder"),
    ],
)
def test_a_wrong_folder_is_named(tmp_path, images, said):
    add(tmp_path / "set", "a.jpg")
    (tmp_path / "set/images/bare").mkdir()
    with pytest.raises(UserError, match=said):
        YoloTxt(str(tmp_path / "set"), images, NAMES)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("names: [cat, dog]", ["cat", "dog"]),
        ("names: {1: dog, 0: cat}", ["cat", "dog"]),
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
def test_names_come_from_a_yaml_file(tmp_path, text, expected):
    add(tmp_path, "a.jpg")
    if text:
        (tmp_path / "data.yaml").write_text(text)
    if isinstance(expected, list):
        assert YoloTxt(str(tmp_path)).names == expected
    else:
        with pytest.raises(UserError, match=expected):
            YoloTxt(str(tmp_path))
