"""FRSKD: a small network refines the student's own maps and teaches the student.

There is no teacher network.

Source: Ji et al., "Refine Myself by Teaching Myself: Feature Refinement via
Self-Knowledge Distillation", CVPR 2021, section 3; the pyramid is that of
kdmini/terms/pyramid.py, the imitations are those of kdmini/terms/imitations.py.
Legend: N images, C channels, H W cells, K classes, l a tap, the finest first; S the
student's own maps, s its class logits; T the self-teacher's maps, t the class logits of its
head.

    T = Pyramid(S)
    L = L_task(Head(T)) + alpha * L_logits(s, t) + beta * L_imitate(S, T)

L_logits is that of terms/logits.py; Head is a fresh head of the student's kind, L_task
the student's own loss. T and t are targets, so the last two parts stop at them: else
both networks would agree on something easy. L_task does not stop at S: it trains the
student's backbone too, as in its authors' code; `alpha: 0` with `beta: 0` leaves that
alone.

For models that offer `make_head(channels)` and `class_maps(preds)`. Nothing of this is in
best.pt.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from kdmini.bounds import Gain, Range, Temperature
from kdmini.contracts import Targets, UserError, View
from kdmini.distill.align import Shapes
from kdmini.terms.imitations import IMITATIONS
from kdmini.terms.logits import LogitDistillation
from kdmini.terms.pairs import Reduction, class_levels
from kdmini.terms.pyramid import Pyramid

LEVELS = range(2, 6)  # that a pyramid may have


class SelfTeacher(nn.Module):
    """A pyramid and a head on the student's maps: their task loss and two imitations.

    width: channels of every map of the self-teacher: the paper's BiFPN.
    times: in place of width, channels of each map over those of the student's: its BiFPNc.
    layers: of the pyramid, one after the other.
    imitate: what of its maps the student imitates: their `attention` maps, the maps by
        `fitnet`, or by `overhaul` what they are before ReLU.
    alpha: weight of the imitation of its class scores, beside 1 of its task loss.
    beta: weight of the imitation of its maps. The paper has 50 to 200 for `attention`, which
        is small, as a mean over cells of maps whose norm is 1.
    temperature: tau, which both networks' class logits are divided by.
    form: of the class scores: `softmax`, one distribution over the classes and all cells
        alike, as in the paper; `sigmoid`, for heads that score each class by itself, with
        the cells weighed by the self-teacher's confidence.
    reduction: of the imitation of class scores; see LogitDistillation.
    box, cls, dfl: gain of that loss in its task loss; the student's by default.
    """

    uses = frozenset({"feats", "classes", "targets"})
    needs_teacher = False

    def __init__(  # noqa: PLR0913 - the schema of a section
        self,
        shapes: Shapes,
        student: Any,
        width: Annotated[int, Range(1, 4096)] = 64,
        times: Annotated[float, Range(0, 16, above=True)] | None = None,
        layers: Annotated[int, Range(1, 3)] = 1,
        imitate: Literal["attention", "fitnet", "overhaul"] = "attention",
        alpha: Gain = 0.1,
        beta: Gain = 100.0,
        temperature: Temperature = 4.0,
        form: Literal["sigmoid", "softmax"] = "sigmoid",
        reduction: Reduction = "batch",
        box: Gain | None = None,
        cls: Gain | None = None,
        dfl: Gain | None = None,
    ):
        super().__init__()
        check_levels(shapes)
        for method in ("make_head(channels)", "class_maps(preds)"):
            if not hasattr(student, method.partition("(")[0]):
                raise UserError(
                    f"distill: a self-teacher needs a student with a method {method}; "
                    f"{type(student).__name__} has none"
                )

        self.channels = {tap: channels for tap, (channels, *_) in shapes.items()}
        channels = [*self.channels.values()]
        widths = [width] * len(channels)
        if times is not None:
            widths = [max(1, round(times * c)) for c in channels]
        self.alpha = alpha
        self.beta = beta
        self.reduction = reduction
        # the method alone: the student, as a submodule, would be optimised and saved twice
        self.task_loss = student.loss
        self.class_maps = student.class_maps
        self.rescale = gain_ratios(student, {"box": box, "cls": cls, "dfl": dfl})
        self.refine = Pyramid(channels, widths, layers)
        self.head = student.make_head(widths)
        self.imitate = IMITATIONS[imitate](channels, widths)
        gamma = 1.0 if form == "sigmoid" else 0.0
        self.logits = LogitDistillation(form, temperature, gamma, reduction, student.names)

    def forward(self, student: View, teacher: View | None, targets: Targets) -> Tensor:
        raw = self.refine(self.own_maps(student))
        preds = self.head([x.relu() for x in raw])
        feats = dict(zip(self.channels, raw, strict=True))
        own = View(feats, preds, student.images, self.class_maps(preds))
        refuse_other_sizes(student, own)
        return self.task(preds, targets) + self.imitation(student, own, targets)

    def task(self, preds: Any, targets: Targets) -> Tensor:
        """The student's loss for the self-teacher's preds, its gains perhaps replaced."""
        losses = self.task_loss(preds, targets)
        parts = [self.rescale.get(name, 1.0) * loss for name, loss in losses.items()]
        return torch.stack(parts).sum()

    def imitation(self, student: View, own: View, targets: Targets) -> Tensor:
        """What the student is taught, by the self-teacher's view, its maps before their ReLU.

        No gradient reaches it: both parts detach what they are to imitate.
        """
        raw = [own.feats[tap] for tap in self.channels]
        maps = self.imitate(self.own_maps(student), raw, self.refine.norms())
        return self.beta * maps + self.alpha * self.logits(student, own, targets)

    def own_maps(self, student: View) -> list[Tensor]:
        """The taps, the finest first. Raises UserError where they are not the student's own."""
        for tap, channels in self.channels.items():
            tapped = student.feats[tap].shape[1]
            if tapped != channels:
                raise UserError(
                    f"distill.align: {tap} comes with {tapped} channels and has {channels}; "
                    "use `none`"
                )
        return [student.feats[tap] for tap in self.channels]


def check_levels(shapes: Shapes) -> None:
    """Raises UserError unless there are enough maps, each half as large as the one before."""
    sizes = {tap: (height, width) for tap, (_, _, height, width) in shapes.items()}
    if len(sizes) not in LEVELS:
        raise UserError(
            f"distill.taps: a self-teacher needs {LEVELS[0]} to {LEVELS[-1]} maps, each half as "
            f"large as the one before; these are {len(sizes)}"
        )
    taps = list(sizes)
    for finer, coarser in pairwise(taps):
        half = tuple(-(-length // 2) for length in sizes[finer])
        if sizes[coarser] != half:
            raise UserError(
                f"distill.taps: {coarser} is {of_size(sizes[coarser])} after {finer} of "
                f"{of_size(sizes[finer])}; a self-teacher needs maps of which each is half as "
                "large as the one before"
            )


def refuse_other_sizes(student: View, own: View) -> None:
    """Raises UserError where the class maps of the two differ in size: a head that stands on
    other maps than the student's.
    """
    sizes = []
    for view in (student, own):
        levels = class_levels(view)
        sizes.append(", ".join(of_size(level.shape[2:]) for level in levels))
    if sizes[0] != sizes[1]:
        raise UserError(
            f"distill.taps: of these the self-teacher's head makes class maps of {sizes[1]}, "
            f"the student's own head {sizes[0]}; name maps as large as those that it reads"
        )


def of_size(size: Sequence[int]) -> str:
    height, width = size
    return f"{height}x{width}"


def gain_ratios(student: Any, gains: Mapping[str, float | None]) -> dict[str, float]:
    """{loss: its gain / the student's gain} for the gains that are given.

    Raises UserError for a loss that the student does not have, or has at gain 0.
    """
    student_gains = getattr(student, "gains", {})
    ratios = {}
    for name, gain in gains.items():
        if gain is None:
            continue
        if not student_gains.get(name):
            raise UserError(
                f"distill: {name} is {gain}, and {type(student).__name__} has no gain {name} "
                "above 0 that it could replace; leave it out"
            )
        ratios[name] = gain / student_gains[name]
    return ratios
