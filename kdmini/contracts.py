"""What a data set, its truth, a model, a term and a metric must offer, and what passes
between them.

Nothing here runs. To add one of the five, write a class with these members in a file of
your own and name it in the config (`build: your_package.your_module:YourClass`); nothing
else is touched. What a target, a prediction or `preds` holds is the affair of the task,
such as kdmini/detection; the core hands them on.

Legend: N images, S image size, K classes, C channels, H W cells.
"""

from __future__ import annotations  # keeps torch out: a config's mistake is told before its import

from collections.abc import Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

# name -> scalar, already multiplied by its own gain or weight
Losses: TypeAlias = "Mapping[str, Tensor]"
# tap -> (N, C, H, W)
Feats: TypeAlias = "Mapping[str, Tensor]"
# the ground truth of one image, as the data set gives it; `id` names the image
Target: TypeAlias = "Mapping[str, Any]"
# the ground truth of a rendered batch, on the device; `ids` names its N images
Targets: TypeAlias = "Mapping[str, Any]"
# what a model says of one image: name -> tensor
Prediction: TypeAlias = "Mapping[str, Any]"


class UserError(Exception):
    """A mistake outside the code. The message is one line that names the thing and the remedy."""


class BadObjects(UserError):
    """Some objects of an image cannot be used, others can.

    lines: what is wrong with each. rest: the sample without them, for `on_bad: skip`.
    """

    def __init__(self, lines: list[str], rest: tuple[np.ndarray, Target]):
        super().__init__(lines[0])
        self.lines = lines
        self.rest = rest


class Truth(Protocol):
    """How the ground truth of a task travels with its images. One is made of every store
    (kdmini/data/store.py) that is trained from.

    Optional: `follows`, which of "cutmix" and "mixup" its labels can follow; without it none.
    """

    @staticmethod
    def split(target: Target) -> tuple[np.ndarray | None, Target]:
        """-> labels of pixels (H, W) uint8, 255 for none, which then travel with the pixels
        through mosaic, zoom and flip; and what is left. None where the task has none.

        Of images to learn from alone: those to evaluate keep their targets whole.
        """
        ...

    def __init__(self, store: Any): ...

    def rendered(self, layout: Any, plane: Tensor | None) -> dict[str, Any]:
        """-> the targets of a rendered batch, on the store's device; the loader adds `ids`.

        layout: where each image of the batch comes from and lies (kdmini/data/layout.py).
        plane: the labels of its pixels, (N, S, S) uint8, where `split` gave some.
        """
        ...

    @staticmethod
    def to_file(predictions: list[Prediction], frames: list[Any]) -> list[Prediction]:
        """From pixels of the letterboxed images to pixels of the files.

        frames: how each of them lies over its file (Frame in kdmini/data/layout.py).
        """
        ...


class Dataset(Protocol):
    """Optional: `report()`, one line about what was set right while reading, printed when
    all images are read; it raises UserError where that is too much. `photographs`, a set of
    what identifies the images: train and val may then share none. `ids`, a list of the names
    of the images: val may then be a share of train.
    """

    names: list[str]  # K class names; a label is an index into it
    truth: type[Truth]  # of its task

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[np.ndarray, Target]:
        """-> image (H, W, 3) uint8 RGB, target. Called from several threads, once per image,
        and before that for a few of them, to see how large they are.

        Raises UserError for an image that cannot be used, BadObjects for some of its objects.
        """
        ...


class Model(Protocol):
    """An nn.Module. Its constructor may name `names` (given by the data set) and `weights`
    (a file, which `eval.py --weights` fills in).

    Optional: `features(images)` runs all of the network but its head, for the hooks on it, and
    returns nothing; `fold()` merges BatchNorm into the convolutions of a frozen copy;
    `hold_in(dtype)` keeps its weights in the type that autocast would make of them; `card` is a
    dict of plain values that `best.pt` carries, so that the weights can be loaded without the
    config; `unread` lists the classes of which its file of weights knew nothing, so that they
    are not scored; `make_head(channels)` makes a fresh head for maps of these channels, whose
    output `loss` understands; `class_maps(preds)` is a list of maps of class logits
    (N, K, H, W), for terms that read `classes`, whatever the layout of preds; `to_map(name,
    output)` makes a map (N, C, H, W) of what a tapped submodule gives, such as tokens.
    Of a teacher of other classes, terms read feats alone; it then needs no loss and no decode.
    """

    names: list[str]

    def __call__(self, images: Tensor) -> Any:
        """images (N, 3, S, S) RGB 0..1 -> preds, the same in training and evaluation."""
        ...

    def loss(self, preds: Any, targets: Targets) -> Losses:
        """-> named scalars, each normalised and multiplied by its gain, not by the batch
        size, which is the loop's affair.
        """
        ...

    def decode(self, preds: Any) -> list[Prediction]:
        """-> one of each image, in pixels of the input. Further parameters have defaults,
        those of evaluation.
        """
        ...

    def train(self, mode: bool = True) -> Any: ...  # these three are nn.Module's own

    def eval(self) -> Any: ...

    def state_dict(self) -> Mapping[str, Tensor]: ...


class View(NamedTuple):
    """What a term sees of one network."""

    feats: Feats  # tap -> (N, C, H, W); the student's are aligned to the teacher's
    preds: Any  # what forward returns; None of a teacher that ran without its head
    images: Tensor  # (N, 3, S, S) RGB, 0..1
    # the model's class_maps(preds), (N, K, H, W) each; None where no term reads them
    classes: Sequence[Tensor] | None = None
    # of taps where the teacher gives weights between positions, (N, heads, L, P): these, and of
    # the student the same or a map (N, C, H, W); neither aligned nor resized
    graphs: Feats | None = None


class Term(Protocol):
    """An nn.Module; its parameters are optimised and saved.

    Its constructor may name `names`, the student's; `shapes`, {tap: (student C, teacher C,
    H, W)} before alignment, where without a teacher the student's C stands twice; `graphs`,
    the same of the taps in `View.graphs`, with the student's H, W; `teacher_names`; and
    `student` and `teacher`, the networks themselves, which must not become submodules of the
    term: the teacher frozen, or None.
    Optional: `needs_teacher = False`; `by_name = True` of a term that reads classes, of a
    teacher with others too.
    """

    # of "feats", "preds", "classes": decides what the teacher has to run; and "targets", where it
    # needs the ground truth, which unlabelled images lack
    uses: Set[str]

    def __call__(self, student: View, teacher: View | None, targets: Targets) -> Tensor:
        """-> scalar, not yet multiplied by weight and lambda. Both saw the same images."""
        ...


class Metric(Protocol):
    """Its constructor may name `names`.

    Optional: `chance()`, the fitness of the commonest answer, 0 where it is not there;
    `summary`, the names of the scores that short tables show; `per_class()`,
    {row: {column: number}}, with the scores of compute() and counts; `official()`, {name:
    score} of the field's own tool, whose name is `official_by`; `save(path)`, which writes
    the predictions and returns where; `figures`, "package.module:function", which draws its
    pictures from it; and for a report `analysis()`, {title: {row: {column: number}}}, what the
    scores are made of, the first column being what is compared; `confusion()`, counts by true
    and predicted class, a last one for none of them; `per_image()`, {id: number}, more for a
    better image.
    """

    fitness: str  # the key of compute() that picks best.pt
    # one of each batch, small: several processes exchange them before compute()
    records: list[Any]

    def update(self, predictions: list[Any], targets: list[Any]) -> None:
        """One batch of Predictions and Targets, in pixels of the files: appends a record."""
        ...

    def compute(self) -> dict[str, float]: ...
