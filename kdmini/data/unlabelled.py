"""Photographs of which nothing is known but what a teacher says: mixed into every batch.

Legend: N images of a batch, those with ground truth first.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdmini.contracts import Dataset, Target, UserError
from kdmini.data.layout import Layout
from kdmini.data.loader import Augment, TrainLoader
from kdmini.data.store import Store


class Nothing:
    """A `kdmini.contracts.Truth` of no truth."""

    follows = frozenset({"cutmix", "mixup"})

    @staticmethod
    def split(target: Target) -> tuple[None, Target]:
        return None, target

    def __init__(self, store: Store):
        pass

    def rendered(self, layout: Layout, plane: Tensor | None = None) -> dict[str, Any]:
        return {}


class Unlabelled:
    """A data set whose ground truth, if it has any, is not looked at."""

    truth: Any = Nothing

    def __init__(self, dataset: Dataset):
        self.dataset = dataset
        self.names = dataset.names
        self.photographs: set[Any] = getattr(dataset, "photographs", set())

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[np.ndarray, Target]:
        image, target = self.dataset[index]
        return image, {"id": target["id"]}


class MixedLoader:
    """Batches of which a share has no ground truth: `targets` are of the images before those.

    An epoch is one of the images with ground truth. The others come in an order of their own,
    which goes on from epoch to epoch: a pure function of the seed and the step.

    batch: images of all ranks together.
    share: of the images that have no ground truth.
    """

    def __init__(  # noqa: PLR0913 - those of TrainLoader, and two more
        self,
        store: Store,
        unlabelled: Store,
        share: float,
        batch: int,
        epochs: int,
        augment: Augment,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ):
        count = others_of(batch, share, world)
        ranks = {"rank": rank, "world": world}
        self.labelled = TrainLoader(store, batch - count, epochs, augment, seed, **ranks)
        if len(unlabelled) < count:
            raise UserError(
                f"data.unlabelled: a batch takes {count} of these images, and there are "
                f"{len(unlabelled)}"
            )
        # a mosaic closes with those of the others, which are not counted in passes
        open_to_the_end = replace(augment, close_mosaic=0)
        self.others = TrainLoader(unlabelled, count, epochs, open_to_the_end, seed + 1, **ranks)
        self.closing = epochs - augment.close_mosaic
        self.closed = TrainLoader(
            unlabelled, count, epochs, replace(augment, mosaic=0.0), seed + 1, **ranks
        )
        print(f"data.unlabelled: {len(unlabelled):,} images, {count} of the {batch} of every batch")
        self.batch = batch
        self.augment = augment
        self.store = store
        self.imgsz = store.imgsz
        self.device = store.device

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self.labelled)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """As TrainLoader has it; `targets` are of the first images alone."""
        pairs = zip(self.labelled.epoch(epoch, start), self.from_step(epoch, start), strict=False)
        for (images, targets), (others, _) in pairs:
            yield torch.cat([images, others]), targets

    def from_step(self, epoch: int, start: int) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """Batches without ground truth from a step of the run on, without end."""
        loader = self.closed if epoch >= self.closing else self.others
        passes, number = divmod(epoch * len(self) + start, len(loader))
        while True:
            yield from loader.epoch(passes, number)
            passes += 1
            number = 0


def others_of(batch: int, share: float, world: int) -> int:
    """How many images of a batch have no ground truth. Raises UserError where that is none, or
    all, or does not share out among the ranks.
    """
    count = round(batch * share)
    if not 0 < count < batch or count % world or (batch - count) % world:
        raise UserError(
            f"data.unlabelled.share: {share} of {batch} images is {count}; of both kinds there "
            f"have to be some{f', a multiple of {world}' if world > 1 else ''}"
        )
    return count
