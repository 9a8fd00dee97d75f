"""How labels travel: from a data set through mosaic, CutMix and MixUp into a batch.

Legend: N images, M images of the store, K classes, J parts of a rendered image.
"""

from typing import Any, TypedDict

import numpy as np
from torch import Tensor

from kdmini.contracts import Prediction
from kdmini.data.layout import Frame, Layout, areas
from kdmini.data.render import to_device
from kdmini.data.store import Store


class Target(TypedDict):
    """The class of one image, as a data set gives it."""

    label: int  # index into the data set's names
    id: str  # names the image, unique in the data set


class Targets(TypedDict):
    """Of a training batch: each image is of several classes, in shares."""

    labels: Tensor  # (N, J) int64
    share: Tensor  # (N, J) float32, of what can be seen of the images; sums to 1
    ids: list[str]


class Labels:
    """A `kdmini.contracts.Truth`. What an image is of is counted in its cells."""

    follows = frozenset({"cutmix", "mixup"})

    @staticmethod
    def split(target: Any) -> tuple[None, Any]:
        """A class is no label of pixels."""
        return None, target

    def __init__(self, store: Store):
        self.imgsz = store.imgsz
        self.device = store.device
        self.labels = np.array([target["label"] for target in store.targets], np.int64)  # (M,)

    def rendered(self, layout: Layout, plane: Tensor | None = None) -> dict[str, Any]:
        """-> `labels` and `share` as in Targets; J is 4, the tiles, or 8 where a second layout
        shines through.
        """
        images = layout.image
        share = shares(layout, self.imgsz)
        if layout.under is not None and layout.share is not None:
            through = layout.share[:, None]
            below = shares(layout.under, self.imgsz)
            images = np.concatenate([images, layout.under.image], 1)
            share = np.concatenate([share * (1 - through), below * through], 1)
        return {
            "labels": to_device(self.labels[images], self.device),
            "share": to_device(share.astype(np.float32), self.device),
        }

    @staticmethod
    def to_file(predictions: list[Prediction], frames: list[Frame]) -> list[Prediction]:
        """A class has no place: as they are."""
        return predictions


def shares(layout: Layout, imgsz: int) -> np.ndarray:
    """(N, 4): of the cells that show an image, those of each tile. All of the first tile where
    every image has been moved out of the picture.
    """
    counts = areas(layout, imgsz)
    counts[:, 0] += counts.sum(1) == 0
    return counts / counts.sum(1, keepdims=True)
