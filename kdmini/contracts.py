"""What a detector, a dataset, a distillation term and a metric must offer, and the tensors that
pass between them.

Nothing here runs. To add one of the four, write a class with these members in a file of your own
and name it in the config (`build: your_package.your_module:YourClass`); nothing else is touched.

Legend: N images, S image size, G objects (padded), D detections, K classes, C channels.
"""

from __future__ import (
    annotations,
)  # keeps torch out: a mistake in a config is told before torch is imported

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias, TypedDict

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

Losses: TypeAlias = (
    "Mapping[str, Tensor]"  # name -> scalar, already multiplied by its own gain or weight
)
Feats: TypeAlias = "Mapping[str, Tensor]"  # tap -> (N, C, H, W)


class UserError(Exception):
    """A mistake outside the code. The message is one line that names the thing and the remedy."""


class Target(TypedDict):
    """The objects of one image, as a dataset gives them."""

    boxes_xyxy: np.ndarray  # (G, 4) float32, pixels of the image, corners from 0 to width or height
    labels: np.ndarray  # (G,) int64, index into the dataset's names
    difficult: np.ndarray  # (G,) bool; not trained on, neither hit nor miss in evaluation
    id: str  # names the image, unique in the dataset


class Targets(TypedDict):
    """The objects of a training batch, padded to one G."""

    boxes_xyxy: Tensor  # (N, G, 4) float32, pixels of the rendered image
    labels: Tensor  # (N, G) int64, -1 where padded
    ids: list[str]  # N; of a mosaic, the image that it was drawn for


class Detections(TypedDict):
    """What a detector found in one image, best score first."""

    boxes_xyxy: Tensor  # (D, 4) float32, pixels
    scores: Tensor  # (D,) 0..1
    labels: Tensor  # (D,) int64


class View(NamedTuple):
    """What a term sees of one network."""

    feats: Feats  # tap -> (N, C, H, W); the student's are aligned to the teacher's
    preds: Any  # whatever the detector's forward returns; None where no term reads it
    images: Tensor  # (N, 3, S, S) RGB, 0..1


class Dataset(Protocol):
    """Optional: `report()`, one line about what was set right while reading, printed when all
    images are read; `photographs`, a set of what identifies the images: train and val may then
    share none.
    """

    names: list[str]  # K class names; a label is an index into it

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[np.ndarray, Target]:
        """-> image (H, W, 3) uint8 RGB, target. Called from several threads, once per image."""
        ...


class Detector(Protocol):
    """An nn.Module. Its constructor may name `names` (given by the dataset) and `weights` (a file,
    which `eval.py --weights` fills in).

    Optional: `features(images)` runs as much of the network as has taps in it and returns nothing;
    `fold()` merges BatchNorm into the convolutions of a frozen copy; `card` is a dict of plain
    values that `best.pt` carries, so that the weights can be loaded without the config.
    """

    names: list[str]

    def __call__(self, images: Tensor) -> Any:
        """images (N, 3, S, S) RGB 0..1 -> preds, the same in training and evaluation."""
        ...

    def loss(self, preds: Any, targets: Targets) -> Losses:
        """-> named means over the batch, each multiplied by its gain, not by the batch size."""
        ...

    def decode(self, preds: Any, score: float, iou: float, max_det: int) -> list[Detections]:
        """-> one Detections per image, in pixels of the input, after non-maximum suppression."""
        ...

    def train(self, mode: bool = True) -> Any: ...  # these three are nn.Module's own

    def eval(self) -> Any: ...

    def state_dict(self) -> Mapping[str, Tensor]: ...


class Term(Protocol):
    """An nn.Module; its parameters are optimised and saved. Its constructor may name `names`, the
    student's, and `shapes`, {tap: (student C, teacher C, H, W)} before alignment; without a
    teacher, the student's C stands twice.
    Optional: `needs_teacher = False`."""

    uses: set[str]  # {"feats"}, {"preds"} or both: decides what the teacher has to run

    def __call__(self, student: View, teacher: View | None, targets: Targets) -> Tensor:
        """-> scalar, not yet multiplied by weight and lambda. Both networks see the same images."""
        ...


class Metric(Protocol):
    """Its constructor may name `names`. `fitness` is the key of compute() that picks best.pt."""

    fitness: str

    def update(self, detections: list[Detections], targets: list[Target]) -> None:
        """One batch, in pixels of the original images."""
        ...

    def compute(self) -> dict[str, float]: ...
