"""Images with a text file each, the way YOLO tools keep them.

A line is `class cx cy w h`, an object, in parts of the image's sides.

    data/mine/data.yaml             names: [cat, dog]
    data/mine/images/train/a.jpg
    data/mine/labels/train/a.txt    0 0.5 0.5 0.25 0.4

Legend: G objects of an image.
"""

import codecs
import os
from pathlib import Path

import numpy as np

from kdmini.contracts import UserError
from kdmini.data.folders import (
    files,
    find_file,
    folders_in,
    has_ending,
    leads_out,
    one_of,
)
from kdmini.data.pictures import DEEP, IMAGES, Bits
from kdmini.data.voc import class_names
from kdmini.detection.samples import SLACK, Marked, Samples
from kdmini.detection.truth import Boxes, Target
from kdmini.files import check_kind
from kdmini.typed import short
from kdmini.yamltext import parse

LABELS = (".txt",)


class YoloTxt:
    """One folder of images with text files, as a `kdmini.contracts.Dataset`.

    root: the folder of the set.
    images: folder of the images in root; `.` is root itself. Labels lie in the folder where
        its last part `images` is `labels`; without such a part, beside the images.
    names: the classes in the order of their numbers; or a file in root that has them, a YAML
        with `names:`, a list or {0: cat, 1: dog}, or a text file with one a line.
    recursive: the folders below are read too.
    bits: used of images of 16 bits, such as 12 of a thermal camera; they are scaled to 8.
    as_stored: boxes belong to the pixels as they are stored, whatever EXIF says; else an image
        with objects that EXIF turns is an error.

    An image without a label file, or with an empty one, is background. Lists of files are not
    read, nor polygons and keypoints. Raises UserError, with file and line, for an image whose
    files are wrong, when it is asked for; a link that leads out of the set is such a file.
    """

    truth = Boxes

    def __init__(
        self,
        root: str,
        images: str = "images/train",
        names: list[str] | str = "data.yaml",
        recursive: bool = False,
        bits: Bits = DEEP,
        as_stored: bool = False,
    ):
        base = Path(root).expanduser().absolute()
        self.folder = base / images
        self.label_folder = base / labels_beside(images)
        for path in (self.folder, self.label_folder):
            if not path.is_dir():
                raise UserError(f"{path}: no such folder; correct `root` or `images`")

        known = read_names(base / names) if isinstance(names, str) else names
        self.names = class_names(known, [])
        self.files = files(self.folder, recursive)
        self.labels = files(self.label_folder, recursive)
        self.images: list[tuple[str, str]] = []  # name without ending, path
        for name, paths in self.files.items():
            self.images += [(name, path) for path in paths if has_ending(path, IMAGES)]
        if not self.images:
            raise UserError(
                f"{self.folder}: holds no image ({', '.join(IMAGES)}); correct `root` or `images`"
            )
        self.ids = [os.path.relpath(path, self.folder) for _, path in self.images]
        self.photographs = {
            os.path.split(os.path.join(os.path.realpath(self.folder), id)) for id in self.ids
        }
        self.not_read = 0 if recursive else len(folders_in(self.folder))
        self.samples = Samples(bits, as_stored)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[np.ndarray, Target]:
        """-> image (H, W, 3) uint8 RGB, and its objects, clipped to the image."""
        name, path = self.images[index]
        label_path = self._labels_of(name)
        if leads_out(path, self.folder.parent):
            raise UserError(f"{path}: a link that leads out of the set; put a copy in its place")
        labels, boxes_cxcywh, faults = read_labels(label_path, len(self.names))
        if len(labels):
            one_of(self.files[name], IMAGES)  # a.jpg and a.png cannot both have these labels
        centre = boxes_cxcywh[:, :2]
        half = boxes_cxcywh[:, 2:] / 2
        marked = Marked(
            id=self.ids[index],
            boxes_xyxy=np.hstack([centre - half, centre + half]),
            labels=labels,
            difficult=np.zeros(len(labels), bool),
            in_parts=True,
            faults=faults,
        )
        return self.samples.sample(index, path, marked)

    def _labels_of(self, name: str) -> str:
        """The path of the label file; "" where there is none. Raises UserError."""
        if not any(has_ending(path, LABELS) for path in self.labels.get(name, [])):
            return ""
        wanted = self.label_folder / f"{name}.txt"
        return find_file(self.labels, name, wanted, LABELS, self.label_folder.parent)

    def report(self) -> str:
        """What was set right in the images read so far, in one line; empty if nothing was."""
        remarks = []
        unlabelled = sum(name not in self.labels for name, _ in self.images)
        if unlabelled:
            remarks.append(f"{unlabelled:,} images without a label file")
        if self.not_read:
            remarks.append(f"{self.not_read:,} folders below not read")
        rest = self.samples.report()
        return ", ".join([*remarks, rest] if rest else remarks)


def labels_beside(images: str) -> Path:
    """The folder of the labels, in root: the last part `images` is `labels` there."""
    parts = list(Path(images).parts)
    if ".." in parts or images.startswith("/"):
        raise UserError(f"images: {images!r} is no folder in root; write images/train")
    if "images" in parts:
        last = len(parts) - 1 - parts[::-1].index("images")
        parts[last] = "labels"
    return Path(*parts)


def read_names(path: Path) -> list[str]:
    """The `names` of a data.yaml, in the order of the labels, or the lines of a text file."""
    check_kind(path)
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise UserError(f"{path}: cannot be read ({reason}); correct `root` or `names`") from None
    if has_ending(path.name, LABELS):
        return [line.strip() for line in text.splitlines() if line.strip()]

    content = parse(text, str(path))
    names = content.get("names") if isinstance(content, dict) else None
    if isinstance(names, dict) and set(names) == set(range(len(names))):
        names = [names[label] for label in range(len(names))]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(
            f"{path}: names: no list of texts, nor texts numbered from 0; "
            "quote names like `no` and `1`"
        )
    return names


def read_labels(path: str, classes: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """-> labels (G,) int64, boxes_cxcywh (G, 4) float64 in parts of the sides, and a line for
    each object that cannot be used. path: "" for no file.
    """
    check_kind(path)
    try:
        content = Path(path).read_bytes().removeprefix(codecs.BOM_UTF8) if path else b""
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    rows = []
    faults = []
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append(read_line(line, f"{path}:{number}", classes))
        except UserError as error:
            faults.append(str(error))
    table = np.array(rows, float).reshape(-1, 5)
    return table[:, 0].astype(np.int64), table[:, 1:], faults


def read_line(line: bytes, where: str, classes: int) -> list[float]:
    """class, cx, cy, w, h. where: file and number of the line, for messages."""
    where = f"{where}: {short(line.decode('utf-8', 'replace').strip())}"
    try:
        row = [float(word) for word in line.split()]
    except ValueError:
        row = []
    if len(row) != 5 or not all(np.isfinite(row)):
        raise UserError(f"{where} is not `class cx cy w h`, five numbers; correct the line")
    if row[0] not in range(classes):
        raise UserError(
            f"{where}: class {row[0]:g}, but names go from 0 to {classes - 1}; correct either"
        )
    if not all(-SLACK <= part <= 1 + SLACK for part in row[1:]):
        raise UserError(
            f"{where}: not parts of the image's sides, from 0 to 1; "
            "divide pixels by width and height"
        )
    return row
