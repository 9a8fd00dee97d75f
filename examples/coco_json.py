"""COCO's form: one JSON of `images`, `categories` and `annotations`, and a folder of images.

    data:
      root: data/coco                                        # annotations/instances_train.json  train/000000000009.jpg
      train: &set {build: examples.coco_json:CocoJson, annotations:
      annotations/instances_train.json, images: train}
      val: {<<: *set, annotations: annotations/instances_val.json, images: val}

`names` lists the classes in the order of their labels; without it they are the file's, by category
id. Ids, which may have gaps, become labels by name. `iscrowd: 1` counts as difficult: not trained
on, neither hit nor miss. Boxes are used, masks are not. An image without annotations is background.
Legend: G objects of an image."""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from kdmini.contracts import Target, UserError
from kdmini.data.pictures import decode
from kdmini.detection.voc import nearest


class CocoJson:
    """The images of one JSON, as a `kdmini.contracts.Dataset`. Raises UserError for a file that is
    no such JSON; for an image that is missing or wrong, or a box, when the image is asked for.
    """

    def __init__(self, root: str, annotations: str, images: str, names: list[str] | None = None):
        base = Path(root).expanduser().absolute()
        self.path, self.folder = base / annotations, os.path.realpath(base / images)
        content = read_json(self.path)
        categories = rows(self.path, content, "categories", ["id"], id=int, name=str)
        category = {row["id"]: row["name"] for row in categories}
        self.names = list(
            dict.fromkeys(category[id] for id in sorted(category)) if names is None else names
        )
        if not self.names or len(set(self.names)) < len(self.names):
            raise UserError(f"{self.path}: `names` is empty or names a class twice: {self.names}")
        self.images = rows(
            self.path, content, "images", ["id", "file_name"], id=int | str, file_name=str
        )
        # of each image: annotation id, label, box, crowd
        self.objects: dict[int | str, list[tuple[Any, int, list, bool]]] = {
            image["id"]: [] for image in self.images
        }

        label_of = {name: label for label, name in enumerate(self.names)}
        for row in rows(
            self.path, content, "annotations", [], image_id=int | str, category_id=int, bbox=list
        ):
            where = self.where(row.get("id"))
            if row["image_id"] not in self.objects:
                raise UserError(
                    f"{where}: there is no image {row['image_id']!r}; remove it or add the image"
                )
            if row["category_id"] not in category:
                raise UserError(
                    f"{where}: there is no category {row['category_id']}; correct `categories`"
                )
            if (name := category[row["category_id"]]) not in label_of:
                near = nearest(name, self.names)
                raise UserError(
                    f"{where}: unknown class {name!r}, the nearest known is {near!r}; add it to `names:`"
                )
            self.objects[row["image_id"]].append(
                (row.get("id"), label_of[name], row["bbox"], row.get("iscrowd") == 1)
            )
        self.photographs = {(self.folder, image["file_name"]) for image in self.images}
        self.dropped: dict[int, int] = {}  # index -> boxes without a pixel inside the image

    def __len__(self) -> int:
        return len(self.images)

    def where(self, id: Any) -> str:
        return f"{self.path}: annotation {id!r}"

    def locate(self, name: str) -> str:
        """The file of that name, "" if there is none in the folder: a JSON from elsewhere must not
        name any other.
        """
        try:
            path = os.path.realpath(os.path.join(self.folder, name))
        except ValueError:  # a zero byte, half a surrogate pair
            return ""
        return (
            path if path.startswith(os.path.join(self.folder, "")) and os.path.isfile(path) else ""
        )

    def __getitem__(self, index: int) -> tuple[np.ndarray, Target]:
        """-> image (H, W, 3) uint8 RGB, and its objects, clipped to the image; under 1 px they are
        dropped.
        """
        about = self.images[index]
        path, objects = self.locate(about["file_name"]), self.objects[about["id"]]
        if not path:
            raise UserError(
                f"{self.path}: no file {about['file_name']!r} in {self.folder}; put it there, not a link"
            )
        boxes_xywh = np.array(
            [check_box(self.where(id), box) for id, _, box, _ in objects]
        ).reshape(-1, 4)
        image = decode(path)
        sides = image.shape[1::-1]  # W, H
        if (said := (about.get("width") or sides[0], about.get("height") or sides[1])) != sides:
            told = f"{sides[0]}x{sides[1]} pixels, but {said[0]}x{said[1]} in {self.path.name}"
            raise UserError(f"{path}: {told}; store it as it was annotated, turned if EXIF says so")
        corners = np.hstack([boxes_xywh[:, :2], boxes_xywh[:, :2] + boxes_xywh[:, 2:]])
        boxes_xyxy = corners.clip(0, np.tile(sides, 2)).astype(np.float32)
        keep = (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2] >= 1).all(1)
        if not keep.all():
            self.dropped[index] = int((~keep).sum())  # by index, so that threads need no lock
        labels = np.array([label for _, label, _, _ in objects], np.int64)[keep]
        crowd = np.array([crowd for _, _, _, crowd in objects], bool)[keep]
        return image, Target(
            boxes_xyxy=boxes_xyxy[keep], labels=labels, difficult=crowd, id=about["file_name"]
        )

    def report(self) -> str:
        return f"{sum(self.dropped.values()):,} boxes under 1 px dropped" if self.dropped else ""


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


def rows(path: Path, content: Any, key: str, unique: list[str], **fields: Any) -> list[dict]:
    """content[key], a list of objects that have these fields, each of its type, some of them in no
    two objects.
    """
    found = content.get(key) if isinstance(content, dict) else None
    if not isinstance(found, list):
        raise UserError(f"{path}: there is no list `{key}`; is it COCO's form, of instances?")
    for i, row in enumerate(found):
        for field, kind in fields.items():
            if not isinstance(row, dict) or not isinstance(row.get(field), kind):
                raise UserError(
                    f"{path}: {key}[{i}]: `{field}` is missing or of the wrong type; correct it"
                )
    for field in unique:
        value, count = next(iter(Counter(row[field] for row in found).most_common(1)), (None, 0))
        if count != 1:
            fault = f"{field} {value!r} is given {count} times" if count else "it is empty"
            raise UserError(f"{path}: {key}: {fault}; correct it")
    return found


def check_box(where: str, box: list) -> list[float]:
    """A bbox, if it is x, y, width, height in pixels from the left top corner of the image."""
    numbers = len(box) == 4 and all(
        isinstance(side, int | float) and abs(side) < 1e9 for side in box
    )
    if not numbers or min(box[2:]) < 0:
        raise UserError(f"{where}: bbox {str(box)[:60]} is not x, y, width, height; correct it")
    return box
