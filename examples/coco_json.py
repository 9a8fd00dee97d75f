"""COCO's form: a JSON of `images`, `categories`, `annotations`, and a folder of images.

    data:
      root: data/coco
      train: &set
        build: examples.coco_json:CocoJson
        annotations: annotations/instances_train.json  # in root
        images: train                                  # with train/000000000009.jpg
      val: {<<: *set, annotations: annotations/instances_val.json, images: val}

`names` lists the classes in the order of their labels; without it they are the file's,
by category id. Ids, which may have gaps, become labels by name. `iscrowd: 1` counts as
difficult: not trained on, neither hit nor miss. Boxes are used, masks are not. An image
without annotations is background.

Legend: G objects of an image.
"""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kdmini.contracts import UserError
from kdmini.data.pictures import decode
from kdmini.data.voc import nearest
from kdmini.detection.truth import Boxes, Target

MIN_SIDE = 1  # pixels; a box with less inside the image is dropped
LARGEST = 1e9  # pixels, of a number in a box; what is beyond is a mistake


class Annotation(NamedTuple):
    """One object, as the file has it."""

    id: Any
    label: int
    box: list  # a bbox, not checked yet
    crowd: bool


Objects = dict[int | str, list[Annotation]]  # by image id


class CocoJson:
    """The images of one JSON, as a `kdmini.contracts.Dataset`.

    Raises UserError for a file that is no such JSON; for an image that is missing or
    wrong, or a box, when the image is asked for.
    """

    truth = Boxes

    def __init__(self, root: str, annotations: str, images: str, names: list[str] | None = None):
        base = Path(root).expanduser().absolute()
        self.path = base / annotations
        self.folder = os.path.realpath(base / images)
        content = read_json(self.path)

        categories = read_rows(self.path, content, "categories", id=int, name=str)
        check_unique(self.path, "categories", categories, "id")
        name_of = {row["id"]: row["name"] for row in categories}
        if names is None:
            names = list(dict.fromkeys(name_of[id] for id in sorted(name_of)))
        self.names = list(names)
        if not self.names or len(set(self.names)) < len(self.names):
            raise UserError(f"{self.path}: `names` is empty or names a class twice: {self.names}")

        self.images = read_rows(self.path, content, "images", id=int | str, file_name=str)
        check_unique(self.path, "images", self.images, "id")
        check_unique(self.path, "images", self.images, "file_name")
        self.objects = self._objects_by_image(content, name_of)
        self.photographs = {(self.folder, image["file_name"]) for image in self.images}
        self.dropped: dict[int, int] = {}  # index -> boxes without a pixel inside the image

    def _objects_by_image(self, content: Any, name_of: dict[int, str]) -> Objects:
        """Image id -> annotations, which must fit images, categories and names."""
        objects: Objects = {image["id"]: [] for image in self.images}
        label_of = {name: label for label, name in enumerate(self.names)}
        fields = {"image_id": int | str, "category_id": int, "bbox": list}
        for row in read_rows(self.path, content, "annotations", **fields):
            id = row.get("id")
            where = self._where(id)
            if row["image_id"] not in objects:
                raise UserError(
                    f"{where}: there is no image {row['image_id']!r}; remove it or add the image"
                )
            if row["category_id"] not in name_of:
                raise UserError(
                    f"{where}: there is no category {row['category_id']}; correct `categories`"
                )
            name = name_of[row["category_id"]]
            if name not in label_of:
                near = nearest(name, self.names)
                raise UserError(
                    f"{where}: unknown class {name!r}, the nearest known is {near!r}; "
                    "add it to `names:`"
                )
            crowd = row.get("iscrowd") == 1
            annotation = Annotation(id, label_of[name], row["bbox"], crowd)
            objects[row["image_id"]].append(annotation)
        return objects

    def _where(self, id: Any) -> str:
        return f"{self.path}: annotation {id!r}"

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[np.ndarray, Target]:
        """-> image (H, W, 3) uint8 RGB, and its objects, clipped to the image.

        Objects of which less than MIN_SIDE is left are dropped.
        """
        about = self.images[index]
        name = about["file_name"]
        path = self.locate(name)
        if not path:
            raise UserError(
                f"{self.path}: no file {name!r} in {self.folder}; put it there, not a link"
            )
        objects = self.objects[about["id"]]
        boxes = [check_box(self._where(item.id), item.box) for item in objects]
        boxes_xywh = np.array(boxes).reshape(-1, 4)

        image = decode(path)
        height, width = image.shape[:2]
        stated_width = about.get("width") or width
        stated_height = about.get("height") or height
        if (stated_width, stated_height) != (width, height):
            raise UserError(
                f"{path}: {width}x{height} pixels, "
                f"but {stated_width}x{stated_height} in {self.path.name}; "
                "store it as it was annotated, turned if EXIF says so"
            )

        corners = np.hstack([boxes_xywh[:, :2], boxes_xywh[:, :2] + boxes_xywh[:, 2:]])
        boxes_xyxy = corners.clip(0, [width, height, width, height]).astype(np.float32)
        sides = boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]
        keep = (sides >= MIN_SIDE).all(1)  # (G,)
        if not keep.all():
            self.dropped[index] = int((~keep).sum())  # by index, so that threads need no lock
        labels = np.array([item.label for item in objects], np.int64)
        crowd = np.array([item.crowd for item in objects], bool)
        return image, {
            "boxes_xyxy": boxes_xyxy[keep],
            "labels": labels[keep],
            "difficult": crowd[keep],
            "id": name,
        }

    def locate(self, name: str) -> str:
        """The file of that name in the folder, "" if there is none.

        A JSON from elsewhere must not name a file outside.
        """
        try:
            path = os.path.realpath(os.path.join(self.folder, name))
        except ValueError:  # a zero byte, half a surrogate pair
            return ""
        inside = path.startswith(os.path.join(self.folder, ""))
        return path if inside and os.path.isfile(path) else ""

    def report(self) -> str:
        dropped = sum(self.dropped.values())
        return f"{dropped:,} boxes under 1 px dropped" if dropped else ""


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); correct `root` or `annotations`"
        ) from None
    except (ValueError, RecursionError) as error:
        line = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise UserError(f"{path}{line}: not a JSON file ({error}); repair or replace it") from None


def read_rows(path: Path, content: Any, key: str, **fields: Any) -> list[dict]:
    """content[key], a list of objects that have these fields, each of its type."""
    rows = content.get(key) if isinstance(content, dict) else None
    if not isinstance(rows, list):
        raise UserError(f"{path}: there is no list `{key}`; is it COCO's form, of instances?")
    for i, row in enumerate(rows):
        for field, kind in fields.items():
            if not isinstance(row, dict) or not isinstance(row.get(field), kind):
                raise UserError(
                    f"{path}: {key}[{i}]: `{field}` is missing or of the wrong type; correct it"
                )
    return rows


def check_unique(path: Path, key: str, rows: list[dict], field: str) -> None:
    """Raises UserError where two rows have the same in a field, or without a row."""
    if not rows:
        raise UserError(f"{path}: {key}: it is empty; correct it")
    counts = Counter(row[field] for row in rows)
    value, count = counts.most_common(1)[0]
    if count > 1:
        raise UserError(f"{path}: {key}: {field} {value!r} is given {count} times; correct it")


def check_box(where: str, box: list) -> list[float]:
    """A bbox, if it is x, y, width, height in pixels from the left top corner."""
    usable = [isinstance(side, int | float) and abs(side) < LARGEST for side in box]
    if len(box) != 4 or not all(usable) or min(box[2:]) < 0:
        raise UserError(f"{where}: bbox {str(box)[:60]} is not x, y, width, height; correct it")
    return box
