"""Small data sets of classes, made by a test."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from kdmini.classification.truth import Labels
from tests.data.arrays import Pictures

NAMES = ["cat", "dog", "fish"]


class Animals(Pictures):
    """Pictures whose class is their number modulo three."""

    names = NAMES
    truth = Labels

    def __getitem__(self, index: int) -> tuple[np.ndarray, dict[str, Any]]:
        image, target = super().__getitem__(index)
        return image, {**target, "label": index % len(NAMES)}


def add(root: Path, *names: str, size: tuple[int, int] = (12, 9), **settings: Any) -> None:
    """Images of these paths below root."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (200, 30, 60)).save(path, **settings)
