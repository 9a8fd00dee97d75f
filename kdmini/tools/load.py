"""Weights by themselves, and images: what visualize, predict and export begin with.

A weight file says its scale, its classes and the image size it was trained at, so that no
config is needed. Images by themselves have targets without objects.
"""

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
from kdmini.detection.yolo11.pickled import interpret, unzip
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
        scale = weights.read(weights_path).scale

    detector = YOLO11(
        names=[],
        scale=list(scale) if isinstance(scale, tuple) else scale,
        weights={"path": str(weights_path), "classes": "keep"},
    )
    return detector.eval().to(device), trained_imgsz(weights_path)


def trained_imgsz(path: Path) -> int:
    """The image size that a readable file states, or DEFAULT_IMGSZ for an unusable one."""
    content: Any = interpret(unzip(path.read_bytes())["data.pkl"])
    if "imgsz" in content:  # best.pt of kdmini
        imgsz = content["imgsz"]
    else:  # a public file keeps it among the settings of its training
        settings = content.get("train_args")
        imgsz = settings.get("imgsz") if isinstance(settings, dict) else None

    usable = type(imgsz) is int and 0 < imgsz <= MAX_IMGSZ and imgsz % STRIDE == 0
    return imgsz if usable else DEFAULT_IMGSZ


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
        self.refused: list[Path] = []

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[np.ndarray, Target]:
        path = self.paths[index]
        try:
            image = self.read(path)
        except UserError:
            self.refused.append(path)
            raise
        return image, without_objects(self.ids[index])

    def read(self, path: Path) -> np.ndarray:
        """An image file as (H, W, 3) uint8 RGB. Raises UserError."""
        if not path.is_file():  # a pipe would be waited for
            raise UserError(f"{path}: no such file")
        return decode(path, self.formats)


def without_objects(name: str) -> Target:
    """The target of an image that nobody has annotated."""
    return {
        "boxes_xyxy": np.zeros((0, 4), np.float32),
        "labels": np.zeros(0, np.int64),
        "difficult": np.zeros(0, bool),
        "id": name,
    }
