"""Arrays with boxes as a data set."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from kdmini.data.store import Store
from kdmini.detection.truth import Boxes
from tests.data.arrays import Pictures, Size, noise


class Boxed(Pictures):
    """The label of a box is the number of its picture.

    boxes: of each picture, xyxy in its pixels.
    difficult: whether each of these is; none, if not said otherwise.
    """

    truth = Boxes

    def __init__(
        self,
        images: Sequence[np.ndarray],
        boxes: Sequence[Any],
        difficult: Sequence[Any] | None = None,
    ):
        super().__init__(images)
        self.names = tuple(f"class {i}" for i in range(len(images)))
        self.boxes = [np.array(some, np.float32).reshape(-1, 4) for some in boxes]
        self.difficult = difficult or [[False] * len(some) for some in self.boxes]

    def __getitem__(self, index: int) -> tuple[np.ndarray, dict[str, Any]]:
        image, target = super().__getitem__(index)
        boxes = self.boxes[index]
        target["boxes_xyxy"] = boxes
        target["labels"] = np.full(len(boxes), index, np.int64)
        target["difficult"] = np.array(self.difficult[index], bool)
        return image, target


def keep_boxed(
    images: Sequence[np.ndarray],
    imgsz: int,
    boxes: Sequence[Any],
    difficult: Sequence[Any] | None = None,
) -> Store:
    dataset = Boxed(images, boxes, difficult)
    return Store(dataset, imgsz, storage="resident", workers=1)


def noise_with_boxes(sizes: Sequence[Size], further: int = 0, seed: int = 0) -> Boxed:
    """Pictures of noise; the first box of each covers it, random ones follow."""
    rng = np.random.default_rng(seed)
    boxes = []
    for height, width in sizes:
        corners = np.sort(rng.random((further, 2, 2)), 1) * [width, height]
        boxes.append([[0, 0, width, height], *corners.reshape(-1, 4)])
    return Boxed(noise(sizes, seed), boxes)


def some_pictures(count: int = 23, further: int = 3) -> Boxed:
    """Of random sizes, from 16 to 64 pixels."""
    rng = np.random.default_rng(9)
    return noise_with_boxes([tuple(rng.integers(16, 65, 2)) for _ in range(count)], further)
