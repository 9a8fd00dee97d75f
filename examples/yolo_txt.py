"""Images with a text file each, the way YOLO tools keep them: `class cx cy w h` a line, in parts of
the image's sides.

    data:
      root: data/mine                                        # data.yaml  images/train/a.jpg  labels/train/a.txt
      train: &set {build: examples.yolo_txt:YoloTxt, images: images/train, names: data.yaml}
      val: {<<: *set, images: images/val}

`names` is the list of classes, or a YAML file in root with `names:`, a list or {0: cat, 1: dog}.
Labels lie where the images do, in a folder `labels` in the place of `images` (train/images, too,
has its labels in train/labels). Folders below that one and lists of files are not read, nor
polygons and keypoints. An image without a label file, or with an empty one, is background. Legend:
G objects of an image.
"""

import codecs
import os
from pathlib import Path

import numpy as np

from kdmini import config
from kdmini.contracts import Target, UserError
from kdmini.data.pictures import EXIF_ORIENTATION, decode, opened
from kdmini.detection.voc import IMAGES, files

ENDINGS = (*IMAGES, ".webp", ".bmp")
SLACK = 0.01  # what rounding and careless tools put outside; clipped


class YoloTxt:
    """One folder of images, as a `kdmini.contracts.Dataset`. Raises UserError, with file and line,
    for an image whose files are wrong, when it is asked for; a link that leads out of the set is
    such a file.
    """

    def __init__(
        self, root: str, images: str = "images/train", names: list[str] | str = "data.yaml"
    ):
        base, parts = Path(root).expanduser().absolute(), Path(images).parts
        if "images" not in parts or ".." in parts or parts[0] == "/":
            raise UserError(
                f"images: {images!r} is no folder in root with a part called `images`; write images/train"
            )
        last = len(parts) - 1 - parts[::-1].index("images")
        folder, labels = base / images, base.joinpath(*parts[:last], "labels", *parts[last + 1 :])
        for place in (folder, labels):
            if not place.is_dir():
                raise UserError(f"{place}: no such folder; correct `root` or `images`")
        self.names = read_names(base / names) if isinstance(names, str) else list(names)
        if not self.names or len(set(self.names)) < len(self.names):
            raise UserError(f"`names` is empty or names a class twice: {self.names}")
        # by ending, for a.jpg and a.png are two images; the path of a link that leads out is ""
        self.images = sorted(image for end in ENDINGS for image in files(folder, (end,)).items())
        if not self.images:
            raise UserError(
                f"{folder}: holds no image ({', '.join(ENDINGS)}); correct `root` or `images`"
            )
        self.folder = os.path.realpath(folder)
        self.photographs = {(self.folder, os.path.basename(path)) for _, path in self.images}
        self.labels = files(labels, (".txt",))
        self.dropped: dict[int, int] = {}  # index -> boxes without a pixel inside the image

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[np.ndarray, Target]:
        """-> image (H, W, 3) uint8 RGB, and its objects, clipped to the image; under 1 px they are
        dropped.
        """
        name, path = self.images[index]
        text = self.labels.get(name)
        if not path or text == "":
            raise UserError(
                f"{self.folder}/{name}: image or labels are a link that leads out; put a copy in its place"
            )
        labels, boxes_cxcywh = (
            read_labels(text, len(self.names)) if text else (np.empty(0, int), np.empty((0, 4)))
        )
        if len(labels) and exif_turn(path):
            raise UserError(
                f"{path}: turned by EXIF, and labels may be for either; store it turned and without EXIF"
            )
        image = decode(path)
        sides = np.array(image.shape[1::-1])  # W, H
        centre, half = boxes_cxcywh[:, :2], boxes_cxcywh[:, 2:] / 2
        boxes_xyxy = (
            np.hstack([centre - half, centre + half]).clip(0, 1) * np.tile(sides, 2)
        ).astype(np.float32)
        keep = (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2] >= 1).all(1)
        if not keep.all():
            self.dropped[index] = int((~keep).sum())  # by index, so that threads need no lock
        easy, id = np.zeros(keep.sum(), bool), os.path.basename(path)
        return image, Target(
            boxes_xyxy=boxes_xyxy[keep], labels=labels[keep], difficult=easy, id=id
        )

    def report(self) -> str:
        bare = sum(name not in self.labels for name, _ in self.images)
        told = [f"{bare:,} images without a label file"] if bare else []
        told += [f"{sum(self.dropped.values()):,} boxes under 1 px dropped"] if self.dropped else []
        return ", ".join(told)


def read_names(path: Path) -> list[str]:
    """The `names` of a data.yaml, in the order of the labels."""
    names = config.load(path).get("names")
    if isinstance(names, dict) and set(names) == set(range(len(names))):
        names = [names[label] for label in range(len(names))]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(
            f"{path}: names: no list of texts, nor texts numbered from 0; quote names like `no` and `1`"
        )
    return names


def read_labels(path: str, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """-> labels (G,) int64, boxes_cxcywh (G, 4) float64, in parts of the image's sides."""
    try:
        content = Path(path).read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    rows = []
    for number, line in enumerate(content.split(b"\n"), 1):
        try:
            row = [float(word) for word in line.split()]
        except ValueError:
            row = [np.nan]
        if not row:
            continue
        where = f"{path}:{number}: {line.decode('utf-8', 'replace').strip()[:60]!r}"
        if len(row) != 5 or not all(np.isfinite(row)):
            raise UserError(f"{where} is not `class cx cy w h`, five numbers; correct the line")
        if row[0] not in range(classes):
            raise UserError(
                f"{where}: class {row[0]:g}, but names go from 0 to {classes - 1}; correct either"
            )
        if not all(-SLACK <= part <= 1 + SLACK for part in row[1:]):
            raise UserError(
                f"{where}: not parts of the image's sides, from 0 to 1; divide pixels by width and height"
            )
        rows.append(row)
    table = np.array(rows, float).reshape(-1, 5)
    return table[:, 0].astype(np.int64), table[:, 1:]


def exif_turn(path: str) -> bool:
    """Whether EXIF asks for the image to be shown turned or mirrored."""
    with opened(path) as image:
        return image.getexif().get(EXIF_ORIENTATION, 1) not in (0, 1)
