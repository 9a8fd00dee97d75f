"""A weight file by itself -> a detector, and images by themselves: what visualize, predict and
export begin with.

The file says its scale, its classes and the image size it was trained at, so that no config is
needed."""

from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdmini.contracts import Target
from kdmini.detection.yolo11 import weights
from kdmini.detection.yolo11.model import YOLO11
from kdmini.detection.yolo11.pickled import interpret, unzip
from kdmini.weightfile import find

USUAL, LARGEST = 640, 4096  # pixels


def load_detector(path: str | Path, device: str | torch.device = "cpu") -> tuple[YOLO11, int]:
    """-> the detector in eval mode, with the file's own classes, and the image size that it was
    trained at.

    path: best.pt of kdmini or a public YOLO11 file. Prints one line that says what it is; raises
    UserError."""
    found = find(path)
    with redirect_stdout(None):  # YOLO11 reads the file again, and says what it is
        scale = weights.read(found).scale
    detector = YOLO11(
        [],
        list(scale) if isinstance(scale, tuple) else scale,
        {"path": str(found), "classes": "keep"},
    )
    return detector.eval().to(device), trained_size(found)


def trained_size(path: Path) -> int:
    """The image size that a readable weight file states; 640 where it does not, or states none to
    work with.
    """
    content: Any = interpret(unzip(path.read_bytes())["data.pkl"])
    settings = content.get("train_args")
    size = content.get("imgsz", settings.get("imgsz") if isinstance(settings, dict) else None)
    return size if type(size) is int and 0 < size <= LARGEST and size % 32 == 0 else USUAL


def without_objects(name: str) -> Target:
    """The target of an image that nobody has annotated."""
    none = np.zeros(0)
    return Target(
        boxes_xyxy=none.reshape(0, 4), labels=none.astype(int), difficult=none.astype(bool), id=name
    )
