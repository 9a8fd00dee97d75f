"""docs/own.md: its files are copied into a folder, and trained with."""

import csv
import importlib
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import eval as eval_script
import train as train_script
from examples.shapes import SHAPE_NAMES as NAMES
from kdmini import config
from kdmini.contracts import UserError
from kdmini.detection.voc import VOC
from kdmini.sections import make_sets
from tests.commands import newest, records, run
from tests.conftest import ROOT, write_config
from tests.docs.pages import blocks

PAGE = (ROOT / "docs" / "own.md").read_text()
FILES = {"csv_boxes", "centres", "dino", "recall", "smooth_l1", "adam"}
Scenes = dict[str, list[tuple[np.ndarray, Any]]]  # split -> image and target of each scene


def fragment(text: str) -> dict[str, Any]:
    """The one block of YAML that has this text in it."""
    found = [block for block in blocks(PAGE, "yaml") if text in block]
    assert len(found) == 1, text
    return config.parse(found[0], "own.md")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the page's files, which is that of the process."""
    for block in blocks(PAGE, "python"):
        name = block.partition(".py\n")[0].removeprefix("# ")
        (tmp_path / f"{name}.py").write_text(block)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield tmp_path
    for name in FILES:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def scenes(shapes: Path) -> Scenes:
    """Those of the usual set."""
    pairs = {}
    for split in ("train", "val"):
        dataset = VOC(str(shapes), [split], NAMES)
        pairs[split] = [dataset[i] for i in range(len(dataset))]
    return pairs


def objects(target: Any) -> Iterator[tuple[int, list[float]]]:
    """Label and corners of each object."""
    labels = target["labels"].tolist()
    boxes = target["boxes_xyxy"].tolist()
    yield from zip(labels, boxes, strict=True)


def write_table(folder: Path, scenes: Scenes) -> None:
    folder.mkdir(parents=True)
    for split, pairs in scenes.items():
        rows: list[list[Any]] = [["file", "class", "xmin", "ymin", "xmax", "ymax"]]
        for number, (image, target) in enumerate(pairs):
            name = f"{split}-{number:02}.png"
            Image.fromarray(image).save(folder / name)
            for label, box in objects(target):
                rows.append([name, NAMES[label], *box])
        with (folder / f"{split}.csv").open("w", newline="") as file:
            csv.writer(file).writerows(rows)


def write_yolo(folder: Path, scenes: Scenes) -> None:
    for split, pairs in scenes.items():
        images = folder / "images" / split
        labels = folder / "labels" / split
        images.mkdir(parents=True)
        labels.mkdir(parents=True)
        for number, (image, target) in enumerate(pairs):
            name = f"{number:02}"
            Image.fromarray(image).save(images / f"{name}.png")
            height, width = image.shape[:2]
            lines = []
            for label, (x1, y1, x2, y2) in objects(target):
                cx = (x1 + x2) / 2 / width
                cy = (y1 + y2) / 2 / height
                w = (x2 - x1) / width
                h = (y2 - y1) / height
                lines.append(f"{label} {cx} {cy} {w} {h}")
            (labels / f"{name}.txt").write_text("\n".join(lines))
    (folder / "data.yaml").write_text(f"names: {NAMES}")


def write_coco(folder: Path, scenes: Scenes) -> None:
    """Category ids with gaps."""
    categories = []
    for label, name in enumerate(NAMES):
        categories.append({"id": 10 * label, "name": name})
    for split, pairs in scenes.items():
        (folder / split).mkdir(parents=True)
        images = []
        annotations: list[dict[str, Any]] = []
        for number, (image, target) in enumerate(pairs):
            name = f"{number:02}.png"
            Image.fromarray(image).save(folder / split / name)
            images.append({"id": number, "file_name": name})
            for label, (x1, y1, x2, y2) in objects(target):
                annotation = {
                    "id": len(annotations),
                    "image_id": number,
                    "category_id": 10 * label,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                }
                annotations.append(annotation)
        content = {"images": images, "categories": categories, "annotations": annotations}
        (folder / f"{split}.json").write_text(json.dumps(content))


WRITERS = {"YoloTxt": write_yolo, "CocoJson": write_coco, "CsvBoxes": write_table}


def with_names(data: dict[str, Any]) -> dict[str, Any]:
    """The page's section `data`, for the generated shapes."""
    for split in ("train", "val"):
        if isinstance(data[split].get("names"), list):
            data[split]["names"] = NAMES
    return data


def write_settings(folder: Path, shapes: Path, *fragments: dict[str, Any]) -> Path:
    """A config of one epoch with the page's sections in the place of the usual ones."""
    path = write_config(folder, shapes)
    settings = config.load(path)
    for sections in fragments:
        settings |= sections
    settings["train"]["epochs"] = 1
    settings["data"]["imgsz"] = 64
    path.write_text(yaml.safe_dump(settings))
    return path


def test_every_block_is_used() -> None:
    names = {block.partition(".py\n")[0].removeprefix("# ") for block in blocks(PAGE, "python")}
    assert names == FILES
    assert len(blocks(PAGE, "yaml")) == 14


def masks_of(dataset: Any) -> dict[str, np.ndarray]:
    """Name of an image -> its mask."""
    targets = [dataset[index][1] for index in range(len(dataset))]
    return {Path(target["id"]).name: target["mask"] for target in targets}


def test_masks_are_read_in_both_layouts(here: Path, shapes: Path) -> None:
    usual = fragment("segmentation.voc:VOC, splits: [train]")["data"]
    for split in ("train", "val"):
        usual[split]["names"] = ["ground", *NAMES]
    shutil.copytree(shapes, here / usual["root"])
    sets = config.call(make_sets, usual, "data")
    assert (len(sets.train), len(sets.val)) == (24, 8)

    added = fragment("train_aug.txt")["data"]
    root = here / added["root"]
    shutil.copytree(shapes, root)
    (root / "SegmentationClass").rename(root / "SegmentationClassAug")
    (root / "SegmentationClass").mkdir()
    for name in (root / "ImageSets/Segmentation/val.txt").read_text().split():
        shutil.copy(root / f"SegmentationClassAug/{name}.png", root / "SegmentationClass")
    every = [f"{path.stem}\n" for path in (root / "JPEGImages").iterdir()]
    (here / added["train"]["splits"][0]).write_text("".join(every))
    again = config.call(make_sets, added, "data")
    assert (len(again.train), len(again.val)) == (24, 8)
    masks = masks_of(sets.train)
    for name, mask in masks_of(again.train).items():
        assert np.array_equal(mask, masks[name])


@pytest.mark.parametrize("kind", ["VOC", "YoloTxt", "CocoJson", "CsvBoxes"])
def test_a_set_is_read_in_each_layout(kind: str, here: Path, shapes: Path, scenes: Scenes) -> None:
    words = "detection.voc:VOC, splits" if kind == "VOC" else f":{kind}"
    section = with_names(fragment(words)["data"])
    root = here / section["root"]
    if kind == "VOC":
        shutil.copytree(shapes, root)
    else:
        WRITERS[kind](root, scenes)
    sets = config.call(make_sets, section, "data")
    for split, dataset in (("train", sets.train), ("val", sets.val)):
        assert dataset.names == NAMES
        assert len(dataset) == len(scenes[split])
        for i, (image, target) in enumerate(scenes[split]):
            read_image, read_target = dataset[i]
            assert np.array_equal(read_image, image)
            assert np.array_equal(read_target["labels"], target["labels"])
            np.testing.assert_allclose(read_target["boxes_xyxy"], target["boxes_xyxy"], atol=1e-4)


def test_images_with_xml_files_are_divided(here: Path, shapes: Path) -> None:
    section = fragment("share: 0.2")["data"]
    section["train"]["names"] = NAMES
    shutil.copytree(shapes / "JPEGImages", here / section["root"])
    shutil.copytree(shapes / "Annotations", here / section["root"], dirs_exist_ok=True)
    sets = config.call(make_sets, section, "data")
    assert (len(sets.train), len(sets.val)) == (26, 6)


def test_a_table_may_have_images_without_objects_and_says_which_lines_are_wrong(
    here: Path,
) -> None:
    Image.new("RGB", (64, 48)).save(here / "empty.png")
    good = "file,class,xmin,ymin,xmax,ymax\n"
    build = config.locate("csv_boxes:CsvBoxes", "own.md")
    (here / "good.csv").write_text(good + "empty.png,,,,,\nempty.png\n")
    image, target = build(str(here), "good.csv", ["cat"])[0]
    assert image.shape == (48, 64, 3)
    assert target["boxes_xyxy"].shape == (0, 4)
    assert target["boxes_xyxy"].dtype == np.float32
    assert target["labels"].shape == (0,)

    for line in ("empty.png,cow,1,2,3,4", "empty.png,cat,one,2,3,4", "empty.png,cat,1"):
        (here / "bad.csv").write_text(f"{good}{line}\n")
        with pytest.raises(UserError, match=r"^empty\.png: .*; correct its lines in the table$"):
            build(str(here), "bad.csv", ["cat"])[0]
    (here / "bad.csv").write_text("file,class,x,y\nempty.png,cat,1,2\n")
    with pytest.raises(UserError, match=r"^empty\.png: 'xmin'"):
        build(str(here), "bad.csv", ["cat"])[0]


def test_this_much_xml_is_enough(here: Path) -> None:
    [xml] = blocks(PAGE, "xml")
    for folder, name, content in (
        ("Annotations", "a.xml", xml),
        ("ImageSets/Main", "train.txt", "a"),
    ):
        (here / folder).mkdir(parents=True)
        (here / folder / name).write_text(content)
    (here / "JPEGImages").mkdir()
    Image.new("RGB", (64, 64)).save(here / "JPEGImages" / "a.jpg")
    _, target = VOC(str(here), ["train"], ["cat"])[0]
    assert target["boxes_xyxy"].tolist() == [[0, 0, 32, 48]]
    assert not target["difficult"].any()


def test_data_term_and_metric_of_ones_own(here: Path, shapes: Path, scenes: Scenes) -> None:
    data = with_names(fragment(":CsvBoxes")["data"])
    write_table(here / data["root"], scenes)
    sections = ({"data": data}, fragment(":SmoothL1"), fragment(":Recall"))
    path = write_settings(here, shapes, *sections)
    run(train_script, "--config", path)
    last = records(here / "run")[-1]
    assert last["lambda/smooth_l1"] == 2.0
    assert 0 < last["loss/smooth_l1"] < 3 * 1 * 0.5 * 2.0  # taps of variance 1, weight, lambda
    assert 0 <= last["score/recall"] <= 1
    assert (here / "run" / "best.pt").exists()


def test_the_detector_that_teaches_is_that_of_the_config() -> None:
    settings = config.load(ROOT / "configs/voc_retinanet.yaml")
    for name, section in fragment("retinanet").items():
        assert settings[name] == section


def test_recall_counts_what_is_found(here: Path, scenes: Scenes) -> None:
    recall = importlib.import_module("recall").Recall()
    targets = [target for _, target in scenes["val"]]
    exact = [
        {
            "boxes_xyxy": torch.from_numpy(target["boxes_xyxy"]),
            "labels": torch.from_numpy(target["labels"]),
            "scores": torch.ones(len(target["labels"])),
        }
        for target in targets
    ]
    nothing = [{name: value[:0] for name, value in one.items()} for one in exact]
    recall.update(exact, targets)
    assert recall.compute() == {"recall": 1.0}
    recall.update(nothing, targets)
    assert recall.compute() == {"recall": 0.5}


def test_a_model_of_ones_own_learns_and_is_evaluated(
    here: Path, shapes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_settings(here, shapes, fragment(":Centres"))
    run(train_script, "--config", path, "train.epochs=30", "train.val_every=30")
    lines = records(here / "run")
    assert lines[-1]["loss/box"] < 0.7 * lines[1]["loss/box"]
    assert lines[-1]["loss/cls"] < lines[1]["loss/cls"]
    run(eval_script, "--config", path, "--weights", here / "run" / "best.pt")
    assert "all classes" in capsys.readouterr().out


@pytest.mark.parametrize("optimizer", ["adam:make_adam", "adamw"])
def test_another_optimiser_resumes(here: Path, shapes: Path, optimizer: str) -> None:
    """Bit for bit."""
    path = write_settings(here, shapes)
    settings = fragment("make_adam")["train"]
    changes = ["train.epochs=2", "train.lr0=0.001", "train.warmup_bias_lr=0"]
    changes += ["teacher=null", "distill=null", "data.limit=16"]
    if optimizer == "adamw":
        changes.append("train.optimizer=adamw")
    else:
        assert settings["optimizer"] == {"build": optimizer}
        changes.append(f"train.optimizer={{build: {optimizer}}}")
    run(train_script, "--config", path, *changes)
    whole = newest(here / "run")
    assert "exp_avg" in whole["optimizer"]["state"][0]

    for checkpoint in sorted((here / "run" / "ckpt").glob("*.pt"))[1:]:
        checkpoint.unlink()
    run(train_script, "--resume", here / "run")
    again = newest(here / "run")
    for name, value in whole["student"].items():
        assert np.array_equal(value.numpy(), again["student"][name].numpy()), name
