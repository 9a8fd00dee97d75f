"""PASCAL VOC for detection, and every folder laid out like it: one XML file an image.

An XML counts pixels from 1 and names the last one inside; boxes here are continuous and
start at 0, so `xmin, ymin` lose 1 and `xmax, ymax` stay.
Legend: G objects of an image.
"""

import math
import re
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from kdmini.contracts import UserError
from kdmini.data.pictures import decode, turned
from kdmini.data.voc import (
    ANNOTATIONS,
    IMAGES,
    VOC_NAMES,
    Entry,
    files,
    find_file,
    list_images,
    nearest,
    photograph,
)
from kdmini.detection.truth import Boxes, Target

MAX_COORDINATE = 1e9  # pixels; what lies further out is a slip of the pen
QUICK = 2000  # so many annotations are read before a progress bar would be of use


class Annotation(NamedTuple):
    """What one XML file says."""

    size: tuple[int, int] | None  # width, height; None where it does not say
    classes: list[str]  # G
    boxes_xyxy: np.ndarray  # (G, 4) float32, pixels, not yet clipped
    difficult: np.ndarray  # (G,) bool


class Object(NamedTuple):
    """One <object> of an XML file."""

    class_name: str
    box_xyxy: list[float]  # pixels, from 0
    difficult: bool


class Record(NamedTuple):
    """One image of the dataset; its pixels are still on the disk."""

    id: str
    image: str  # path
    annotation: Annotation
    labels: np.ndarray  # (G,) int64


class VOC:
    """Splits of VOC-layout folders, as a `kdmini.contracts.Dataset`.

    root: the folder that holds VOC2007 and VOC2012, or its parent with VOCdevkit/ inside.
    splits: "VOC2012/trainval" is ImageSets/Main/trainval.txt of that folder; "train",
        without a folder, belongs to root itself; the name `all` stands for every
        annotation file, listed or not.
    names: the classes, in the order of the labels; the twenty of VOC by default.
    exclude: splits whose photographs are left out, under whatever id they appear.

    All XML files are read at construction. A photograph that several splits name is
    taken once. Target ids are "VOC2012/2007_000027".

    Raises UserError at construction for a split or a class that does not exist; for an
    image whose files are missing or wrong, when it is asked for: so whoever reads all
    of them can tell of all that is wrong at once.
    """

    truth = Boxes

    def __init__(
        self,
        root: str,
        splits: list[str],
        names: list[str] | None = None,
        exclude: list[str] | None = None,
    ):
        self.names = list(VOC_NAMES if names is None else names)
        if not self.names or len(set(self.names)) < len(self.names):
            raise UserError(f"`names` is empty or names a class twice: {self.names}")

        # absolute, not resolved: a folder that is a link keeps its own name
        folder = Path(root).expanduser().absolute()
        entries = self._choose(folder, splits, exclude or [])
        self.photographs = {photograph(entry) for entry in entries}
        self.records = read_records(entries, self.names)

        # noted while images are read, by index, so that threads need no lock
        self.wrong_size: set[int] = set()  # images whose <size> is not that of the pixels
        self.dropped: dict[int, int] = {}  # image -> boxes without a pixel inside it

    def _choose(self, root: Path, splits: list[str], exclude: list[str]) -> list[Entry]:
        """The images to read. A subclass may take fewer."""
        return list_images(root, splits, exclude)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[np.ndarray, Target]:
        """-> image (H, W, 3) uint8 RGB, and its objects, clipped to the image.

        Objects that have under 1 px left are dropped.
        """
        record = self.records[index]
        if isinstance(record, UserError):
            raise record
        annotation = record.annotation
        image = decode(record.image)
        height, width = image.shape[:2]
        if annotation.size not in (None, (width, height)):
            self._accept_size(index, record, width, height)

        corner = np.array([width, height, width, height], np.float32)
        boxes_xyxy = annotation.boxes_xyxy.clip(0, corner)
        sides = boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]
        keep = (sides >= 1).all(1)
        if not keep.all():
            self.dropped[index] = int((~keep).sum())
        return image, Target(
            boxes_xyxy=boxes_xyxy[keep],
            labels=record.labels[keep],
            difficult=annotation.difficult[keep],
            id=record.id,
        )

    def _accept_size(self, index: int, record: Record, width: int, height: int) -> None:
        """The pixels are right and <size> is not, unless EXIF says that the boxes belong to
        a turned image: then boxes would lie wrong, and that is a UserError.
        """
        path = record.image
        size = record.annotation.size
        if size == (height, width) and turned(path):
            sides = f"{width}x{height}, turned by EXIF, but {height}x{width} in its XML"
            raise UserError(
                f"{path}: {sides}, so boxes would lie wrong; store it turned and without EXIF"
            )
        if not self.wrong_size:
            in_xml = "x".join(map(str, size or ()))
            print(
                f"{path}: {width}x{height} pixels, though its XML says {in_xml}: pixels count",
                file=sys.stderr,
            )
        self.wrong_size.add(index)

    def report(self) -> str:
        """What was set right in the images read so far, in one line; empty if nothing was."""
        parts = []
        if self.wrong_size:
            parts.append(f"{len(self.wrong_size):,} images whose <size> is wrong")
        if self.dropped:
            boxes = sum(self.dropped.values())
            parts.append(f"{boxes:,} boxes under 1 px dropped in {len(self.dropped):,} images")
        return ", ".join(parts)


def read_records(entries: list[Entry], names: list[str]) -> list[Record | UserError]:
    """Parse all annotations. In the place of a record is what is wrong with its files.

    Raises UserError when all are read, if objects are of classes that are not in names.
    """
    folders = {entry.folder for entry in entries}
    images = {folder: files(folder / "JPEGImages", IMAGES) for folder in folders}
    annotations = {folder: files(folder / "Annotations", ANNOTATIONS) for folder in folders}
    label_of = {name: label for label, name in enumerate(names)}

    records: list[Record | UserError] = []
    unknown: list[tuple[str, str]] = []  # file and class of each object
    hidden = len(entries) <= QUICK or None  # None: a bar on a terminal alone
    for folder, name in tqdm(entries, "annotations", unit="file", leave=False, disable=hidden):
        try:
            image = find_file(images[folder], folder / "JPEGImages" / f"{name}.jpg")
            path = find_file(annotations[folder], folder / "Annotations" / f"{name}.xml")
            annotation = read_annotation(Path(path))
        except UserError as error:
            records.append(error)
            continue
        labels = np.array([label_of.get(known, -1) for known in annotation.classes], np.int64)
        unknown += [(path, other) for other in annotation.classes if other not in label_of]
        records.append(Record(f"{folder.name}/{name}", image, annotation, labels))

    if unknown:
        path, first = unknown[0]
        counts = Counter(class_name for _, class_name in unknown)
        listed = ", ".join(f"{class_name!r} {count:,}x" for class_name, count in counts.items())
        raise UserError(
            f"{path}: unknown class {first!r}, the nearest known is {nearest(first, names)!r}; "
            f"list the classes in `names:` (unknown: {listed})"
        )
    return records


# --- XML


def read_annotation(path: Path) -> Annotation:
    """Read one XML file.

    Raises UserError with file, and line or object, for anything that is not VOC.
    """
    text = read_text(path)
    try:
        root = ET.fromstring(text)
    except (ET.ParseError, ValueError) as error:
        line = error.position[0] if isinstance(error, ET.ParseError) else 1
        raise UserError(
            f"{path}:{line}: not an XML file ({error}); repair it or take it out of the split"
        ) from None
    if root.tag != "annotation":
        raise UserError(
            f"{path}:1: <{root.tag}> instead of <annotation>; is this a VOC annotation?"
        )

    objects = list(read_objects(path, root))
    boxes = [thing.box_xyxy for thing in objects]
    return Annotation(
        size=read_size(root),
        classes=[thing.class_name for thing in objects],
        boxes_xyxy=np.array(boxes, np.float32).reshape(-1, 4),
        difficult=np.array([thing.difficult for thing in objects], bool),
    )


def read_text(path: Path) -> str:
    """The text of an XML file without entities, which can grow without bound or name other
    files.

    They are refused before the parser sees them. So is a zero byte, for then the parser
    would read UTF-16, and find entities that this search cannot.
    """
    try:
        content = path.read_bytes()
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: not UTF-8; save the file as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None

    refused = re.search(r"<!DOCTYPE|<!ENTITY|\0", text)
    if refused:
        line = text.count("\n", 0, refused.start()) + 1
        raise UserError(
            f"{path}:{line}: {refused[0]!r} has no place in an annotation; remove it, save as UTF-8"
        )
    return text


def read_size(root: ET.Element) -> tuple[int, int] | None:
    """-> width, height; None where the file does not say, or says no number."""
    try:
        width = int(root.findtext("size/width", ""))
        height = int(root.findtext("size/height", ""))
    except ValueError:
        return None
    return width, height


def read_objects(path: Path, root: ET.Element) -> Iterator[Object]:
    """The objects of a file, checked. Direct children only: a <part> has a box of its own."""
    for number, element in enumerate(root.findall("object"), 1):
        class_name = (element.findtext("name") or "").strip()
        where = f"{path}: object {number} ({class_name!r})"
        box_xyxy = read_box(where, element)
        difficult = (element.findtext("difficult") or "0").strip()
        if not class_name or difficult not in ("", "0", "1"):
            raise UserError(
                f"{where}: <name> is empty or <difficult> is {difficult!r}, not 0 or 1; correct it"
            )
        yield Object(class_name, box_xyxy, difficult == "1")


def read_box(where: str, element: ET.Element) -> list[float]:
    """The <bndbox> of an object, from 0. `where` names the object in an error."""
    box = []
    for side in ("xmin", "ymin", "xmax", "ymax"):
        text = (element.findtext(f"bndbox/{side}") or "").strip()
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not abs(number) < MAX_COORDINATE:  # NaN too
            raise UserError(
                f"{where}: {side} is {text!r}, not a number of pixels; correct its <bndbox>"
            )
        box.append(number)
    xmin, ymin, xmax, ymax = box
    if xmin > xmax or ymin > ymax:
        raise UserError(f"{where}: corners are swapped in {box}; xmin, ymin come before xmax, ymax")
    return [xmin - 1, ymin - 1, xmax, ymax]
