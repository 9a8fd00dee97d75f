"""`train.py --check`: proof that distillation is on, before a day of GPU time is spent.

Every row of its table is something that has been off in other trainers without anybody
noticing. It is measured from outside, on real batches: gradients one by one, then some
steps as the loop makes them.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kdmini import engine
from kdmini.assemble import Run
from kdmini.contracts import Losses, Metric, Targets, UserError
from kdmini.distill.attention import attention_map, to_largest
from kdmini.inputs import digest
from kdmini.signals import Stop

STEPS = 2  # batches that are read, and steps that are made
LEAST_SPREAD = 1e-3  # of a map of the teacher, as a share of its widest; below it the tap fails
EVEN = 0.05  # of an attention map, its spread as a share of its mean; below it the table says so
LEAST_RATIO = 0.01  # of the KD gradient to the task's; below it the table says weak


class Row(NamedTuple):
    what: str
    value: str
    good: bool = True
    fault: str = ""  # what it means if it is not good, and what to do


def examine(run: Run, metric: Metric) -> Iterator[Row]:
    """The rows, one by one. All that learns is an epoch of the loader further afterwards, so
    give it a loader of STEPS batches.
    """
    training = run.training
    epoch = first_epoch_with_weight(training)
    yield row_of_weights(run, epoch)
    if epoch is None:
        return
    if run.teacher:
        fault = run.void["teacher"]
        yield Row("teacher, weights", "learned nothing" if fault else "read", not fault, fault)

    training.progress.epoch = epoch
    training.begin()
    images, targets = next(training.loader.epoch(epoch))
    yield from rows_of_taps(training, images)
    yield from rows_of_gradients(training, images, targets)
    yield row_of_optimizer(training)
    yield from rows_of_steps(run)
    if run.teacher and run.teacher.names == training.student.names:
        yield row_of_teacher(run, metric)


def first_epoch_with_weight(training: engine.Training) -> int | None:
    for epoch in range(training.recipe.epochs):
        if any(training.distillation.factors(epoch).values()):
            return epoch
    return None


def row_of_weights(run: Run, epoch: int | None) -> Row:
    factors = run.training.distillation.factors(epoch or 0)
    text = ", ".join(f"{name} {value:.3g}" for name, value in factors.items())
    return Row(
        "weight * lambda",
        f"{text or 'no term'} in epoch {(epoch or 0) + 1}",
        not run.void.get("distill", "off"),
        run.void.get("distill", "distill=null, so nothing is distilled"),
    )


@torch.no_grad()
def rows_of_taps(training: engine.Training, images: Tensor) -> Iterator[Row]:
    """The shapes of the maps of student and teacher, and whether they say anything."""
    distillation = training.distillation
    with training.autocast():
        training.student(images)
        feats = distillation.student_taps.take()
        teacher = distillation.teacher_view(images)
    networks = [feats] if teacher is None else [feats, teacher.feats]
    spreads = [{tap: float(maps[tap].float().std()) for tap in feats} for maps in networks]
    widest = max(spreads[-1].values(), default=0.0)
    for tap in feats:
        texts = []
        for maps, spread in zip(networks, spreads, strict=True):
            shape = "x".join(map(str, maps[tap].shape[1:]))
            even = " (its attention map is even)" if is_even(maps[tap]) else ""
            texts.append(f"{shape}, std {spread[tap]:.2g}{even}")
        fault = ""
        if not all(0 < spread[tap] < math.inf for spread in spreads):
            fault = "a map that is constant or not finite"
        elif teacher is not None and spreads[-1][tap] < LEAST_SPREAD * widest:
            fault = (
                f"the teacher's spreads less than {LEAST_SPREAD:g} of what it does at another "
                "tap: next to nothing to imitate, as in a network that is not trained"
            )
        yield Row(tap, " <- ".join(texts), not fault, fault)


def is_even(feat: Tensor) -> bool:
    """Whether the attention map of (N, C, H, W) is about the same in every cell, as it is after
    a LayerNorm: then it teaches nobody where to look. Other terms do not mind.
    """
    energy = attention_map(to_largest(feat)).flatten(1)
    spread = energy.std(1) / energy.mean(1)
    return bool(spread.mean() < EVEN)


def rows_of_gradients(training: engine.Training, images: Tensor, targets: Targets) -> Iterator[Row]:
    """What the terms alone do to the student and to the align modules, beside the task."""
    student = training.student
    distillation = training.distillation
    recipe = training.recipe
    n = recipe.batch * recipe.accumulate  # images of an update after the warm-up
    known = n * len(targets["ids"]) // len(images)
    task_scale, kd_scale = training.scales(known, n)
    epoch = training.progress.epoch

    def task() -> Losses:
        return student.loss(engine.labelled(student(images), images, targets), targets)

    def kd() -> Losses:
        return distillation(images, student(images), targets, epoch)

    students = learning(student)
    of_task = gradients(training, task, task_scale)
    of_kd = gradients(training, kd, kd_scale)
    to_task = norm(of_task)
    to_student = norm(of_kd[: len(students)])
    yield Row(
        "KD gradient, student",
        f"{to_student:.3g}",
        0 < to_student < math.inf,
        "the terms do not reach the student, or not as numbers",
    )
    if learning(distillation):
        to_align = norm(of_kd[len(students) :])
        yield Row(
            "KD gradient, align and terms",
            f"{to_align:.3g}",
            0 < to_align < math.inf,
            "align modules and terms learn nothing: repair the term, or set distill.align to "
            "frozen or none",
        )
    ratio = to_student / to_task if to_task else math.inf
    weak = ""
    if ratio < LEAST_RATIO:
        weak = f" (weak, under {LEAST_RATIO:.0%}: see distill.kd_scale)"
    yield Row("KD / task gradient", f"{ratio:.2%} in updates of {n} images{weak}")


def gradients(
    training: engine.Training, losses: Callable[[], Losses], scale: float
) -> list[Tensor]:
    """Of the losses of a forward pass of its own: those of the student, then those of the
    align modules and terms.
    """
    with training.autocast():
        total: Any = scale * sum(losses().values())
    if total.requires_grad:
        total.backward()
    parameters = learning(training.student) + learning(training.distillation)
    grads = [torch.zeros(()) if p.grad is None else p.grad for p in parameters]
    training.optimizer.zero_grad()
    return grads


def row_of_optimizer(training: engine.Training) -> Row:
    held = {id(p) for group in training.optimizer.param_groups for p in group["params"]}
    parameters = learning(training.student) + learning(training.distillation)
    lost = sum(id(p) not in held for p in parameters)
    return Row(
        "optimiser",
        f"{len(held)} tensors",
        not lost,
        f"{lost} that should learn are not in it",
    )


def rows_of_steps(run: Run) -> Iterator[Row]:
    """Who moves in some steps of the loop, and who does not."""
    training = run.training
    students = learning(training.student)
    align = learning(training.distillation)
    teachers = [*run.teacher.state_dict().values()] if run.teacher else []
    student_before = digest(students)
    align_before = digest(align)
    teacher_before = digest(teachers)
    engine.train_one_epoch(training, Stop())

    moved = digest(students) != student_before
    yield Row(
        "student, some steps later",
        "moved" if moved else "as before",
        moved,
        "it does not learn",
    )
    if align:
        moved = digest(align) != align_before
        yield Row(
            "align and terms, some steps later",
            "moved" if moved else "as before",
            moved,
            "no learning",
        )
    if run.teacher:
        as_before = digest(teachers) == teacher_before
        frozen = as_before and not learning(run.teacher)
        yield Row(
            "teacher, some steps later",
            "as before" if frozen else "not frozen",
            frozen,
            "weights or BatchNorm statistics that change, or would: it has to be frozen",
        )


def row_of_teacher(run: Run, metric: Metric) -> Row:
    scores = engine.evaluate(run.teacher, run.val_loader, metric, run.training.autocast)
    score = scores[metric.fitness]
    chance = metric.chance() if hasattr(metric, "chance") else 0.0
    return Row(
        "teacher, held-out images",
        f"{metric.fitness} {score:.3f}",
        score > chance,
        f"it knows nothing, which scores {chance:.3g}: train it first, and give teacher.weights",
    )


def learning(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def norm(grads: Sequence[Tensor]) -> float:
    return math.hypot(*(float(grad.float().norm()) for grad in grads))


def report(rows: Iterator[Row]) -> None:
    """Prints the table as it grows. Raises UserError where a row is not good."""
    faults = []
    for row in rows:
        verdict = "ok" if row.good else "FAIL"
        line = f"{verdict:5}{row.what:35}{row.value}"
        if not row.good:
            line += f": {row.fault}"
            faults.append(row.what)
        print(line)
    if faults:
        raise UserError(f"--check: {', '.join(faults)} failed, see above")
    print("--check: distillation is on")
