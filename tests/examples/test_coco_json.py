"""COCO's form: against pycocotools, against the VOC reader on one set in both forms, and faulty
files.
"""

import contextlib
import io
import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

import train as train_script
from examples.coco_json import CocoJson
from examples.shapes import SHAPE_NAMES
from kdmini.contracts import UserError
from kdmini.data.store import Store
from kdmini.detection.voc import VOC
from tests.test_train import run

CATEGORIES = [{"id": 90, "name": "dog"}, {"id": 3, "name": "cat"}]
IMAGE = {"id": 7, "file_name": "a.png", "width": 40, "height": 30}
OBJECT = {
    "id": 1,
    "image_id": 7,
    "category_id": 90,
    "bbox": [10, 5, 20, 10.5],
    "area": 210,
    "iscrowd": 0,
}


def one(root, objects=(OBJECT,), images=(IMAGE,), categories=CATEGORIES, size=(40, 30), **about):
    """A dataset of one image file, a.png, and that JSON."""
    (root / "images").mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (200, 30, 60)).save(root / "images/a.png")
    content = {"images": list(images), "annotations": list(objects), "categories": list(categories)}
    (root / "set.json").write_text(json.dumps(content))
    return CocoJson(str(root), "set.json", "images", **about)


@pytest.fixture(scope="module")
def converted(tmp_path_factory, shapes):
    """The generated set in this form: ids with gaps, in another order than the names; difficult
    objects as crowds.
    """
    root = tmp_path_factory.mktemp("coco") / "set"
    shutil.copytree(shapes / "JPEGImages", root / "images")
    ids = {name: 80 - 7 * label for label, name in enumerate(SHAPE_NAMES)}
    for split in ("train", "val"):
        voc = VOC(str(shapes), [split], names=SHAPE_NAMES)
        images, annotations = [], []
        for index in range(len(voc)):
            image, target = voc[index]
            about = {"id": 1000 - index, "file_name": target["id"].split("/")[1] + ".jpg"}
            images.append({**about, "height": image.shape[0], "width": image.shape[1]})
            for (x0, y0, x1, y1), label, difficult in zip(
                target["boxes_xyxy"].tolist(),
                target["labels"],
                target["difficult"].tolist(),
                strict=True,
            ):
                box = {
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": (x1 - x0) * (y1 - y0),
                    "iscrowd": int(difficult),
                }
                what = {
                    "id": len(annotations) + 1,
                    "image_id": 1000 - index,
                    "category_id": ids[SHAPE_NAMES[label]],
                }
                annotations.append({**what, **box})
        annotations.sort(key=lambda row: row["area"] if split == "val" else row["id"])
        categories = [{"id": number, "name": name} for name, number in ids.items()]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / f"{split}.json").write_text(json.dumps(content))
    return root


def test_it_reads_what_pycocotools_reads(converted):
    """The validation set, whose annotations stand in another order than their images."""
    dataset = CocoJson(str(converted), "val.json", "images")
    with contextlib.redirect_stdout(io.StringIO()):
        official = COCO(converted / "val.json")
    assert dataset.names == [
        official.cats[number]["name"] for number in sorted(official.getCatIds())
    ]
    crowds = 0
    for index, number in enumerate(official.imgs):
        image, target = dataset[index]
        rows = official.loadAnns(official.getAnnIds(imgIds=[number]))
        assert target["id"] == official.imgs[number]["file_name"]
        assert image.shape == (official.imgs[number]["height"], official.imgs[number]["width"], 3)
        boxes = np.array([row["bbox"] for row in rows])
        np.testing.assert_array_equal(target["boxes_xyxy"][:, :2], boxes[:, :2])
        np.testing.assert_array_equal(
            target["boxes_xyxy"][:, 2:] - target["boxes_xyxy"][:, :2], boxes[:, 2:]
        )
        named = [official.cats[row["category_id"]]["name"] for row in rows]
        assert [dataset.names[label] for label in target["labels"]] == named
        assert target["difficult"].tolist() == [bool(row["iscrowd"]) for row in rows]
        crowds += target["difficult"].sum()
    assert len(dataset) == 8 and crowds == sum(row["iscrowd"] for row in official.anns.values())


def test_a_set_in_both_forms_gives_the_same_images_and_targets(converted, shapes):
    voc = VOC(str(shapes), ["train"], names=SHAPE_NAMES)
    coco = CocoJson(str(converted), "train.json", "images", names=SHAPE_NAMES)
    assert coco.names == voc.names and len(coco) == len(voc)
    assert len(coco.photographs) == len(voc)
    assert not coco.photographs & CocoJson(str(converted), "val.json", "images").photographs
    for index in range(len(voc)):
        (image, target), (expected_image, expected) = coco[index], voc[index]
        np.testing.assert_array_equal(image, expected_image)
        for key in ("boxes_xyxy", "labels", "difficult"):
            np.testing.assert_array_equal(target[key], expected[key])
            assert target[key].dtype == expected[key].dtype
    assert (
        any(voc[index][1]["difficult"].any() for index in range(len(voc))) and coco.report() == ""
    )


def test_a_run_on_it_is_the_run_on_the_voc_form_bit_for_bit(converted, config_file, tmp_path):
    entry = (
        "{{build: examples.coco_json:CocoJson, annotations: {0}.json, images: images, names: {1}}}"
    )
    data = [
        f"data.{split}={entry.format(split, json.dumps(SHAPE_NAMES))}" for split in ("train", "val")
    ]
    short = ["train.epochs=1", "distill=null"]
    run(train_script, "--config", config_file, *short)
    # one folder holds both splits' images: train.py sees that none is in both
    run(
        train_script,
        "--config",
        config_file,
        *short,
        f"data.root={converted}",
        *data,
        f"run={tmp_path / 'coco'}",
    )
    ours, theirs = (
        json.loads((tmp_path / name / "metrics.jsonl").read_text()) for name in ("coco", "run")
    )
    assert {**ours, "images/s": 0} == {**theirs, "images/s": 0} and ours["box"] > 0


def test_boxes_are_clipped_and_dropped_and_an_image_may_have_none(tmp_path):
    boxes = [[-5, 20.5, 10, 50], [40, 5, 10, 10], [3, 3, 0, 9], [39, 29, 1, 1], [30, 0, 99999, 2]]
    objects = [
        {**OBJECT, "bbox": box, "category_id": 3 if i else 90, "iscrowd": int(i == 4)}
        for i, box in enumerate(boxes)
    ]
    dataset = one(tmp_path, objects)
    for _ in range(2):  # a second look is not a second loss
        _, target = dataset[0]
        assert target["boxes_xyxy"].tolist() == [[0, 20.5, 5, 30], [39, 29, 40, 30], [30, 0, 40, 2]]
        assert target["labels"].tolist() == [1, 0, 0] and target["difficult"].tolist() == [
            False,
            False,
            True,
        ]
    assert dataset.report() == "2 boxes under 1 px dropped"
    _, target = one(tmp_path / "bare", [])[0]
    assert target["boxes_xyxy"].shape == (0, 4) and target["labels"].dtype == np.int64
    assert target["difficult"].dtype == bool and target["id"] == "a.png"


def test_without_sizes_and_flags_and_with_text_ids_it_is_read_too(tmp_path):
    plain = {"image_id": "x", "category_id": 3, "bbox": [1, 2, 3, 4]}
    twins = [*CATEGORIES, {"id": 0, "name": "cat"}]  # two ids, one name: one class
    dataset = one(tmp_path, [plain], [{"id": "x", "file_name": "a.png"}], twins)
    assert dataset.names == ["cat", "dog"]
    _, target = dataset[0]
    assert target["boxes_xyxy"].tolist() == [[1, 2, 4, 6]] and target["labels"].tolist() == [0]


OTHER = {**IMAGE, "id": 8}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"bbox": [10, 5, 20]}, "annotation 1: bbox [10, 5, 20] is not x, y, width, height"),
        ({"bbox": [10, 5, -20, 10]}, "is not x, y, width, height"),
        ({"bbox": [10, 5, float("nan"), 10]}, "is not x, y, width, height"),
        ({"bbox": [float("-inf"), 5, 1, 10]}, "is not x, y, width, height"),
        ({"bbox": [10**400, 5, 1, 10]}, "is not x, y, width, height"),
        ({"bbox": ["10", 5, 1, 10]}, "is not x, y, width, height"),
        ({"bbox": None}, "annotations[0]: `bbox` is missing"),
        ({"image_id": 8}, "annotation 1: there is no image 8"),
        ({"category_id": 91}, "annotation 1: there is no category 91"),
        ({"image_id": [7]}, "annotations[0]: `image_id` is missing or of the wrong type"),
    ],
)
def test_a_faulty_annotation_is_named(tmp_path, change, said):
    with pytest.raises(UserError) as error:
        one(tmp_path, [{**OBJECT, **change}])[0]
    assert (
        "set.json: " in str(error.value)
        and said in str(error.value)
        and "\n" not in str(error.value)
    )


@pytest.mark.parametrize(
    ("about", "said"),
    [
        (
            {"images": [IMAGE, {**OTHER, "id": 7, "file_name": "b.png"}]},
            "images: id 7 is given 2 times",
        ),
        ({"images": [IMAGE, OTHER]}, "images: file_name 'a.png' is given 2 times"),
        (
            {"categories": [*CATEGORIES, {"id": 3, "name": "emu"}]},
            "categories: id 3 is given 2 times",
        ),
        ({"images": []}, "images: it is empty"),
        ({"categories": []}, "categories: it is empty"),
        ({"images": [{"id": 7}]}, "images[0]: `file_name` is missing"),
        ({"images": [7]}, "images[0]: `id` is missing"),
        (
            {"names": ["cat", "god"]},
            "annotation 1: unknown class 'dog', the nearest known is 'god'",
        ),
        ({"names": ["cat", "dog", "cat"]}, "names a class twice"),
    ],
)
def test_a_faulty_table_is_named(tmp_path, about, said):
    with pytest.raises(UserError) as error:
        one(tmp_path, **about)
    assert "set.json: " in str(error.value) and said in str(error.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"images": [],\n "annotations": [}', r"set.json:2: not a JSON file"),
        (b"", r"set.json:1: not a JSON file"),
        (b"[" * 200_000, r"set.json: not a JSON file"),
        (b"\x80\x81", r"set.json: not a JSON file"),
        (b"[1, 2]", "there is no list `categories`"),
        (b'{"categories": {"1": "cat"}}', "there is no list `categories`"),
        (None, "set.json: cannot be read"),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path, content, said):
    if content is not None:
        (tmp_path / "set.json").write_bytes(content)
    with pytest.raises(UserError, match=said) as error:
        CocoJson(str(tmp_path), "set.json", "images")
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize(
    "name",
    [
        "../secret.png",
        "../images2.png",
        "/etc/passwd",
        "link.png",
        "folder",
        "pipe",
        "b.png",
        "",
        "a\0.png",
        "\ud800.png",
        "x" * 5000,
    ],
)
def test_no_file_outside_the_folder_is_opened(tmp_path, name):
    one(tmp_path)
    for path in (tmp_path / "secret.png", tmp_path / "images2.png"):
        Image.new("RGB", (40, 30)).save(path)
    (tmp_path / "images/link.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "images/folder").mkdir()
    os.mkfifo(tmp_path / "images/pipe")
    dataset = one(tmp_path, images=[{**IMAGE, "file_name": name}])
    with pytest.raises(UserError, match=r"set\.json: no file '.* in .*/images; put it there"):
        dataset[0]


def test_a_name_below_the_folder_is_followed(tmp_path):
    one(tmp_path)
    (tmp_path / "images/deep").mkdir()
    shutil.move(tmp_path / "images", tmp_path / "disk")  # the folder itself may be a link
    (tmp_path / "images").symlink_to(tmp_path / "disk")
    shutil.copy(tmp_path / "disk/a.png", tmp_path / "disk/deep/b.png")
    _, target = one(tmp_path, images=[{**IMAGE, "file_name": "deep/b.png"}])[0]
    assert target["id"] == "deep/b.png" and len(target["labels"]) == 1


def test_pixels_of_another_size_are_refused_and_left_out(tmp_path, capsys):
    small = [
        {**IMAGE},
        {**IMAGE, "id": 8, "file_name": "b.png"},
        {**IMAGE, "id": 9, "file_name": "c.png"},
    ]
    dataset = one(tmp_path, images=small)
    Image.new("RGB", (30, 40)).save(tmp_path / "images/b.png")
    (tmp_path / "images/c.png").write_text("<html>")
    with pytest.raises(UserError, match=r"b\.png: 30x40 pixels, but 40x30 in set\.json"):
        dataset[1]
    assert [target["id"] for target in Store(dataset, 32, on_bad="skip").targets] == ["a.png"]
    told = capsys.readouterr().err
    assert "b.png: 30x40 pixels" in told and "c.png: not a usable image" in told
