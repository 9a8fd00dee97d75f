"""Images with a text file each, the way YOLO tools keep them.

A line is `class cx cy w h`, an object, in parts of the image's sides.

    data:
      root: data/mine  # with data.yaml, images/train/a.jpg and labels/train/a.txt
      train: &set
        build: examples.yolo_txt:YoloTxt
        images: images/train
        names: data.yaml
      val: {<<: *set, images: images/val}

`names` is the list of classes, or a YAML file in root with `names:`, a list or
{0: cat, 1: dog}. Labels lie where the images do, in a folder `labels` in the place of
`images` (train/images, too, has its labels in train/labels). Folders below that one and
lists of files are not read, nor polygons and keypoints. An image without a label file,
or with an empty one, is background. Where EXIF turns an image with labels, they may be for
either, and it is an error; `as_stored: true` says that they are for the pixels as stored.

Legend: G objects of an image.
"""

import codecs
import os
from pathlib import Path

import numpy as np

from kdmini import config
from kdmini.contracts import UserError
from kdmini.data.folders import files, find_file, has_ending, leads_out, one_of
from kdmini.data.pictures import DEEP, IMAGES, Bits
from kdmini.detection.samples import SLACK, Marked, Samples
from kdmini.detection.truth import Boxes, Target
from kdmini.files import check_kind
from kdmini.typed import short

LABELS = (".txt",)


class YoloTxt:
    """One folder of images, as a `kdmini.contracts.Dataset`.

    Raises UserError, with file and line, for an image whose files are wrong, when it is
    asked for; a link that leads out of the set is such a file.
    """

    truth = Boxes

    def __init__(
        self,
        root: str,
        images: str = "images/train",
        names: list[str] | str = "data.yaml",
        bits: Bits = DEEP,
        as_stored: bool = False,
    ):
        base = Path(root).expanduser().absolute()
        folder = base / images
        label_folder = base / labels_beside(images)
        for path in (folder, label_folder):
            if not path.is_dir():
                raise UserError(f"{path}: no such folder; correct `root` or `images`")

        self.names = read_names(base / names) if isinstance(names, str) else list(names)
        if not self.names or len(set(self.names)) < len(self.names):
            raise UserError(f"`names` is empty or names a class twice: {self.names}")

        self.files = files(folder)
        self.images: list[tuple[str, str]] = []  # name without ending, path
        for name, paths in self.files.items():
            self.images += [(name, path) for path in paths if has_ending(path, IMAGES)]
        if not self.images:
            raise UserError(
                f"{folder}: holds no image ({', '.join(IMAGES)}); correct `root` or `images`"
            )
        self.folder = folder
        self.label_folder = label_folder
        self.photographs = {
            (os.path.realpath(folder), os.path.basename(path)) for _, path in self.images
        }
        self.labels = files(label_folder)
        self.not_read = sum(path.is_dir() for path in folder.iterdir())
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
            id=os.path.basename(path),
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
        return find_file(self.labels, wanted, LABELS, self.label_folder.parent)

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
    if "images" not in parts or ".." in parts or parts[0] == "/":
        raise UserError(
            f"images: {images!r} is no folder in root with a part called `images`; "
            "write images/train"
        )
    last = len(parts) - 1 - parts[::-1].index("images")
    parts[last] = "labels"
    return Path(*parts)


def read_names(path: Path) -> list[str]:
    """The `names` of a data.yaml, in the order of the labels."""
    names = config.load(path).get("names")
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
