"""Data sets of arrays, random pictures, and random ways to lay them out."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from kdmini.data.layout import Frame, Layout, letterbox, mosaic, zoom
from kdmini.data.store import Store

Size = tuple[int, int]  # height, width


class NoTruth:
    """The truth of a task that needs none."""

    def __init__(self, store: Store):
        pass

    @staticmethod
    def split(target: Any) -> tuple[None, Any]:
        return None, target

    def rendered(self, layout: Layout, plane: Any) -> dict[str, Any]:
        return {}

    @staticmethod
    def to_file(predictions: list[Any], frames: list[Frame]) -> list[Any]:
        return predictions


class Pictures:
    """Arrays as a data set; an exception in the place of an array is raised."""

    names = ("thing",)
    truth: type = NoTruth

    def __init__(self, images: Sequence[np.ndarray | BaseException]):
        self.images = list(images)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[np.ndarray, dict[str, Any]]:
        image = self.images[index]
        if isinstance(image, BaseException):
            raise image
        return image, {"id": f"picture {index}"}


def noise(sizes: Sequence[Size], seed: int = 0) -> list[np.ndarray]:
    """A random picture of each size."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (*size, 3), np.uint8) for size in sizes]


def keep(images: Sequence[np.ndarray], imgsz: int) -> Store:
    return Store(Pictures(images), imgsz, storage="resident", workers=1)


class Mosaics(NamedTuple):
    """N mosaics with their zoom and shift, and which of them are mirrored."""

    four: np.ndarray  # (N, 4) pictures
    centre: np.ndarray  # (N, 2) x, y on the canvas, where they meet
    factor: np.ndarray  # (N,)
    to: np.ndarray  # (N, 2) x, y to which the middle of the canvas goes
    mirrored: np.ndarray  # (N,) bool


def random_mosaics(count: int, pictures: int, size: int, seed: int) -> Mosaics:
    """Some are shifted far enough to show the end of the canvas."""
    rng = np.random.default_rng(seed)
    return Mosaics(
        four=rng.integers(0, pictures, (count, 4)),
        centre=size * rng.uniform(0.5, 1.5, (count, 2)),
        factor=rng.uniform(0.3, 1.7, count),
        to=size * rng.uniform(0.1, 0.9, (count, 2)),
        mirrored=rng.random(count) < 0.5,
    )


def zoomed_mosaic(store: Store, drawn: Mosaics, size: int) -> Layout:
    whole = mosaic(store, drawn.four, size, drawn.centre)
    return zoom(whole, drawn.factor, size, drawn.to)


def zoomed_letterbox(store: Store, drawn: Mosaics, size: int) -> Layout:
    """Of the first picture of each."""
    whole = letterbox(store, drawn.four[:, 0], size)
    return zoom(whole, drawn.factor, size / 2, drawn.to)
