"""Distillation of one training step: run the frozen teacher, align the student's taps, weigh the
terms.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from kdmini.contracts import Feats, Losses, Targets, Term, UserError, View
from kdmini.distill.align import Align, Mode, Shapes
from kdmini.distill.attention import map_distance
from kdmini.distill.schedule import check_segments, piecewise_linear
from kdmini.distill.taps import Taps

ALWAYS = ((0.0, 1.0, float("inf"), 1.0),)


class Weighted(NamedTuple):
    """A term with its place in the sum: weight * lambda(epoch) * term."""

    term: Term
    weight: float
    schedule: Sequence[Sequence[float]] = ALWAYS  # segments of lambda: see distill/schedule.py


class Distillation(nn.Module):
    """-> {name: weight * lambda * term} for the active terms; {} where every lambda is 0, and the
    teacher then rests.

    Its parameters and its state_dict are those of the align modules and the terms, never the
    teacher's.
    taps: {name of a submodule of the student: name of the teacher's}.
    kd_scale: what the loop multiplies the sum of the terms by: a number, or "batch" for the batch
    size."""

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        terms: Mapping[str, Weighted],
        taps: Mapping[str, str],
        shapes: Shapes,
        align: Mode = "all",
        kd_scale: float | Literal["batch"] = 1.0,
    ):
        super().__init__()
        self.terms = nn.ModuleDict({name: entry.term for name, entry in terms.items()})  # type: ignore[misc]
        self.weights = {name: entry.weight for name, entry in terms.items()}
        self.schedules = {name: entry.schedule for name, entry in terms.items()}
        for entry in terms.values():
            check_segments(entry.schedule)
        self.align = Align(shapes, align)
        self.kd_scale = kd_scale
        self.taps = dict(taps)
        self.student_taps = Taps(student, list(taps))
        self.needs_preds = any("preds" in entry.term.uses for entry in terms.values())
        self.run_terms: Callable[..., Losses] = self.values
        # in a tuple, so that the teacher is no submodule: not saved, not optimised, not set to
        # train()
        self.teacher: tuple[Callable, Taps] | None = None
        if teacher is not None:
            run = teacher if self.needs_preds else getattr(teacher, "features", teacher)
            freeze(teacher)
            self.teacher = run, Taps(teacher, list(taps.values()))
        if self.needs_preds and teacher is not None and teacher.names != student.names:  # type: ignore[union-attr]
            raise UserError(
                "a term that reads preds needs a teacher with the student's classes, in the same order"
            )

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compiles the teacher, and align modules and terms together; after the taps, before the
        first step.

        Arguments are those of torch.compile.
        """
        if self.teacher is not None:
            run, hooks = self.teacher
            self.teacher = torch.compile(run, *args, **kwargs), hooks
        self.run_terms = torch.compile(self.values, *args, **kwargs)

    def lambdas(self, epoch: int) -> dict[str, float]:
        return {
            name: piecewise_linear(schedule, epoch) for name, schedule in self.schedules.items()
        }

    def forward(self, images: Tensor, preds: Any, targets: Targets, epoch: int) -> Losses:
        """Call after the student's forward pass on the same images, (N, 3, S, S)."""
        feats = self.student_taps.take()
        factors = {name: self.weights[name] * value for name, value in self.lambdas(epoch).items()}
        if not any(factors.values()):
            return {}
        names = tuple(name for name, factor in factors.items() if factor)
        values = self.run_terms(names, feats, self.look(images), preds, images, targets)
        return {name: factors[name] * value for name, value in values.items()}

    def values(
        self,
        names: tuple[str, ...],
        feats: Feats,
        teacher: View | None,
        preds: Any,
        images: Tensor,
        targets: Targets,
    ) -> Losses:
        """The named terms, not yet weighted; feats as tapped. In one function, so that it can be
        compiled whole.
        """
        student = View(self.align(feats) if teacher else feats, preds, images)
        return {name: self.terms[name](student, teacher, targets) for name in names}

    @torch.no_grad()
    def look(self, images: Tensor) -> View | None:
        """The teacher's view of the images, under the student's tap names; without its head where
        no term reads it.
        """
        if self.teacher is None:
            return None
        run, hooks = self.teacher
        preds = run(images)
        feats = hooks.take()
        return View({tap: feats[name] for tap, name in self.taps.items()}, preds, images)

    @torch.no_grad()
    def distances(self, student: nn.Module, images: Tensor) -> dict[str, Tensor]:
        """Unweighted L2 distances of the attention maps, summed over images: {"aligned/TAP",
        "raw/TAP": scalar},
        and over the taps: {"aligned", "raw": scalar}.

        Both with the align modules and without: a trained align module can take up the loss in the
        student's place."""
        student.forward(images)  # not compiled once more, for evaluation, to look at a few batches
        feats, teacher = self.student_taps.take(), self.look(images)
        if teacher is None or not self.taps:
            return {}
        views = {"aligned": self.align(feats), "raw": feats}
        found: dict[str, Tensor] = {}
        for kind, view in views.items():
            each = {
                f"{kind}/{tap}": map_distance(view[tap], teacher.feats[tap]).sum()
                for tap in self.taps
            }
            found |= {kind: torch.stack([*each.values()]).sum(), **each}
        return found


def freeze(teacher: nn.Module) -> nn.Module:
    """In place: evaluation mode, no gradients, BatchNorm folded where the detector knows how."""
    teacher.eval().requires_grad_(False)
    fold: Callable | None = getattr(teacher, "fold", None)
    if fold:
        fold()
    return teacher.eval().requires_grad_(False)  # again, for the modules that folding made


@torch.no_grad()
def tap_shapes(
    student: nn.Module, teacher: nn.Module, taps: Mapping[str, str], imgsz: int
) -> Shapes:
    """Runs one empty image -> {student's tap: (student C, teacher C, H, W)}.

    Raises UserError where the two maps of a tap differ in height or width.
    """

    def look(model: nn.Module, names: Sequence[str]) -> Feats:
        device = next(model.parameters()).device
        training = model.training
        hooks = Taps(model, names)
        model.eval()(torch.zeros(1, 3, imgsz, imgsz, device=device))
        model.train(training)
        hooks.remove()
        return hooks.take()

    ours, theirs = look(student, list(taps)), look(teacher, list(taps.values()))
    shapes: dict[str, tuple[int, int, int, int]] = {}
    for tap, name in taps.items():
        (_, cs, height, width), (_, ct, *teacher_size) = ours[tap].shape, theirs[name].shape
        if [height, width] != teacher_size:
            raise UserError(
                f"distill.taps: {tap} is {height}x{width} in the student, {name} is "
                f"{'x'.join(map(str, teacher_size))} in the teacher; pair taps of equal size"
            )
        shapes[tap] = (cs, ct, height, width)
    return shapes
