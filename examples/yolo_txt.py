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
or with an empty one, is background.

Legend: G objects of an image.
"""

import codecs
import os
from pathlib import Path

import numpy as np

from kdmini import config
from kdmini.contracts import UserError
from kdmini.data.pictures import EXIF_ORIENTATION, decode, opened
from kdmini.data.voc import IMAGES, files
from kdmini.detection.truth import Boxes, Target

ENDINGS = (*IMAGES, ".webp", ".bmp")
MIN_SIDE = 1  # pixels; a box with less inside the image is dropped
SLACK = 0.01  # of a side, what rounding and careless tools put outside; clipped
UPRIGHT = (0, 1)  # EXIF's orientations that turn nothing


class YoloTxt:
    """One folder of images, as a `kdmini.contracts.Dataset`.

    Raises UserError, with file and line, for an image whose files are wrong, when it is
    asked for; a link that leads out of the set is such a file.
    """

    truth = Boxes

    def __init__(
        self, root: str, images: str = "images/train", names: list[str] | str = "data.yaml"
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

        # (name, path), where the path of a link that leads out is ""
        self.images: list[tuple[str, str]] = []
        for ending in ENDINGS:  # one by one, for a.jpg and a.png are two images
            self.images += files(folder, (ending,)).items()
        self.images.sort()
        if not self.images:
            raise UserError(
                f"{folder}: holds no image ({', '.join(ENDINGS)}); correct `root` or `images`"
            )
        self.folder = os.path.realpath(folder)
        self.photographs = {(self.folder, os.path.basename(path)) for _, path in self.images}
        self.labels = files(label_folder, (".txt",))
        self.dropped: dict[int, int] = {}  # index -> boxes without a pixel inside the image

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[np.ndarray, Target]:
        """-> image (H, W, 3) uint8 RGB, and its objects, clipped to the image.

        Objects of which less than MIN_SIDE is left are dropped.
        """
        name, path = self.images[index]
        label_path = self.labels.get(name)
        if not path or label_path == "":
            raise UserError(
                f"{self.folder}/{name}: image or labels are a link that leads out; "
                "put a copy in its place"
            )
        if label_path:
            labels, boxes_cxcywh = read_labels(label_path, len(self.names))
        else:
            labels = np.zeros(0, np.int64)
            boxes_cxcywh = np.zeros((0, 4))
        if len(labels) and exif_turns(path):
            raise UserError(
                f"{path}: turned by EXIF, and labels may be for either; "
                "store it turned and without EXIF"
            )

        image = decode(path)
        height, width = image.shape[:2]
        centre = boxes_cxcywh[:, :2]
        half = boxes_cxcywh[:, 2:] / 2
        parts = np.hstack([centre - half, centre + half]).clip(0, 1)
        boxes_xyxy = (parts * [width, height, width, height]).astype(np.float32)
        sides = boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]
        keep = (sides >= MIN_SIDE).all(1)  # (G,)
        if not keep.all():
            self.dropped[index] = int((~keep).sum())  # by index, so that threads need no lock
        return image, {
            "boxes_xyxy": boxes_xyxy[keep],
            "labels": labels[keep],
            "difficult": np.zeros(keep.sum(), bool),
            "id": os.path.basename(path),
        }

    def report(self) -> str:
        remarks = []
        unlabelled = sum(name not in self.labels for name, _ in self.images)
        if unlabelled:
            remarks.append(f"{unlabelled:,} images without a label file")
        dropped = sum(self.dropped.values())
        if dropped:
            remarks.append(f"{dropped:,} boxes under 1 px dropped")
        return ", ".join(remarks)


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


def read_labels(path: str, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """-> labels (G,) int64, boxes_cxcywh (G, 4) float64 in parts of the sides."""
    try:
        content = Path(path).read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    rows = []
    for number, line in enumerate(content.split(b"\n"), 1):
        if line.strip():
            rows.append(read_line(line, f"{path}:{number}", classes))
    table = np.array(rows, float).reshape(-1, 5)
    return table[:, 0].astype(np.int64), table[:, 1:]


def read_line(line: bytes, where: str, classes: int) -> list[float]:
    """class, cx, cy, w, h. where: file and number of the line, for messages."""
    text = line.decode("utf-8", "replace").strip()
    where = f"{where}: {text[:60]!r}"
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


def exif_turns(path: str) -> bool:
    """Whether EXIF asks for the image to be shown turned or mirrored."""
    with opened(path) as image:
        return image.getexif().get(EXIF_ORIENTATION, 1) not in UPRIGHT
