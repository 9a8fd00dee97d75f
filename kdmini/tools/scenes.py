"""What pictures are drawn from: a few images, and what else of a run a task needs.

A task draws its own pictures: its metric names a function, `figures =
"package.module:name"`, that takes a Material and yields the name and the Figure of each
picture that can be drawn from it.

Legend: N images, S image size, C channels, H W cells.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, nn

from kdmini.contracts import Target
from kdmini.data.layout import Frame, letterbox
from kdmini.data.loader import TrainLoader, frames_of
from kdmini.data.render import render_labelled
from kdmini.data.store import Store
from kdmini.data.tiles import with_tiles
from kdmini.distill.taps import feats_of

SEED = 0  # of images at random


class Scenes(NamedTuple):
    """Images to look at."""

    images: Tensor  # (N, 3, S, S) RGB 0..1, letterboxed
    targets: list[Target]  # N, in pixels of the files
    frames: list[Frame]  # N, how the images lie over their files
    annotated: bool = True  # whether the targets are known

    @property
    def pictures(self) -> np.ndarray:
        """(N, S, S, 3), for matplotlib."""
        return self.images.permute(0, 2, 3, 1).cpu().numpy()

    @property
    def ids(self) -> list[str]:
        return [target["id"] for target in self.targets]


def spread_scenes(store: Store, count: int) -> Scenes:
    """Images from all over a store, for those of one class may stand together; `count` at
    most.
    """
    count = min(count, len(store))
    return scenes_at(store, np.arange(count) * len(store) // count)


def random_scenes(store: Store, count: int) -> Scenes:
    """Images of a store that nobody chose, the same each time, `count` at most."""
    shuffled = np.random.default_rng(SEED).permutation(len(store))
    return scenes_at(store, np.sort(shuffled[:count]))


def scenes_at(store: Store, indices: np.ndarray, annotated: bool = True) -> Scenes:
    """The images of these numbers."""
    letterboxed = letterbox(store, indices, store.imgsz)
    ((layout, tiles),) = with_tiles(store, [letterboxed])
    images, _ = render_labelled(store, layout, store.imgsz, tiles)
    targets = [store.targets[index] for index in indices]
    return Scenes(images, targets, frames_of(store, indices, layout), annotated)


def feats_at(taps: Sequence[str], model: nn.Module, images: Tensor) -> list[Tensor]:
    """-> the output of each tap, (N, C, H, W), in their order."""
    feats = feats_of(model, taps, images)
    return [feats[tap] for tap in taps]


@dataclass(frozen=True)
class Material:
    """What a task has to draw from.

    Of a run, `figures` is called with the loader, with student and teacher, and with metric
    and validation set, each as soon as it is there; of weights alone, with the student.
    """

    # the training images as they are rendered
    train_loader: TrainLoader | None = None

    # the trained student, on the device of the scenes
    student: Any = None
    weights: str = ""  # names its weights in a title
    teacher: Any = None  # likewise; None where the run has none
    scenes: Scenes | None = None

    # the metric of the run, after the whole validation set, and that set
    metric: Any = None
    store: Store | None = None
