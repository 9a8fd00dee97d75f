"""What predict writes of a network that labels pixels: each mask, and it over its picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from kdmini.contracts import Prediction
from kdmini.data.palette import palette_png
from kdmini.files import write_whole
from kdmini.segmentation.maps import Segmenter
from kdmini.tools.canvas import save_jpeg
from kdmini.tools.draw_masks import overlay, shares


class MaskWriter:
    """A `kdmini.tools.predict.Writer`."""

    options: tuple[str, ...] = ()

    def __init__(self, segmenter: Segmenter):
        self.segmenter = segmenter
        self.names = segmenter.names

    def decode(self, preds: list[Tensor]) -> list[Prediction]:
        return self.segmenter.decode(preds)

    def write(
        self, image: Image.Image, prediction: Prediction, out: Path, stem: str
    ) -> dict[str, Any]:
        mask = prediction["mask"].numpy()
        names = {"picture": f"{stem}.jpg", "mask": f"{stem}.png"}
        save_jpeg(overlay(image, mask, self.names), out / names["picture"])
        write_whole(out / names["mask"], palette_png(mask))
        classes = {self.names[label]: round(share, 4) for label, share in shares(mask).items()}
        return {**names, "classes": classes}

    def summary(self, entries: Sequence[dict[str, Any]]) -> str:
        found = {name for entry in entries for name in entry["classes"]}
        return f"{len(found)} of {len(self.names)} classes found; pictures, masks"
