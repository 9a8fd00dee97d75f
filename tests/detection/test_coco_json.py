"""COCO's form: against pycocotools and the VOC reader; files that are faulty."""

import contextlib
import io
import json
import os
import shutil
import unicodedata

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

import train as train_script
from examples.shapes import SHAPE_NAMES
from kdmini.contracts import BadObjects, UserError
from kdmini.data.loader import Augment, TrainLoader
from kdmini.data.store import Store
from kdmini.detection.coco_json import CocoJson
from kdmini.detection.truth import Boxes
from kdmini.detection.voc import VOC
from tests.commands import run

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
    """The generated set in this form; val has its annotations by area."""
    root = tmp_path_factory.mktemp("coco") / "set"
    shutil.copytree(shapes / "JPEGImages", root / "images")
    train = to_coco(VOC(str(shapes), ["train"], names=SHAPE_NAMES))
    val = to_coco(VOC(str(shapes), ["val"], names=SHAPE_NAMES))
    val["annotations"].sort(key=lambda row: row["area"])
    (root / "train.json").write_text(json.dumps(train))
    (root / "val.json").write_text(json.dumps(val))
    return root


def to_coco(voc):
    """Ids have gaps and another order than the names; difficult objects are crowds."""
    category_ids = [80 - 7 * label for label in range(len(voc.names))]
    images = []
    annotations = []
    for index in range(len(voc)):
        image, target = voc[index]
        image_id = 1000 - index
        file_name = target["id"].split("/")[1] + ".jpg"
        height, width = image.shape[:2]
        images.append({"id": image_id, "file_name": file_name, "height": height, "width": width})
        objects = zip(target["boxes_xyxy"], target["labels"], target["difficult"], strict=True)
        for box_xyxy, label, difficult in objects:
            x0, y0, x1, y1 = box_xyxy.tolist()
            annotation = {
                "id": len(annotations) + 1,
                "image_id": image_id,
                "category_id": category_ids[label],
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "area": (x1 - x0) * (y1 - y0),
                "iscrowd": int(difficult),
            }
            annotations.append(annotation)
    categories = [
        {"id": id, "name": name} for id, name in zip(category_ids, voc.names, strict=True)
    ]
    return {"images": images, "annotations": annotations, "categories": categories}


def test_it_reads_what_pycocotools_reads(converted):
    """On the set whose annotations stand in another order than their images."""
    dataset = CocoJson(str(converted), "val.json", "images")
    with contextlib.redirect_stdout(io.StringIO()):
        official = COCO(converted / "val.json")
    names = [official.cats[id]["name"] for id in sorted(official.getCatIds())]
    assert dataset.names == names
    assert len(dataset) == 8
    crowds = 0
    for index, (id, about) in enumerate(official.imgs.items()):
        image, target = dataset[index]
        rows = official.loadAnns(official.getAnnIds(imgIds=[id]))
        assert target["id"] == about["file_name"]
        assert image.shape == (about["height"], about["width"], 3)
        boxes_xywh = np.array([row["bbox"] for row in rows])
        corner = target["boxes_xyxy"][:, :2]
        np.testing.assert_array_equal(corner, boxes_xywh[:, :2])
        np.testing.assert_array_equal(target["boxes_xyxy"][:, 2:] - corner, boxes_xywh[:, 2:])
        classes = [official.cats[row["category_id"]]["name"] for row in rows]
        assert [dataset.names[label] for label in target["labels"]] == classes
        assert target["difficult"].tolist() == [bool(row["iscrowd"]) for row in rows]
        crowds += target["difficult"].sum()
    assert crowds == sum(row["iscrowd"] for row in official.anns.values())


def test_a_set_in_both_forms_gives_the_same_images_and_targets(converted, shapes):
    voc = VOC(str(shapes), ["train"], names=SHAPE_NAMES)
    coco = CocoJson(str(converted), "train.json", "images", names=SHAPE_NAMES)
    assert coco.names == voc.names
    assert len(coco) == len(voc)
    hidden = 0
    for index in range(len(voc)):
        image, target = coco[index]
        expected_image, expected = voc[index]
        np.testing.assert_array_equal(image, expected_image)
        for key in ("boxes_xyxy", "labels", "difficult"):
            np.testing.assert_array_equal(target[key], expected[key])
            assert target[key].dtype == expected[key].dtype
        hidden += expected["difficult"].sum()
    assert hidden > 0
    assert coco.report() == ""


def test_difficult_objects_and_crowds_become_the_same_regions(converted, shapes):
    forms = [
        (VOC, (str(shapes), ["train"], SHAPE_NAMES)),
        (CocoJson, (str(converted), "train.json", "images", SHAPE_NAMES)),
    ]
    still = Augment(mosaic=0, translate=0, scale=0)
    found = []
    for build, given in forms:
        assert build(*given).truth is Boxes
        store = Store(build(*given, difficult="ignore"), 64, workers=1)
        (_, targets) = next(TrainLoader(store, 24, 1, still).epoch(0))
        ignored = targets["ignored_xyxy"]
        difficult = sum(target["difficult"].sum() for target in store.targets)
        assert ignored.any(2).sum() == difficult > 2
        found.append((ignored, targets["boxes_xyxy"]))
    assert all(map(torch.equal, *found))


def test_the_photographs_of_two_splits_are_told_apart(converted):
    train = CocoJson(str(converted), "train.json", "images")
    val = CocoJson(str(converted), "val.json", "images")
    assert len(train.photographs) == len(train)
    assert not train.photographs & val.photographs


def test_a_run_on_it_is_the_run_on_the_voc_form_bit_for_bit(converted, config_file, tmp_path):
    command = ["--config", config_file, "train.epochs=1", "distill=null"]
    run(train_script, *command)
    # one folder holds both splits' images: train.py sees that none is in both
    overrides = [f"data.root={converted}", f"run={tmp_path / 'coco'}"]
    for split in ("train", "val"):
        section = {
            "build": "kdmini.detection.coco_json:CocoJson",
            "annotations": f"{split}.json",
            "images": "images",
            "names": SHAPE_NAMES,
        }
        overrides.append(f"data.{split}={json.dumps(section)}")
    run(train_script, *command, *overrides)

    expected = json.loads((tmp_path / "run/metrics.jsonl").read_text())
    record = json.loads((tmp_path / "coco/metrics.jsonl").read_text())
    assert {**record, "images/s": 0} == {**expected, "images/s": 0}
    assert record["loss/box"] > 0


def test_boxes_are_clipped_and_dropped_under_one_pixel(tmp_path):
    dog = {**OBJECT, "category_id": 90}
    cat = {**OBJECT, "category_id": 3}
    objects = [
        {**dog, "bbox": [-5, 20.5, 10, 19]},
        {**cat, "bbox": [40, 5, 10, 10]},
        {**cat, "bbox": [3, 3, 0, 9]},
        {**cat, "bbox": [39, 29, 1, 1]},
        {**cat, "bbox": [30, 0, 15, 2], "iscrowd": 1},
    ]
    dataset = one(tmp_path, objects)
    for _ in range(2):  # a second look is not a second loss
        _, target = dataset[0]
        assert target["boxes_xyxy"].tolist() == [[0, 20.5, 5, 30], [39, 29, 40, 30], [30, 0, 40, 2]]
        assert target["labels"].tolist() == [1, 0, 0]
        assert target["difficult"].tolist() == [False, False, True]
    assert dataset.report() == (
        "1 boxes under 1 px dropped in 1 images, 1 boxes mostly outside the picture in 1 images"
    )


def test_an_image_without_annotations_is_background(tmp_path):
    _, target = one(tmp_path, [])[0]
    assert target["boxes_xyxy"].shape == (0, 4)
    assert target["labels"].dtype == np.int64
    assert target["difficult"].dtype == bool
    assert target["id"] == "a.png"


def test_without_sizes_and_flags_and_with_text_ids_it_is_read_too(tmp_path):
    plain = {"image_id": "x", "category_id": 3, "bbox": [1, 2, 3, 4]}
    twins = [*CATEGORIES, {"id": 0, "name": "cat"}]  # two ids, one name: one class
    dataset = one(tmp_path, [plain], [{"id": "x", "file_name": "a.png"}], twins)
    assert dataset.names == ["cat", "dog"]
    _, target = dataset[0]
    assert target["boxes_xyxy"].tolist() == [[1, 2, 4, 6]]
    assert target["labels"].tolist() == [0]


@pytest.mark.parametrize(
    "change, message",
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
def test_a_faulty_annotation_is_named(tmp_path, change, message):
    with pytest.raises(UserError) as error:
        one(tmp_path, [{**OBJECT, **change}])[0]
    line = str(error.value)
    assert "set.json: " in line
    assert message in line
    assert "\n" not in line


@pytest.mark.parametrize(
    "change, message",
    [
        ({"bbox": [0.1, 0.2, 0.5, 0.5]}, "annotation 2: bbox [0.1, 0.2, 0.5, 0.5] is in parts of"),
        ({"bbox": [0, 0, 1, 1, 1]}, "annotation 2: bbox [0, 0, 1, 1, 1] is not x, y, width"),
    ],
)
def test_only_the_annotation_is_left_out_where_only_that_is_bad(tmp_path, change, message):
    dataset = one(tmp_path, [OBJECT, {**OBJECT, "id": 2, **change}])
    with pytest.raises(BadObjects) as error:
        dataset[0]
    assert message in str(error.value)
    store = Store(dataset, 32, on_bad="skip")
    assert store.targets[0]["boxes_xyxy"].tolist() == [[10, 5, 30, 15.5]]


@pytest.mark.parametrize("value, crowd", [(0, False), (1, True), (None, False), (True, True)])
def test_iscrowd_is_read_or_refused(tmp_path, value, crowd):
    _, target = one(tmp_path, [{**OBJECT, "iscrowd": value}])[0]
    assert target["difficult"].tolist() == [crowd]
    with pytest.raises(UserError, match="annotation 1: iscrowd is '1', not 0 or 1"):
        one(tmp_path, [{**OBJECT, "iscrowd": "1"}])


SAME_ID = {**IMAGE, "file_name": "b.png"}
SAME_FILE = {**IMAGE, "id": 8}
EMU = {"id": 3, "name": "emu"}


@pytest.mark.parametrize(
    "about, message",
    [
        ({"images": [IMAGE, SAME_ID]}, "images: id 7 is given 2 times"),
        ({"images": [IMAGE, SAME_FILE]}, "images: file_name 'a.png' is given 2 times"),
        ({"categories": [*CATEGORIES, EMU]}, "categories: id 3 is given 2 times"),
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
def test_a_faulty_table_is_named(tmp_path, about, message):
    with pytest.raises(UserError) as error:
        one(tmp_path, **about)
    assert "set.json: " in str(error.value)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "content, message",
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
def test_a_file_of_another_kind_is_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "set.json").write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        CocoJson(str(tmp_path), "set.json", "images")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


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
    assert target["id"] == "deep/b.png"
    assert len(target["labels"]) == 1


NO_SIZE = {"id": 7, "file_name": "a.png"}


@pytest.mark.parametrize(
    "orientation, image, verdict",
    [
        (3, IMAGE, "turned by EXIF: boxes may belong to either"),
        (6, IMAGE, ""),  # the file says that it means the pixels as stored
        (6, {**IMAGE, "width": 30, "height": 40}, "turned by EXIF: boxes may belong to either"),
        (6, NO_SIZE, "turned by EXIF: boxes may belong to either"),
        (1, NO_SIZE, ""),
        (1, {**IMAGE, "width": float("nan")}, ""),
        (1, {**IMAGE, "width": 0}, ""),
        (1, {**IMAGE, "width": 80, "height": 60}, "but 80x60 in its annotation: boxes may belong"),
        (1, {**IMAGE, "width": 55}, ""),
    ],
)
def test_the_rule_of_exif_and_sizes_is_that_of_voc(tmp_path, orientation, image, verdict):
    dataset = one(tmp_path, images=[image])
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (40, 30)).save(tmp_path / "images/a.png", exif=exif)
    if verdict:
        with pytest.raises(UserError, match=rf"a\.png: 40x30 pixels, {verdict}"):
            dataset[0]
        dataset.samples.as_stored = True
    assert dataset[0][1]["boxes_xyxy"].tolist() == [[10, 5, 30, 15.5]]


def test_files_and_classes_are_found_in_either_spelling(tmp_path):
    photo = "사진.png"
    apart = unicodedata.normalize("NFD", photo)
    categories = [{"id": 90, "name": unicodedata.normalize("NFD", "개")}]
    for listed, stored in ((photo, apart), (apart, photo)):
        root = tmp_path / str(len(listed))
        images = [{**IMAGE, "file_name": listed}]
        dataset = one(root, images=images, categories=categories, names=["새", "개"])
        (root / "images/a.png").rename(root / "images" / stored)
        assert dataset[0][1]["labels"].tolist() == [1]


def test_pixels_of_another_size_are_refused_and_left_out(tmp_path, capsys):
    images = [
        IMAGE,
        {**IMAGE, "id": 8, "file_name": "b.png"},
        {**IMAGE, "id": 9, "file_name": "c.png"},
    ]
    dataset = one(tmp_path, [OBJECT, {**OBJECT, "id": 2, "image_id": 8}], images)
    Image.new("RGB", (30, 40)).save(tmp_path / "images/b.png")
    (tmp_path / "images/c.png").write_text("<html>")
    with pytest.raises(UserError, match=r"b\.png: 30x40 pixels, but 40x30 in its"):
        dataset[1]
    assert [target["id"] for target in Store(dataset, 32, on_bad="skip").targets] == ["a.png"]
    warnings = capsys.readouterr().err
    assert "b.png: 30x40 pixels" in warnings
    assert "c.png: not a usable image" in warnings
