"""Objects in images of 96 x 64 pixels, and raw maps of that size."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdmini.detection.boxes import anchor_points

STRIDES = (8, 16, 32)
SIZES = ((8, 12), (4, 6), (2, 3))  # H, W of each level
BINS = 16
BOX_CHANNELS = 4 * BINS
CLASSES = 3


class Object(NamedTuple):
    box_xyxy: list[float]
    label: int


CROWD = [
    Object([4, 6, 60, 50], 0),
    Object([10, 10, 58, 52], 0),
    Object([8, 4, 66, 60], 2),
    Object([50, 20, 94, 62], 1),
    Object([30.5, 12.25, 47.75, 39], 1),
]
SCENES = [CROWD, [], [Object([70, 3, 92, 30], 2)]]


def targets_of(*scenes: list[Object]) -> Any:
    """One image for each scene, padded to one G."""
    most = max(len(objects) for objects in scenes)
    boxes_xyxy = torch.zeros(len(scenes), most, 4)
    labels = torch.full((len(scenes), most), -1)
    for n, objects in enumerate(scenes):
        for g, item in enumerate(objects):
            boxes_xyxy[n, g] = torch.tensor(item.box_xyxy)
            labels[n, g] = item.label
    return {"boxes_xyxy": boxes_xyxy, "labels": labels}


def random_maps(images: int, seed: int = 0) -> list[Tensor]:
    torch.manual_seed(seed)
    maps = []
    for height, width in SIZES:
        level = torch.randn(images, BOX_CHANNELS + CLASSES, height, width)
        maps.append(level.mul(2).requires_grad_())
    return maps


def all_points() -> tuple[Tensor, Tensor]:
    """-> x y (A, 2), stride (A, 1)."""
    return anchor_points(SIZES, STRIDES, torch.device("cpu"))
