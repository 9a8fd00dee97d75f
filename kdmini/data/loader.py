"""Batches: which images, and how each is laid out. Every draw is a pure function of (seed, epoch,
index).

So a batch depends neither on workers nor on where a run was interrupted.
Legend: N images, S image size, G objects (padded).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from kdmini.contracts import Target, Targets, UserError
from kdmini.data.render import Layout, choose, letterbox, mirror, mosaic, render, zoom
from kdmini.data.store import Store
from kdmini.detection.truth import Inverse, pad, render_boxes


@dataclass(frozen=True)
class Augment:
    """Strengths of the public recipe's augmentation; all zero renders the plain letterbox.

    mosaic, fliplr: probabilities. translate: share of the image size. scale: zoom is 1 - scale to 1
    + scale. hsv_h, hsv_s, hsv_v: factors are 1 - gain to 1 + gain. close_mosaic: last epochs
    without mosaic."""

    mosaic: float = 1.0
    translate: float = 0.1
    scale: float = 0.5
    fliplr: float = 0.5
    hsv_h: float = 0.015
    hsv_s: float = 0.7
    hsv_v: float = 0.4
    close_mosaic: int = 10


class TrainLoader:
    """Augmented batches of one size; what is left of an epoch's order after the last full batch is
    not used.

    batch: images of all ranks together; this one renders the `rank`-th of `world` equal shares.
    """

    def __init__(
        self,
        store: Store,
        batch: int,
        epochs: int,
        augment: Augment,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ):
        check_batch(batch, world)
        self.store, self.imgsz, self.device, self.rank, self.world = (
            store,
            store.imgsz,
            store.device,
            rank,
            world,
        )
        self.batch, self.epochs, self.augment, self.seed = batch, epochs, augment, seed
        if len(store) < batch:
            raise UserError(f"train.batch: {batch} is more than the {len(store)} training images")

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self.store) // self.batch

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Targets]]:
        """Batches of an epoch from number `start` on: images (N, 3, S, S) RGB 0..1 and targets, on
        the device.
        """
        order = uniforms(self.seed, epoch, np.arange(len(self.store)), 1)[:, 0].argsort(
            kind="stable"
        )
        share = self.batch // self.world
        for number in range(start, len(self)):
            first = number * self.batch + self.rank * share
            indices = order[first : first + share]
            layout = self.draw(epoch, indices)
            images = render(self.store, layout, self.imgsz).to(self.device, non_blocking=True)
            ids = [self.store.targets[i]["id"] for i in indices]
            yield images, pad(render_boxes(self.store, layout, self.imgsz), ids, self.device)

    def draw(self, epoch: int, indices: np.ndarray) -> Layout:
        """The layout of each image in this epoch; indices (N,)."""
        aug, size = self.augment, self.imgsz
        u = uniforms(self.seed, epoch, indices, 14)  # (N, 14); number 0 made the order
        partners = (u[:, 1:4] * len(self.store)).astype(np.int64)
        centre = (0.5 + u[:, 4:6]) * size
        factor = 1 + aug.scale * (2 * u[:, 6] - 1)
        to = (0.5 + aug.translate * (2 * u[:, 7:9] - 1)) * size
        probability = aug.mosaic if epoch < self.epochs - aug.close_mosaic else 0.0
        four = zoom(
            mosaic(self.store, np.column_stack([indices, partners]), size, centre), factor, size, to
        )
        one = zoom(letterbox(self.store, indices, size), factor, size / 2, to)
        layout = mirror(choose(u[:, 9] < probability, four, one), u[:, 10] < aug.fliplr, size)
        gains = np.array([aug.hsv_h, aug.hsv_s, aug.hsv_v])
        return replace(layout, colour=1 + gains * (2 * u[:, 11:14] - 1)) if gains.any() else layout


class ValLoader:
    """Letterboxed images in order, each once; of `world` ranks, this has batch `rank`, `rank +
    world`, ...
    """

    def __init__(self, store: Store, batch: int, rank: int = 0, world: int = 1):
        check_batch(batch, world)
        self.store, self.imgsz, self.device = store, store.imgsz, store.device
        self.batch = batch // world
        self.starts = range(rank * self.batch, len(store), batch)

    def __len__(self) -> int:
        """Batches of this rank."""
        return len(self.starts)

    def __iter__(self) -> Iterator[tuple[Tensor, list[Target], "Inverse"]]:
        """-> images (N, 3, S, S) RGB 0..1, targets in pixels of the files, and the way back to
        those pixels.
        """
        for start in self.starts:
            indices = np.arange(start, min(start + self.batch, len(self.store)))
            layout = letterbox(self.store, indices, self.imgsz)
            native = self.store.native[indices][:, ::-1]  # (N, 2) W, H
            scale = native / self.store.sizes[indices][:, ::-1] / layout.a[:, 0]
            inverse = Inverse(scale, layout.b[:, 0], native)
            images = render(self.store, layout, self.imgsz).to(self.device, non_blocking=True)
            yield images, [self.store.targets[i] for i in indices], inverse


def check_size(imgsz: int, name: str = "data.imgsz") -> None:
    if imgsz < 32 or imgsz % 32:
        raise UserError(f"{name}: {imgsz} is not a multiple of 32, the largest stride")


def check_batch(batch: int, world: int) -> None:
    if batch % world:
        raise UserError(
            f"train.batch: {batch} images do not share out among {world} processes; give a multiple"
        )


def uniforms(seed: int, epoch: int, indices: np.ndarray, count: int) -> np.ndarray:
    """(M,) indices -> (M, count) numbers in [0, 1), a pure function of (seed, epoch, index,
    column).

    A counter hashed by SplitMix64 (Steele et al., "Fast splittable pseudorandom number generators",
    2014)."""

    def mix(x: np.ndarray) -> np.ndarray:
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))

    with np.errstate(over="ignore"):  # wrapping is the point
        key = mix(mix(np.array([seed % 2**64], np.uint64)) + np.uint64(epoch))
        key = mix(key + np.asarray(indices, np.uint64))[:, None]
        return (mix(key + np.arange(count, dtype=np.uint64)) >> np.uint64(11)) * 2.0**-53
