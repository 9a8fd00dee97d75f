"""Distillation of one training step: run the frozen teacher, align the student's taps, weigh
the terms.

Legend: N images, S image size, C channels, H W cells.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from kdmini.bounds import Gain
from kdmini.contracts import Feats, Losses, Targets, Term, UserError, View
from kdmini.distill.align import Align, Mode, Shapes, same_size, smaller
from kdmini.distill.attention import map_distance, to_largest
from kdmini.distill.schedule import Segment, check_segments, piecewise_linear
from kdmini.distill.taps import Taps, feats_of, is_graph

ALWAYS = ((0.0, 1.0, float("inf"), 1.0),)


class Weighted(NamedTuple):
    """A term with its place in the sum: weight * lambda(epoch) * term.

    weight: of the term.
    schedule: segments of lambda, [start epoch, value, end epoch, value] each; 1 throughout
        where there are none.
    """

    term: Term
    weight: Gain
    schedule: Sequence[Segment] = ALWAYS


class Teacher(NamedTuple):
    """The frozen network. A tuple hides it from nn.Module: it is no submodule of what holds
    it, so that nothing saves it, optimises it or sets it to train().
    """

    run: Callable[[Tensor], Any]  # the whole network, or all of it but the head
    taps: Taps
    class_maps: Callable[[Any], Any]  # of what it returns; nothing where no term reads them


class Distillation(nn.Module):
    """-> {name: weight * lambda * term} for the active terms; {} where every lambda is 0, and
    the teacher then rests.

    Its parameters and its state_dict are those of the align modules and the terms, never the
    teacher's.
    taps: {name of a submodule of the student: name of the teacher's}.
    kd_scale: what the loop multiplies the sum of the terms, a mean over the images of an
        update, by: a number, or "batch" for the number of those images.
    """

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
        modules: dict[str, Any] = {name: entry.term for name, entry in terms.items()}
        self.terms = nn.ModuleDict(modules)
        self.weights = {name: entry.weight for name, entry in terms.items()}
        self.schedules = {name: entry.schedule for name, entry in terms.items()}
        for schedule in self.schedules.values():
            check_segments(schedule)
        self.align = Align(shapes, align)
        self.kd_scale = kd_scale
        self.taps = dict(taps)
        self.student_taps = Taps(student, list(taps))
        uses = {use for entry in terms.values() for use in entry.term.uses}
        self.needs_preds = bool(uses & {"preds", "classes"})
        self.needs_classes = "classes" in uses
        self.class_maps = self.class_maps_of(student)
        self.run_terms: Callable[..., Losses] = self.losses
        self.teacher = self.prepared(teacher) if teacher is not None else None

    def prepared(self, teacher: nn.Module) -> Teacher:
        """The teacher, frozen and tapped; without its head where no term reads it."""
        run = teacher if self.needs_preds else getattr(teacher, "features", teacher)
        freeze(teacher)
        taps = Taps(teacher, list(self.taps.values()))
        return Teacher(run, taps, self.class_maps_of(teacher))

    def class_maps_of(self, network: nn.Module) -> Callable[[Any], Any]:
        """Preds -> maps of class logits, None where no term reads them. The method alone: the
        network must not become a submodule.
        """
        if not self.needs_classes:
            return nothing
        class_maps = getattr(network, "class_maps", None)
        if class_maps is None:
            raise UserError(
                f"distill: a term reads class maps, and {type(network).__name__} has no "
                "class_maps(preds); see Model in kdmini/contracts.py"
            )
        return class_maps

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compiles the teacher, and align modules and terms together; after the taps, before
        the first step. Arguments are those of torch.compile.
        """
        if self.teacher is not None:
            compiled = torch.compile(self.teacher.run, *args, **kwargs)
            self.teacher = self.teacher._replace(run=compiled)
        self.run_terms = torch.compile(self.losses, *args, **kwargs)

    def lambdas(self, epoch: int) -> dict[str, float]:
        return {
            name: piecewise_linear(schedule, epoch) for name, schedule in self.schedules.items()
        }

    def factors(self, epoch: int) -> dict[str, float]:
        """Term -> weight * lambda."""
        return {name: self.weights[name] * value for name, value in self.lambdas(epoch).items()}

    def forward(self, images: Tensor, preds: Any, targets: Targets, epoch: int) -> Losses:
        """Call after the student's forward pass on the same images, (N, 3, S, S)."""
        feats = self.student_taps.take()
        active = {name: factor for name, factor in self.factors(epoch).items() if factor}
        if not active:
            return {}
        teacher = self.teacher_view(images)
        losses = self.run_terms(tuple(active), feats, teacher, preds, images, targets)
        return {name: active[name] * loss for name, loss in losses.items()}

    def losses(
        self,
        names: tuple[str, ...],
        feats: Feats,
        teacher: View | None,
        preds: Any,
        images: Tensor,
        targets: Targets,
    ) -> Losses:
        """The named terms, not yet weighted; feats as tapped. In one function, so that it can
        be compiled whole.
        """
        classes = self.class_maps(preds)
        feats, graphs = self.parted(feats)
        if teacher:
            maps, of_teacher = self.parted(teacher.feats)
            ours, theirs = same_size(feats, maps)
            feats = self.align(ours)
            teacher = teacher._replace(feats=theirs, graphs=of_teacher)
        if teacher and classes is not None:
            levels, fixed = same_size(by_level(classes), by_level(teacher.classes))
            classes = [*levels.values()]
            teacher = teacher._replace(classes=[*fixed.values()])
        student = View(feats, preds, images, classes, graphs)
        return {name: self.terms[name](student, teacher, targets) for name in names}

    def parted(self, feats: Feats) -> tuple[Feats, Feats]:
        """-> the taps that are maps in both networks, and those of a graph of the teacher's."""
        graphs = {tap: feat for tap, feat in feats.items() if is_graph(self.taps[tap])}
        return {tap: feat for tap, feat in feats.items() if tap not in graphs}, graphs

    @torch.no_grad()
    def teacher_view(self, images: Tensor) -> View | None:
        """The teacher's view of the images, under the student's tap names; in `feats` all of
        its taps, as tapped.
        """
        if self.teacher is None:
            return None
        preds = self.teacher.run(images)
        feats = self.teacher.taps.take()
        named = {tap: feats[name] for tap, name in self.taps.items()}
        return View(named, preds, images, self.teacher.class_maps(preds))

    @torch.no_grad()
    def distances(self, student: nn.Module, images: Tensor) -> dict[str, Tensor]:
        """Unweighted L2 distances of the attention maps, summed over images: {"aligned/TAP",
        "raw/TAP": scalar}, and over the taps: {"aligned", "raw", "rolled", "constant": scalar}.

        Both with the align modules and without: a trained align module can take up the loss
        in the student's place. Of maps of unit norm, however weak the features, where the eps
        of training would dim those of an untrained student.

        "rolled" is "raw" to the teacher's maps of the image before, and not there where there
        is none: what is nearer than that is learned of this image, the rest of maps that are
        much the same for all. "constant" is how far a map that is the same everywhere is from
        the teacher's: a student may be further away.
        """
        student.forward(images)  # not compiled once more to look at a few batches
        feats, _ = self.parted(self.student_taps.take())
        teacher = self.teacher_view(images)
        if teacher is None or not feats:
            return {}
        feats, theirs = same_size(feats, self.parted(teacher.feats)[0])
        goals = {tap: to_largest(feat) for tap, feat in theirs.items()}
        distances: dict[str, Tensor] = {}
        for kind, ours in {"aligned": self.align(feats), "raw": feats}.items():
            by_tap = {
                f"{kind}/{tap}": map_distance(to_largest(ours[tap]), goals[tap]).sum()
                for tap in ours
            }
            distances[kind] = torch.stack([*by_tap.values()]).sum()
            distances |= by_tap
        if len(images) > 1:
            others = {tap: goal.roll(1, 0) for tap, goal in goals.items()}
            distances["rolled"] = total_distance(feats, others)
        even = {tap: torch.ones_like(goal[:, :1]) for tap, goal in goals.items()}
        distances["constant"] = total_distance(even, goals)
        return distances


def total_distance(feats: Feats, goals: Feats) -> Tensor:
    """Of the attention maps, summed over images and taps: scalar."""
    each = [map_distance(to_largest(feats[tap]), goal).sum() for tap, goal in goals.items()]
    return torch.stack(each).sum()


def nothing(preds: Any) -> None:
    """Of a network whose class maps no term reads."""


def by_level(maps: Any) -> Feats:
    return {f"class map {level}": feat for level, feat in enumerate(maps)}


def freeze(teacher: nn.Module) -> nn.Module:
    """In place: evaluation mode, no gradients, BatchNorm folded where the model knows how."""
    teacher.eval().requires_grad_(False)
    fold: Callable | None = getattr(teacher, "fold", None)
    if fold:
        fold()
    return teacher.eval().requires_grad_(False)  # again, for the modules that folding made


def tap_shapes(
    student: nn.Module, teacher: nn.Module, taps: Mapping[str, str], imgsz: int
) -> Shapes:
    """Runs one empty image -> {student's tap: (student C, teacher C, H, W)}, the size that of the
    smaller map; a line says which is brought to it. Of a graph it is that of the student's.

    Raises UserError where one size is no multiple of the other, or a graph has a map to teach it.
    """
    ours = feats_of_nothing(student, list(taps), imgsz)
    theirs = feats_of_nothing(teacher, list(taps.values()), imgsz)
    shapes: dict[str, tuple[int, int, int, int]] = {}
    for tap, name in taps.items():
        _, student_channels, *student_size = ours[tap].shape
        _, teacher_channels, *teacher_size = theirs[name].shape
        if is_graph(name):
            height, width = student_size
            shapes[tap] = (student_channels, teacher_channels, height, width)
            continue
        if is_graph(tap):
            raise UserError(
                f"distill.taps: {tap} is a graph, and {name} of the teacher is none; name one"
            )
        height, width = smaller(student_size, teacher_size, tap)
        shapes[tap] = (student_channels, teacher_channels, height, width)
        if student_size != teacher_size:
            whose = "teacher" if teacher_size != [height, width] else "student"
            print(f"distill.taps: the {whose}'s map of {tap} is averaged to {height}x{width}")
    return shapes


def feats_of_nothing(model: nn.Module, taps: Sequence[str], imgsz: int) -> Feats:
    """The taps of one empty image; leaves the model as it was."""
    device = next(model.parameters()).device
    training = model.training
    feats = feats_of(model, taps, torch.zeros(1, 3, imgsz, imgsz, device=device))
    model.train(training)
    return feats
