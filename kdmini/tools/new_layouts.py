"""How the ground truth in a folder is laid out: which data sets of kdmini read it.

Each function gets the files and returns what it has found, or None where they are of another
layout.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from kdmini.contracts import UserError
from kdmini.data.folders import ANNOTATIONS, composed
from kdmini.data.pictures import opened
from kdmini.data.voc import VOC_NAMES
from kdmini.detection.voc_xml import read_annotation
from kdmini.detection.yolo_txt import LABELS, labels_beside, read_labels, read_names
from kdmini.segmentation.masks import FORMATS, check_holds_indices
from kdmini.segmentation.truth import VOID
from kdmini.segmentation.voc import SEGMENTED_NAMES
from kdmini.tools.new_tree import HERE, SHARE, Tree, pair, split_of

Task = Literal["boxes", "masks", "classes"]
Sections = Iterator[tuple[dict[str, Any], dict[str, Any]]]  # what train and val say

LISTS = "ImageSets"
ENDINGS_OF_NAMES = (".yaml", ".yml", "classes.txt", ".names")
MANY = 10_000  # classes, where it is not known yet how many
# folders that hold pictures, and are no classes
NOT_CLASSES = {"images", "image", "img", "imgs", "jpegimages", "labels", "annotations", "masks"}


class Found(NamedTuple):
    """A data set that is there."""

    task: Task
    layout: str  # in words
    train: dict[str, Any]  # the section of the config, but for root
    val: dict[str, Any]
    counts: dict[str, int]  # class -> objects, or images
    counted: str  # objects or images


# --- boxes


def coco_json(tree: Tree) -> Found | None:
    contents = {}
    for path in tree.paths((".json",)):
        content = coco_content(path)
        if content:
            contents[path.relative_to(tree.root).as_posix()] = content
    if not contents:
        return None
    chosen = pair(contents) or tuple(contents)
    if len(chosen) > 1 and not pair(contents):
        raise UserError(
            f"--data {tree.root}: which of {', '.join(contents)} is to learn from? Put train and "
            "val into their names"
        )

    counts: Counter[str] = Counter()
    order: dict[str, int] = {}  # class -> id of its category
    entries = []
    for name in chosen:
        content = contents[name]
        ids = [thing["category_id"] for thing in content["annotations"]]
        name_of = {row["id"]: composed(row["name"]) for row in content["categories"]}
        counts.update(name_of[id] for id in ids if id in name_of)
        order |= {class_name: id for id, class_name in name_of.items()}
        images = folder_of(tree, name, content["images"][0]["file_name"])
        entries.append({"annotations": name, "images": images})
    names = sorted(counts, key=order.__getitem__)
    base = {"build": "kdmini.detection.coco_json:CocoJson", "names": names}
    val = {**base, **entries[1]} if len(entries) == 2 else SHARE
    return Found("boxes", "COCO JSON", {**base, **entries[0]}, val, dict(counts), "objects")


def coco_content(path: Path) -> dict[str, Any]:
    """Empty where it is not of instances."""
    try:
        content = json.loads(path.read_bytes())
        images = [row["file_name"] for row in content["images"]]
        ids = [row["category_id"] for row in content["annotations"] if row["bbox"]]
        names = [(row["id"], row["name"] + "") for row in content["categories"]]
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return {}
    return content if images and ids and names else {}


def folder_of(tree: Tree, annotations: str, image: str) -> str:
    """The folder, from root, in which a JSON's images are: beside it, or where one is found."""
    beside = os.path.dirname(annotations) or HERE
    for folder in (beside, *tree.files):
        if (tree.root / folder / image).is_file():
            return folder
    raise UserError(
        f"{tree.root / annotations}: its image {image!r} is in no folder of {tree.root}; put the "
        "images there"
    )


def voc_xml(tree: Tree) -> Found | None:
    """Side by side, in two folders, in a folder for each split, in folders in folders."""
    counts: Counter[str] = Counter()
    for path in tree.paths(ANNOTATIONS):
        try:
            counts.update(read_annotation(path).classes)
        except UserError:  # train.py names it
            continue
    if not counts:
        return None
    base = {"build": "kdmini.detection.voc:VOC", "names": sorted(counts)}
    faults = []
    for train, val in xml_sections(tree):
        learned = {**base, **train}
        validating = val if val is SHARE else {**base, **val}
        try:
            tree.try_set(learned)
            if val is not SHARE:
                tree.try_set(validating)
        except UserError as error:
            faults.append(error)
            continue
        return Found("boxes", "VOC XML", learned, validating, dict(counts), "objects")
    raise faults[0]


def xml_sections(tree: Tree) -> Sections:
    """Those that may be meant, the likeliest first. Raises UserError where the folder holds
    others that are laid out like VOC.
    """
    folders = {folder.partition("/")[0] for folder in tree.having(ANNOTATIONS)}
    for splits, deep in ((lists_in(tree, "Main"), False), (folders, False), (folders, True)):
        if chosen := pair(splits):
            below = {"recursive": True} if deep else {}
            yield {"splits": [chosen[0]], **below}, {"splits": [chosen[1]], **below}
    above = [folder.removesuffix("/Annotations") for folder in tree.having(ANNOTATIONS)]
    inside = [folder for folder in above if f"{folder}/JPEGImages" in tree.files]
    if inside:
        raise UserError(
            f"--data {tree.root}: laid out like VOC in {', '.join(inside)}; name one such folder"
        )
    yield {}, SHARE
    yield {"recursive": True}, SHARE


def lists_in(tree: Tree, kind: str) -> set[str]:
    """The lists of splits; those of single classes have `_` in their names."""
    names = tree.files.get(f"{LISTS}/{kind}", [])
    return {
        name.removesuffix(".txt") for name in names if name.endswith(".txt") and "_" not in name
    }


def yolo_txt(tree: Tree) -> Found | None:
    texts = tree.having(LABELS)
    labels_of: dict[str, list[Path]] = {}  # folder of images -> their files
    for folder, images in tree.images().items():
        place = labels_beside(folder).as_posix()
        stems = {os.path.splitext(name)[0] for name in images}
        paired = [name for name in texts.get(place, []) if os.path.splitext(name)[0] in stems]
        if paired:
            labels_of[folder] = [tree.root / place / name for name in paired]
    rows: Counter[int] = Counter()
    for path in (path for paths in labels_of.values() for path in paths):
        rows.update(read_labels(str(path), MANY)[0].tolist())
    if not rows:
        return None

    names = names_in(tree)
    if not names:
        raise UserError(
            f"--data {tree.root}: there are labels of YOLO, and no file that names their classes; "
            "add data.yaml with `names: [...]`, or classes.txt with one a line"
        )
    base: dict[str, Any] = {"build": "kdmini.detection.yolo_txt:YoloTxt", "names": names}
    counts = {name: rows[label] for label, name in enumerate(names)}
    chosen = pair(labels_of)
    if chosen:
        train, validating = ({**base, "images": folder} for folder in chosen)
        return Found("boxes", "YOLO text", train, validating, counts, "objects")
    above = os.path.commonpath(labels_of) if len(labels_of) > 1 else next(iter(labels_of))
    deep = {"recursive": True} if len(labels_of) > 1 else {}
    train = {**base, "images": above or HERE, **deep}
    return Found("boxes", "YOLO text", train, SHARE, counts, "objects")


def names_in(tree: Tree) -> list[str]:
    """The classes that a file names, the highest of such files; empty where there is none."""
    for path in tree.paths(ENDINGS_OF_NAMES):
        try:
            if path.suffix == ".names":
                return path.read_text("utf-8").split()
            return read_names(path)
        except (UserError, OSError, ValueError):
            continue
    return []


# --- masks


def voc_masks(tree: Tree) -> Found | None:
    masks = tree.having((".png",)).get("SegmentationClass")
    if not masks:
        return None
    stems = {os.path.splitext(name)[0] for name in masks}
    shared = {}
    for folder, images in tree.images().items():
        shared[folder] = len(stems & {os.path.splitext(name)[0] for name in images})
    images_at = max(shared, key=shared.__getitem__)
    counts = count_indices([tree.root / "SegmentationClass" / name for name in masks])
    names = names_of_masks(tree, int(np.flatnonzero(counts)[-1]))

    base: dict[str, Any] = {"build": "kdmini.segmentation.voc:VOC", "names": names}
    if images_at != "JPEGImages":
        base["images"] = images_at
    chosen = pair(lists_in(tree, "Segmentation"))
    splits = [[split] for split in chosen] if chosen else [["all"]]
    sections = [{**base, "splits": split} for split in splits]
    val = sections[1] if chosen else SHARE
    of_names = dict(zip(names, counts.tolist(), strict=False))
    return Found("masks", "masks in SegmentationClass", sections[0], val, of_names, "images")


def count_indices(paths: list[Path]) -> np.ndarray:
    """(255,) the images that have each index. Raises UserError where no mask can be read."""
    counts = np.zeros(VOID, int)
    fault: UserError | None = None
    for path in paths:
        try:
            with opened(path, FORMATS) as image:
                check_holds_indices(str(path), image)
                counts[np.setdiff1d(np.asarray(image), [VOID])] += 1
        except UserError as error:  # train.py names it
            fault = fault or error
    if not counts.any():
        raise fault or UserError(f"{paths[0].parent}: the masks are void; correct them")
    return counts


def names_of_masks(tree: Tree, highest: int) -> list[str]:
    """VOC's, where the objects beside the masks are of its classes; else numbers."""
    boxes = voc_xml(tree)
    if boxes and highest < len(SEGMENTED_NAMES) and set(boxes.counts) <= set(VOC_NAMES):
        return SEGMENTED_NAMES
    return ["background", *(f"class {index}" for index in range(1, highest + 1))]


# --- classes


def class_folders(tree: Tree) -> Found | None:
    """train/cat/a.jpg val/cat/b.jpg, or cat/a.jpg."""
    images = {folder: len(names) for folder, names in tree.images().items()}
    deep = [folder for folder in images if folder.count("/") == 1]
    build = {"build": "kdmini.classification.folders:Folders"}
    chosen = pair({folder.partition("/")[0] for folder in deep})
    train: dict[str, Any] = {**build, "split": chosen[0] if chosen else HERE}
    val: dict[str, Any] = {**build, "split": chosen[1]} if chosen else SHARE
    if chosen:
        places = [folder for folder in deep if folder.startswith(f"{chosen[0]}/")]
    else:
        places = [folder for folder in images if "/" not in folder and folder != HERE]
        if any(folder.lower() in NOT_CLASSES or split_of(folder) for folder in places):
            return None
    counts = {os.path.basename(folder): images[folder] for folder in places}
    if len(counts) < 2:
        return None
    return Found("classes", "a folder for each class", train, val, counts, "images to learn from")


LAYOUTS: dict[Task, list[Callable[[Tree], Found | None]]] = {
    "boxes": [coco_json, voc_xml, yolo_txt],
    "masks": [voc_masks],
    "classes": [class_folders],
}


def look_at(tree: Tree, tasks: list[Task]) -> Found:
    """What is there for one of the tasks. Raises UserError."""
    for task in tasks:
        for layout in LAYOUTS[task]:
            if found := layout(tree):
                return found
    images = sum(map(len, tree.images().values()))
    raise UserError(
        f"--data {tree.root}: {images:,} images, and nothing that says what is on them; looked "
        "for COCO JSON, VOC XML, YOLO text, masks in SegmentationClass, and a folder of images "
        "for each class"
    )
