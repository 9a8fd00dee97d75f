"""Batches: which images, and how each is laid out. Every draw is a pure function of (seed,
epoch, index).

So a batch depends neither on workers nor on where a run was interrupted.
Legend: N images, S image size.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from kdmini.bounds import Alpha, Natural, Share, ShareBelowOne, Zoom
from kdmini.contracts import Prediction, Target, UserError
from kdmini.data.layout import Frame, Layout, letterbox, mirror, mosaic, where, zoom
from kdmini.data.mixing import beta, cut, rectangle
from kdmini.data.render import render_labelled
from kdmini.data.store import Store
from kdmini.data.tiles import with_tiles


@dataclass(frozen=True)
class Augment:
    """Strengths of the public recipe's augmentation; all zero renders the plain letterbox.

    mosaic: probability of four images in one.
    translate: largest shift, as a share of the image size.
    scale: zoom is 1 - scale to 1 + scale; or [lowest, highest].
    fliplr: probability of a mirrored image.
    hsv_h: the factor of the hue is 1 - gain to 1 + gain.
    hsv_s: the same for the saturation.
    hsv_v: the same for the value.
    close_mosaic: last epochs without mosaic.
    cutmix: probability that a rectangle shows another image; in place of mosaic.
    cutmix_alpha: the rectangle fills a share drawn from Beta(alpha, alpha), within the border.
    mixup: probability that another image shines through; together with `cutmix` at most 1.
    mixup_alpha: its share of the light is drawn from Beta(alpha, alpha).
    """

    mosaic: Share = 1.0
    translate: Share = 0.1
    scale: ShareBelowOne | tuple[Zoom, Zoom] = 0.5
    fliplr: Share = 0.5
    hsv_h: Share = 0.015
    hsv_s: Share = 0.7
    hsv_v: Share = 0.4
    close_mosaic: Natural = 10
    cutmix: Share = 0.0
    cutmix_alpha: Alpha = 1.0
    mixup: Share = 0.0
    mixup_alpha: Alpha = 0.2

    def __post_init__(self) -> None:
        if isinstance(self.scale, tuple) and self.scale[0] > self.scale[1]:
            low, high = self.scale
            raise UserError(f"data.augment.scale: {low} to {high}; the lowest zoom goes first")
        if self.cutmix + self.mixup > 1:
            raise UserError(
                f"data.augment: cutmix {self.cutmix} and mixup {self.mixup} are more than 1 "
                "together; an image gets one of the two, so lower one"
            )

    def refuse_mixing(self, truth: Any) -> None:
        """Raises UserError where an image may show two, and the truth cannot follow."""
        for name in ("cutmix", "mixup"):
            if getattr(self, name) and name not in getattr(truth, "follows", ()):
                raise UserError(
                    f"data.augment.{name}: the ground truth of this task, {truth.__name__}, does "
                    "not follow it; set it to 0"
                )

    def zoom(self, drawn: np.ndarray) -> np.ndarray:
        """Uniform in [0, 1) -> the factor of each image."""
        if isinstance(self.scale, tuple):
            low, high = self.scale
            return low + (high - low) * drawn
        return 1 + self.scale * (2 * drawn - 1)


class Draws(NamedTuple):
    """What chance decides for each image of a batch, uniform in [0, 1)."""

    partners: np.ndarray  # (N, 3) the other images of a mosaic
    centre: np.ndarray  # (N, 2) where the tiles of a mosaic meet
    zoom: np.ndarray  # (N,)
    shift: np.ndarray  # (N, 2)
    mosaic: np.ndarray  # (N,) for whether there is one
    flip: np.ndarray  # (N,)
    colour: np.ndarray  # (N, 3)
    other: np.ndarray  # (N,) the image that is mixed in
    mix: np.ndarray  # (N,) for whether one is, and how
    share: np.ndarray  # (N,) of it
    hole: np.ndarray  # (N, 2) where it is cut in


def draw(seed: int, epoch: int, indices: np.ndarray) -> Draws:
    """The draws of these images in this epoch; column 0 made the order of the epoch."""
    u = uniforms(seed, epoch, indices, 19)
    return Draws(
        partners=u[:, 1:4],
        centre=u[:, 4:6],
        zoom=u[:, 6],
        shift=u[:, 7:9],
        mosaic=u[:, 9],
        flip=u[:, 10],
        colour=u[:, 11:14],
        other=u[:, 14],
        mix=u[:, 15],
        share=u[:, 16],
        hole=u[:, 17:19],
    )


class TrainLoader:
    """Augmented batches of one size; what is left of an epoch's order after the last full
    batch is not used.

    batch: images of all ranks together; this one renders the `rank`-th of `world` equal
    shares.
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
        refuse_few(len(store), batch)
        self.store = store
        self.truth = store.truth(store)
        self.imgsz = store.imgsz
        self.device = store.device
        self.batch = batch
        self.epochs = epochs
        self.augment = augment
        self.seed = seed
        self.rank = rank
        self.world = world

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self.store) // self.batch

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """Batches of an epoch from number `start` on: images (N, 3, S, S) RGB 0..1 and
        targets, on the device.
        """
        everyone = np.arange(len(self.store))
        order = uniforms(self.seed, epoch, everyone, 1)[:, 0].argsort(kind="stable")
        share = self.batch // self.world
        firsts = range(start * self.batch, len(self) * self.batch, self.batch)
        begins = [first + self.rank * share for first in firsts]
        layouts = (self.layout(epoch, order[begin : begin + share]) for begin in begins)
        for layout, tiles in with_tiles(self.store, layouts):
            images, plane = render_labelled(self.store, layout, self.imgsz, tiles)
            targets = self.truth.rendered(layout, plane)
            # tile 0 is of the image that the others were drawn for
            targets["ids"] = [self.store.targets[i]["id"] for i in layout.image[:, 0]]
            yield images, targets

    def layout(self, epoch: int, indices: np.ndarray) -> Layout:
        """The layout of each image in this epoch; indices (N,)."""
        augment = self.augment
        draws = draw(self.seed, epoch, indices)
        closed = epoch >= self.epochs - augment.close_mosaic
        layout = self.unmixed(indices, draws, 0.0 if closed else augment.mosaic)
        if not augment.cutmix and not augment.mixup:
            return layout

        # the other image is laid out by its own draws, as it is where it stands alone
        others = (draws.other * len(self.store)).astype(np.int64)
        other = self.unmixed(others, draw(self.seed, epoch, others), mosaic_share=0.0)
        hole = rectangle(beta(draws.share, augment.cutmix_alpha), draws.hole, self.imgsz)
        with_hole = cut(self.unmixed(indices, draws, mosaic_share=0.0), other, hole)
        is_cut = draws.mix < augment.cutmix
        layout = where(is_cut, with_hole, layout)
        if not augment.mixup:
            return layout
        is_mixed = ~is_cut & (draws.mix < augment.cutmix + augment.mixup)
        share = np.where(is_mixed, beta(draws.share, augment.mixup_alpha), 0.0)
        return replace(layout, under=other, share=share)

    def unmixed(self, indices: np.ndarray, draws: Draws, mosaic_share: float) -> Layout:
        """The layout of each image before another one is mixed in.

        mosaic_share: probability of a mosaic.
        """
        augment = self.augment
        size = self.imgsz
        factor = augment.zoom(draws.zoom)
        to = (0.5 + augment.translate * (2 * draws.shift - 1)) * size

        partners = (draws.partners * len(self.store)).astype(np.int64)
        four_images = np.column_stack([indices, partners])
        four = mosaic(self.store, four_images, size, (0.5 + draws.centre) * size)
        four = zoom(four, factor, size, to)  # the canvas is twice the size: this is its middle
        one = zoom(letterbox(self.store, indices, size), factor, size / 2, to)
        layout = where(draws.mosaic < mosaic_share, four, one)

        layout = mirror(layout, draws.flip < augment.fliplr, size)
        gains = np.array([augment.hsv_h, augment.hsv_s, augment.hsv_v])
        if not gains.any():
            return layout
        return replace(layout, colour=1 + gains * (2 * draws.colour - 1))


class ValLoader:
    """Letterboxed images in order, each once; of `world` ranks, this has batch `rank`,
    `rank + world`, ...
    """

    def __init__(self, store: Store, batch: int, rank: int = 0, world: int = 1):
        check_batch(batch, world)
        self.store = store
        self.imgsz = store.imgsz
        self.device = store.device
        self.batch = batch // world
        self.starts = range(rank * self.batch, len(store), batch)

    def __len__(self) -> int:
        """Batches of this rank."""
        return len(self.starts)

    def __iter__(
        self,
    ) -> Iterator[tuple[Tensor, list[Target], Callable[[list[Prediction]], list[Prediction]]]]:
        """-> images (N, 3, S, S) RGB 0..1, targets in pixels of the files, and the way back
        to those pixels.
        """
        everyone = np.arange(len(self.store))
        layouts = (
            letterbox(self.store, everyone[start : start + self.batch], self.imgsz)
            for start in self.starts
        )
        for layout, tiles in with_tiles(self.store, layouts):
            images, _ = render_labelled(self.store, layout, self.imgsz, tiles)
            indices = layout.image[:, 0]
            targets = [self.store.targets[i] for i in indices]
            frames = frames_of(self.store, indices, layout)
            yield images, targets, partial(self.store.truth.to_file, frames=frames)


def frames_of(store: Store, indices: np.ndarray, letterboxed: Layout) -> list[Frame]:
    """How each letterboxed image lies over its file."""
    native = store.native[indices][:, ::-1]  # (N, 2) W, H
    stored = store.sizes[indices][:, ::-1]
    scale = native / stored / letterboxed.a[:, 0]
    corner = letterboxed.b[:, 0]
    return [Frame(*numbers, store.imgsz) for numbers in zip(scale, corner, native, strict=True)]


def refuse_few(images: int, batch: int) -> None:
    """Raises UserError where a batch is more than all training images."""
    if images < batch:
        raise UserError(f"train.batch: {batch} is more than the {images} training images")


def check_batch(batch: int, world: int) -> None:
    if batch % world:
        raise UserError(
            f"train.batch: {batch} images do not share out among {world} processes; give a multiple"
        )


def uniforms(seed: int, epoch: int, indices: np.ndarray, count: int) -> np.ndarray:
    """(M,) indices -> (M, count) numbers in [0, 1), a pure function of (seed, epoch, index,
    column).

    A counter hashed by SplitMix64 (Steele et al., "Fast splittable pseudorandom number
    generators", 2014).
    """
    with np.errstate(over="ignore"):  # wrapping is the point
        key = splitmix64(np.array([seed % 2**64], np.uint64))
        key = splitmix64(key + np.uint64(epoch))
        key = splitmix64(key + np.asarray(indices, np.uint64))[:, None]
        bits = splitmix64(key + np.arange(count, dtype=np.uint64))
        return (bits >> np.uint64(11)) * 2.0**-53


def splitmix64(x: np.ndarray) -> np.ndarray:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
