"""How masks travel: from a data set through mosaic, zoom and flip into a batch, in the fourth
byte of the pixels; and from maps of logits back to the files.

Legend: N images, S image size, K classes, H W pixels of a file, h w cells of a map.
"""

from typing import Any, TypedDict

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kdmini.contracts import Prediction
from kdmini.data.layout import Frame, Layout
from kdmini.data.render import NO_LABEL
from kdmini.data.store import Store

VOID = NO_LABEL  # counts neither in the loss nor in a score

# numbers that are computed at once: 150 classes of 3000 x 2000 pixels would be 3.4 GB together
AT_ONCE = 1 << 22


class Target(TypedDict):
    """The classes of the pixels of one image, as a data set gives them."""

    mask: np.ndarray  # (H, W) uint8, index into the data set's names, VOID
    id: str  # names the image, unique in the data set


class Targets(TypedDict):
    """Of a training batch."""

    mask: Tensor  # (N, S, S) uint8, VOID outside the images too
    ids: list[str]


class Masks:
    """A `kdmini.contracts.Truth`."""

    follows = frozenset({"cutmix"})  # a rectangle of another image brings its own pixels' labels

    def __init__(self, store: Store):
        pass

    @staticmethod
    def split(target: Any) -> tuple[np.ndarray, Any]:
        rest = {key: value for key, value in target.items() if key != "mask"}
        return target["mask"], rest

    def rendered(self, layout: Layout, plane: Tensor | None) -> dict[str, Any]:
        """-> `mask` as in Targets."""
        return {"mask": plane}

    @staticmethod
    def to_file(predictions: list[Prediction], frames: list[Frame]) -> list[Prediction]:
        """Maps of `logits` (K, h, w) of the letterboxed squares -> `mask` (H, W) uint8: the logits
        of each pixel, and not the classes, are interpolated.
        """
        return [
            {"mask": native_classes(prediction["logits"], frame)}
            for prediction, frame in zip(predictions, frames, strict=True)
        ]


def native_classes(logits: Tensor, frame: Frame) -> Tensor:
    """(K, h, w) -> (H, W) uint8."""
    width, height = (int(side) for side in frame.native)
    # -1..1 over the square, as grid_sample wants it
    across, down = (
        torch.from_numpy(2 * ((np.arange(side) + 0.5) / scale + corner) / frame.imgsz - 1).to(
            logits.device, torch.float32
        )
        for side, scale, corner in zip((width, height), frame.scale, frame.corner, strict=True)
    )
    rows = max(AT_ONCE // (len(logits) * width), 1)
    strips = []
    for strip in down.split(rows):
        grid = torch.stack(torch.meshgrid(strip, across, indexing="ij")[::-1], -1)  # x, y
        sampled = F.grid_sample(
            logits[None].float(), grid[None], padding_mode="border", align_corners=False
        )
        strips.append(sampled[0].argmax(0).to(torch.uint8))
    return torch.cat(strips)
