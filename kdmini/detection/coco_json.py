"""COCO's form: a JSON of `images`, `categories`, `annotations`, and a folder of images.

    data/mine/train.json            one for each set
    data/mine/train/a.jpg           "file_name": "a.jpg"

Legend: G objects of an image.
"""

import json
import os
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kdmini.contracts import UserError
from kdmini.data.folders import composed
from kdmini.data.pictures import DEEP, Bits
from kdmini.data.voc import nearest
from kdmini.detection.samples import Marked, Samples
from kdmini.detection.truth import Boxes, BoxesAndRegions, Difficult, Target
from kdmini.files import check_kind
from kdmini.typed import short

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

    root: the folder of the set.
    annotations: the JSON in root.
    images: folder in root from which the JSON's `file_name` is read; `.` is root itself.
    names: the classes in the order of their labels; those of the file, by category id, by
        default. Ids, which may have gaps, become labels by name.
    bits: used of images of 16 bits, such as 12 of a thermal camera; they are scaled to 8.
    as_stored: boxes belong to the pixels as they are stored, whatever `width`, `height` and
        EXIF say; else an image of which that is not clear is an error.
    difficult: what becomes of difficult objects in training: `background`, as if they were
        not there; `ignore`, a detector does not learn that there is nothing where they lie.

    `iscrowd: 1` counts as difficult. Boxes are used, masks are not. An image without
    annotations is background. Raises UserError for a file that is no such JSON; for an image
    that is missing or wrong, or a box, when the image is asked for.
    """

    truth: type[Boxes] = Boxes

    def __init__(
        self,
        root: str,
        annotations: str,
        images: str,
        names: list[str] | None = None,
        bits: Bits = DEEP,
        as_stored: bool = False,
        difficult: Difficult = "background",
    ):
        if difficult == "ignore":  # else that of the class, which a subclass may have replaced
            self.truth = BoxesAndRegions
        base = Path(root).expanduser().absolute()
        self.path = base / annotations
        self.folder = os.path.realpath(base / images)
        content = read_json(self.path)

        categories = read_rows(self.path, content, "categories", id=int, name=str)
        check_unique(self.path, "categories", categories, "id")
        name_of = {row["id"]: composed(row["name"]) for row in categories}
        if names is None:
            names = list(dict.fromkeys(name_of[id] for id in sorted(name_of)))
        self.names = list(names)
        if not self.names or len(set(self.names)) < len(self.names):
            raise UserError(f"{self.path}: `names` is empty or names a class twice: {self.names}")

        self.images = read_rows(self.path, content, "images", id=int | str, file_name=str)
        check_unique(self.path, "images", self.images, "id")
        check_unique(self.path, "images", self.images, "file_name")
        self.objects = self._objects_by_image(content, name_of)
        self.ids = [image["file_name"] for image in self.images]
        self.photographs = {
            os.path.split(os.path.normpath(os.path.join(self.folder, id))) for id in self.ids
        }
        self.samples = Samples(bits, as_stored)

    def _objects_by_image(self, content: Any, name_of: dict[int, str]) -> Objects:
        """Image id -> annotations, which must fit images, categories and names."""
        objects: Objects = {image["id"]: [] for image in self.images}
        label_of = {composed(name): label for label, name in enumerate(self.names)}
        fields = {"image_id": int | str, "category_id": int, "bbox": list}
        for row in read_rows(self.path, content, "annotations", **fields):
            id = row.get("id")
            where = self._where(id)
            if row["image_id"] not in objects:
                raise UserError(
                    f"{where}: there is no image {short(row['image_id'])}; remove it or add it"
                )
            if row["category_id"] not in name_of:
                raise UserError(
                    f"{where}: there is no category {row['category_id']}; correct `categories`"
                )
            name = name_of[row["category_id"]]
            if name not in label_of:
                near = nearest(name, self.names)
                raise UserError(
                    f"{where}: unknown class {short(name)}, the nearest known is {near!r}; "
                    "add it to `names:`"
                )
            crowd = row.get("iscrowd", 0)
            if crowd not in (0, 1, None):
                raise UserError(f"{where}: iscrowd is {short(crowd)}, not 0 or 1; correct it")
            annotation = Annotation(id, label_of[name], row["bbox"], crowd == 1)
            objects[row["image_id"]].append(annotation)
        return objects

    def _where(self, id: Any) -> str:
        return f"{self.path}: annotation {short(id)}"

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[np.ndarray, Target]:
        """-> image (H, W, 3) uint8 RGB, and its objects, clipped to the image."""
        about = self.images[index]
        name = about["file_name"]
        path = self.locate(name)
        if not path:
            raise UserError(
                f"{self.path}: no file {short(name)} in {self.folder}; put it there, not a link"
            )
        objects: list[Annotation] = []
        boxes = []
        faults = []
        for item in self.objects[about["id"]]:
            try:
                boxes.append(check_box(self._where(item.id), item.box))
                objects.append(item)
            except UserError as error:
                faults.append(str(error))
        boxes_xywh = np.array(boxes, float).reshape(-1, 4)
        marked = Marked(
            id=name,
            boxes_xyxy=np.hstack([boxes_xywh[:, :2], boxes_xywh[:, :2] + boxes_xywh[:, 2:]]),
            labels=np.array([item.label for item in objects], np.int64),
            difficult=np.array([item.crowd for item in objects], bool),
            size=stated_size(about),
            faults=faults,
        )
        return self.samples.sample(index, path, marked)

    def locate(self, name: str) -> str:
        """The file of that name in the folder, "" if there is none; macOS may have taken its
        characters apart.

        A JSON from elsewhere must not name a file outside.
        """
        for spelling in (name, composed(name), unicodedata.normalize("NFD", name)):
            try:
                path = os.path.realpath(os.path.join(self.folder, spelling))
            except ValueError:  # a zero byte, half a surrogate pair
                return ""
            inside = path.startswith(os.path.join(self.folder, ""))
            if inside and os.path.isfile(path):
                return path
        return ""

    def report(self) -> str:
        """What was set right in the images read so far, in one line; empty if nothing was."""
        return self.samples.report()


def stated_size(about: dict) -> tuple[int, int] | None:
    """width, height of an image; None where it does not say."""
    width: Any = about.get("width")
    height: Any = about.get("height")
    if not is_side(width) or not is_side(height):
        return None
    return round(width), round(height)


def is_side(value: Any) -> bool:
    return isinstance(value, int | float) and 0 < value < LARGEST


def read_json(path: Path) -> Any:
    check_kind(path)
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
        raise UserError(f"{where}: bbox {short(box)} is not x, y, width, height; correct it")
    if all(0 <= side <= 1 for side in box) and any(side % 1 for side in box):
        raise UserError(f"{where}: bbox {short(box)} is in parts of the sides, not in pixels")
    return box
