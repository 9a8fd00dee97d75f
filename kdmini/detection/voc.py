"""PASCAL VOC, and every folder laid out like it.

    VOC2012/Annotations/2007_000027.xml  JPEGImages/2007_000027.jpg  ImageSets/Main/trainval.txt

An XML counts pixels from 1 and names the last one inside; boxes here are continuous and start at 0,
so `xmin, ymin` lose 1 and `xmax, ymax` stay. Nothing is ever written to the dataset's folder.
Legend: G objects of an image.
"""

import difflib
import math
import os
import re
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from kdmini.contracts import Target, UserError
from kdmini.data.pictures import decode, turned

VOC_NAMES = [
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
]  # fmt: skip
IMAGES, ANNOTATIONS = (".jpg", ".jpeg", ".png"), (".xml",)


class Annotation(NamedTuple):
    """What one XML file says."""

    size: tuple[int, int] | None  # width, height; None where it does not say
    classes: list[str]  # G
    boxes_xyxy: np.ndarray  # (G, 4) float32, pixels, not yet clipped
    difficult: np.ndarray  # (G,) bool


class Record(NamedTuple):
    """One image of the dataset; its pixels are still on the disk."""

    id: str
    image: str  # path
    annotation: Annotation
    labels: np.ndarray  # (G,) int64


class VOC:
    """Splits of VOC-layout folders, as a `kdmini.contracts.Dataset`. All XML files are read at
    construction.

    root: the folder that holds VOC2007 and VOC2012, or its parent with VOCdevkit/ inside.
    splits: "VOC2012/trainval" is ImageSets/Main/trainval.txt of that folder; "train", without a
    folder,
        belongs to root itself; the name `all` stands for every annotation file, listed or not.
    names: the classes, in the order of the labels; the twenty of VOC by default.
    exclude: splits whose photographs are left out, under whatever id they appear.

    A photograph that several splits name is taken once. Target ids are "VOC2012/2007_000027".
    Raises UserError for a split or a class that does not exist; for an image whose files are
    missing or wrong, when it
    is asked for: so whoever reads all of them can tell of all that is wrong at once.
    """

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
        self.records: list[Record | UserError] = []
        self.wrong_size: set[int] = (
            set()
        )  # indices of images whose <size> is not that of the pixels
        self.dropped: dict[int, int] = {}  # index -> boxes without a pixel inside the image

        # not resolve(): a folder that is a link keeps its own name
        chosen = self._choose(Path(root).expanduser().absolute(), splits, exclude or [])
        self.photographs = {
            photograph(*image) for image in chosen
        }  # by what they are known in every set
        self._read(chosen)

    def _choose(self, root: Path, splits: list[str], exclude: list[str]) -> list[tuple[Path, str]]:
        """-> folder and name of each image of the splits: each photograph once, none of the
        excluded ones.
        """
        listed = [image for split in splits for image in list_split(root, split)]
        unwanted = {photograph(*image) for split in exclude for image in list_split(root, split)}
        unique: dict[tuple[str, str], tuple[Path, str]] = {}
        for image in listed:
            unique.setdefault(photograph(*image), image)
        chosen = [image for key, image in unique.items() if key not in unwanted]
        if len(unique) < len(listed):
            print(f"{' + '.join(splits)}: {len(listed) - len(unique):,} repeated images taken once")
        if exclude:
            left_out = len(unique) - len(chosen)
            print(
                f"{' + '.join(splits)}: {left_out:,} of {len(unique):,} images left out, as in {', '.join(exclude)}"
            )
        if not chosen:
            raise UserError(
                f"{root}: no image is left of splits {splits} without {exclude}; check `splits`, `exclude`"
            )
        return chosen

    def _read(self, chosen: list[tuple[Path, str]]) -> None:
        """Parse all annotations."""
        folders = {folder for folder, _ in chosen}
        images = {folder: files(folder / "JPEGImages", IMAGES) for folder in folders}
        annotations = {folder: files(folder / "Annotations", ANNOTATIONS) for folder in folders}
        label_of = {name: label for label, name in enumerate(self.names)}
        unknown: list[tuple[str, str]] = []  # file and class of each object
        for folder, name in tqdm(
            chosen, "annotations", unit="file", leave=False, disable=len(chosen) <= 2000 or None
        ):
            try:
                image = choose(images[folder], folder / "JPEGImages" / f"{name}.jpg")
                path = choose(annotations[folder], folder / "Annotations" / f"{name}.xml")
                annotation = read_annotation(Path(path))
            except UserError as error:
                self.records.append(error)
                continue
            unknown += [
                (path, class_name)
                for class_name in annotation.classes
                if class_name not in label_of
            ]
            labels = np.array(
                [label_of.get(class_name, -1) for class_name in annotation.classes], np.int64
            )
            self.records.append(Record(f"{folder.name}/{name}", image, annotation, labels))

        if unknown:
            path, first = unknown[0]
            counts = Counter(class_name for _, class_name in unknown)
            raise UserError(
                f"{path}: unknown class {first!r}, the nearest known is {nearest(first, self.names)!r}; list the "
                f"classes in `names:` (unknown: {', '.join(f'{name!r} {count:,}x' for name, count in counts.items())})"
            )

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[np.ndarray, Target]:
        """-> image (H, W, 3) uint8 RGB, and its objects, clipped to the image; under 1 px they are
        dropped.
        """
        record = self.records[index]
        if isinstance(record, UserError):
            raise record
        image = decode(record.image)
        height, width = image.shape[:2]
        annotation = record.annotation
        if annotation.size not in (None, (width, height)):
            self._accept_size(index, record, width, height)
        boxes_xyxy = annotation.boxes_xyxy.clip(
            0, np.array([width, height, width, height], np.float32)
        )
        keep = (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2] >= 1).all(1)
        if not keep.all():
            self.dropped[index] = int((~keep).sum())  # by index, so that threads need no lock
        return image, Target(
            boxes_xyxy=boxes_xyxy[keep],
            labels=record.labels[keep],
            difficult=annotation.difficult[keep],
            id=record.id,
        )

    def _accept_size(self, index: int, record: Record, width: int, height: int) -> None:
        """The pixels are right and <size> is not, unless EXIF says that the boxes belong to a
        turned image.
        """
        path, size = record.image, record.annotation.size
        if size == (height, width) and turned(path):
            sides = f"{width}x{height}, turned by EXIF, but {height}x{width} in its XML"
            raise UserError(
                f"{path}: {sides}, so boxes would lie wrong; store it turned and without EXIF"
            )
        if not self.wrong_size:
            said = "x".join(map(str, size or ()))
            print(
                f"{path}: {width}x{height} pixels, though its XML says {said}: pixels count",
                file=sys.stderr,
            )
        self.wrong_size.add(index)

    def report(self) -> str:
        """What was set right in the images read so far, in one line; empty if nothing was."""
        parts = []
        if self.wrong_size:
            parts.append(f"{len(self.wrong_size):,} images whose <size> is wrong")
        if self.dropped:
            parts.append(
                f"{sum(self.dropped.values()):,} boxes under 1 px dropped in {len(self.dropped):,} images"
            )
        return ", ".join(parts)


def list_split(root: Path, split: str) -> list[tuple[Path, str]]:
    """-> the VOC-layout folder and the name of each image of a split, in its order."""
    folder_name, _, name = split.rpartition("/")
    voc = folder_name in ("VOC2007", "VOC2012")
    remedy = (
        f"fetch it with `python -m kdmini.tools.download --root {root}`"
        if voc
        else "correct `root` or `splits`"
    )
    if ".." in split or "\0" in split:
        raise UserError(
            f"split {split!r} is not a folder and a name, like VOC2012/trainval; correct `splits`"
        )
    candidates = (root / folder_name, root / "VOCdevkit" / folder_name)
    folder = next((path for path in candidates if (path / "Annotations").is_dir()), None)
    if folder is None:
        raise UserError(f"{root / folder_name}: no such folder, or no Annotations in it; {remedy}")

    lists = folder / "ImageSets" / "Main"
    trainval = lists / "trainval.txt"
    if name == "all":
        found = sorted(files(folder / "Annotations", ANNOTATIONS))
        count = (
            f", of which ImageSets/Main/trainval lists {len(read_ids(trainval)):,}"
            if trainval.is_file()
            else ""
        )
        print(f"{split}: {len(found):,} annotated images{count}")
    elif (lists / f"{name}.txt").is_file():
        found = read_ids(lists / f"{name}.txt")
    else:
        known = (
            ", ".join(sorted(path.stem for path in lists.glob("*.txt") if "_" not in path.stem))
            or "no list"
        )
        raise UserError(f"{lists / name}.txt: no such split ({known}, and `all`); {remedy}")
    if not found:
        raise UserError(f"{folder}: split {name!r} lists no image; {remedy}")
    return [(folder, image) for image in found]


def read_ids(path: Path) -> list[str]:
    """The names in a split file; a second column (VOC's lists per class have -1, 0 or 1) is passed
    over.
    """
    names = []
    for line in path.read_text("utf-8-sig", "replace").split("\n"):
        name = re.sub(r"\s+(-1|0|1)$", "", line.strip())
        if ".." in name or re.search(r"[/\\\0]", name):
            raise UserError(
                f"{path}: {name!r} is not the name of an image; names have no folder and no ending"
            )
        if name:
            names.append(name)
    return names


def photograph(folder: Path, name: str) -> tuple[str, str]:
    """What one photograph is known by, in every set: VOC2012 calls photograph NNNNNN of VOC2007
    2007_NNNNNN.
    """
    place = (
        folder.parent.parent if folder.parent.name == "VOCdevkit" else folder.parent
    )  # either is root to us
    if folder.name == "VOC2012" and name.startswith("2007_"):
        return os.path.join(resolved(place), "VOC2007"), name.removeprefix("2007_")
    return os.path.join(resolved(place), folder.name), name


resolved = cache(os.path.realpath)  # asked for every photograph


def files(folder: Path, endings: tuple[str, ...]) -> dict[str, str]:
    """Name -> path of every file with such an ending; "" for a link that leads out of the
    VOC-layout folder.
    """
    inside = tuple(os.path.join(os.path.realpath(place), "") for place in (folder, folder.parent))
    found = {}
    for entry in (
        sorted(os.scandir(folder), key=lambda entry: entry.name) if folder.is_dir() else ()
    ):
        name, ending = os.path.splitext(entry.name)
        if ending.lower() in endings and entry.is_file():  # a pipe would be waited for
            outward = entry.is_symlink() and not os.path.realpath(entry.path).startswith(inside)
            found[name] = "" if outward else entry.path
    return found


def choose(found: dict[str, str], path: Path) -> str:
    """The path of the file that is called `path` but for the ending."""
    if file := found.get(path.stem):
        return file
    fault = (
        "no such file; restore it"
        if file is None
        else "a link that leads out of the set; put a copy in its place"
    )
    raise UserError(f"{path}: {fault} or take {path.stem!r} out of the split")


def nearest(name: str, names: list[str]) -> str:
    """The one of `names` that is spelt most like `name`, whatever the case."""
    return max(
        names, key=lambda known: difflib.SequenceMatcher(None, name.lower(), known.lower()).ratio()
    )


def read_annotation(path: Path) -> Annotation:
    """Read one XML file. Raises UserError with file, and line or object, for anything that is not
    VOC.
    """
    try:
        content = path.read_bytes()
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: not UTF-8; save the file as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    # entities can grow without bound or name other files: refused before the parser sees them, as
    # is a zero byte, for then the parser would read UTF-16, and find what this search cannot
    if refused := re.search(r"<!DOCTYPE|<!ENTITY|\0", text):
        line = text.count("\n", 0, refused.start()) + 1
        raise UserError(
            f"{path}:{line}: {refused[0]!r} has no place in an annotation; remove it, save as UTF-8"
        )
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
    try:
        size = int(root.findtext("size/width", "")), int(root.findtext("size/height", ""))
    except ValueError:
        size = None
    return Annotation(
        size,
        [class_name for class_name, _, _ in objects],
        np.array([box for _, box, _ in objects], np.float32).reshape(-1, 4),
        np.array([difficult for _, _, difficult in objects], bool),
    )


def read_objects(path: Path, root: ET.Element) -> Iterator[tuple[str, list[float], bool]]:
    """-> class, box_xyxy from 0, difficult. Direct children only: a <part> has a name and a box of
    its own.
    """
    for number, element in enumerate(root.findall("object"), 1):
        class_name = (element.findtext("name") or "").strip()
        where = f"{path}: object {number} ({class_name!r})"
        box = []
        for side in ("xmin", "ymin", "xmax", "ymax"):
            text = (element.findtext(f"bndbox/{side}") or "").strip()
            try:
                box.append(float(text))
            except ValueError:
                box.append(math.nan)
            if not abs(box[-1]) < 1e9:  # NaN too
                raise UserError(
                    f"{where}: {side} is {text!r}, not a number of pixels; correct its <bndbox>"
                )
        if box[0] > box[2] or box[1] > box[3]:
            raise UserError(
                f"{where}: corners are swapped in {box}; xmin, ymin come before xmax, ymax"
            )
        difficult = (element.findtext("difficult") or "0").strip()
        if not class_name or difficult not in ("", "0", "1"):
            raise UserError(
                f"{where}: <name> is empty or <difficult> is {difficult!r}, not 0 or 1; correct it"
            )
        yield class_name, [box[0] - 1, box[1] - 1, box[2], box[3]], difficult == "1"
