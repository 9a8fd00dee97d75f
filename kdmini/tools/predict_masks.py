"""What predict writes of a network that labels pixels: each mask, and it over its picture."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from kdmini.contracts import Prediction
from kdmini.data.palette import palette_png
from kdmini.files import write_whole
from kdmini.segmentation.maps import Segmenter
from kdmini.tools.draw_masks import overlay, shares

STEADY_ROWS = 2  # of a legend that does not grow with the classes


class MaskWriter:
    """A `kdmini.tools.writers.Writer`."""

    options: tuple[str, ...] = ()

    def __init__(self, segmenter: Segmenter):
        self.segmenter = segmenter
        self.names = segmenter.names

    def decode(self, preds: list[Tensor]) -> list[Prediction]:
        return self.segmenter.decode(preds)

    def save(self, prediction: Prediction, out: Path, stem: str) -> dict[str, str]:
        name = f"{stem}.png"
        write_whole(out / name, palette_png(prediction["mask"].numpy()))
        return {"mask": name}

    def entry(self, prediction: Prediction) -> dict[str, Any]:
        parts = shares(prediction["mask"].numpy())
        return {"classes": {self.names[label]: round(part, 4) for label, part in parts.items()}}

    def draw(self, image: Image.Image, prediction: Prediction, steady: bool = False) -> Image.Image:
        rows = STEADY_ROWS if steady else None
        return overlay(image, prediction["mask"].numpy(), self.names, rows)

    def named(self, entry: Mapping[str, Any]) -> list[str]:
        return list(entry["classes"])

    def summary(self, found: Counter[str]) -> str:
        return f"{len(found)} of {len(self.names)} classes found"
