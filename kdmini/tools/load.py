"""Weights by themselves, and images: what visualize, predict and export begin with.

A weight file says its scale, its classes and the image size it was trained at, so that no
config is needed. Images by themselves have targets without objects.
"""

import os
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdmini.contracts import Truth, UserError
from kdmini.data.pictures import FORMATS, decode
from kdmini.detection.truth import Boxes, Target
from kdmini.detection.yolo11 import weights
from kdmini.detection.yolo11.model import YOLO11
from kdmini.typed import printable
from kdmini.weightfile import find

DEFAULT_IMGSZ = 640  # pixels, of a file that states no size to work with
MAX_IMGSZ = 4096  # pixels; a file that states more is not believed
STRIDE = 32  # pixels; an image size is a multiple of it

FIGURES = "kdmini.tools.detections:figures"  # draws what the detector detects: see scenes.py


def load_detector(path: str | Path, device: str | torch.device = "cpu") -> tuple[YOLO11, int]:
    """-> the detector in eval mode, and the image size that it was trained at.

    path: best.pt of kdmini or a public YOLO11 file, whose classes are kept. Prints one
    line that says what it is; raises UserError.
    """
    weights_path = find(path)
    with redirect_stdout(None):  # YOLO11 reads the file again, and says what it is
        file = weights.read(weights_path)

    detector = YOLO11(
        names=[],
        scale=file.scale or "s",  # every file that names its classes states its scale too
        weights={"path": str(weights_path), "classes": "keep"},
    )
    return detector.eval().to(device), usable_imgsz(file.imgsz)


def usable_imgsz(stated: Any) -> int:
    """The image size that a file states, or DEFAULT_IMGSZ for one that is not to be used."""
    usable = type(stated) is int and 0 < stated <= MAX_IMGSZ and stated % STRIDE == 0
    return stated if usable else DEFAULT_IMGSZ


class Photographs:
    """Image files without annotations, as a `kdmini.contracts.Dataset`.

    ids: of the images. formats: Pillow's names of what is read. `refused` has the files
    that could not be read.
    """

    truth: type[Truth] = Boxes

    def __init__(
        self, paths: Sequence[Path], ids: Sequence[str], formats: tuple[str, ...] = FORMATS
    ):
        self.names: list[str] = []
        self.paths = paths
        self.ids = ids
        self.formats = formats
        self.refused: dict[int, Path] = {}  # by index: some are read twice

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[np.ndarray, Target]:
        path = self.paths[index]
        try:
            image = self.read(path)
        except UserError:
            self.refused[index] = path
            raise
        return image, without_objects(self.ids[index])

    def read(self, path: Path) -> np.ndarray:
        """An image file as (H, W, 3) uint8 RGB. Raises UserError."""
        if not os.path.isfile(path):  # a pipe would be waited for
            raise UserError(f"{printable(path)}: no such file")
        try:
            return decode(path, self.formats)
        except UserError as error:
            raise UserError(printable(error)) from None


def without_objects(name: str) -> Target:
    """The target of an image that nobody has annotated."""
    return {
        "boxes_xyxy": np.zeros((0, 4), np.float32),
        "labels": np.zeros(0, np.int64),
        "difficult": np.zeros(0, bool),
        "id": name,
    }
