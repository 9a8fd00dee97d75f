"""`train.py --check`: proof that distillation is on, before a day of GPU time is spent.

Every row of its table is something that has been off in other trainers without anybody noticing. It
is measured from outside, on real batches: gradients one by one, then some steps as the loop makes
them."""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import SGD

from kdmini import engine
from kdmini.contracts import Losses, Metric, UserError
from kdmini.device import Autocast
from kdmini.engine import TrainBatches, ValBatches
from kdmini.optim import EMA, Recipe
from kdmini.progress import Progress
from kdmini.signals import Stop

STEPS, LEAST_RATIO = 2, 0.01

Loop = tuple[
    TrainBatches, SGD, GradScaler, EMA, Recipe, Progress, Autocast, Stop
]  # as train_one_epoch takes them


class Row(NamedTuple):
    what: str
    found: str
    good: bool = True
    fault: str = ""  # what it means if it is not, and what to do


def examine(
    student: Any,
    teacher: Any,
    distillation: Any,
    loop: Loop,
    val_loader: ValBatches,
    metric: Metric,
) -> Iterator[Row]:
    """The rows, one by one. distillation: a distill.step.Distillation. All that learns is an epoch
    of the loader further afterwards, so give it a loader of STEPS batches.
    """
    loader, optimizer, _, _, recipe, progress, autocast, _ = loop

    def in_force(epoch: int) -> dict[str, float]:
        return {
            name: distillation.weights[name] * value
            for name, value in distillation.lambdas(epoch).items()
        }

    on = next((epoch for epoch in range(recipe.epochs) if any(in_force(epoch).values())), None)
    shown = ", ".join(f"{name} {value:.3g}" for name, value in in_force(on or 0).items())
    fault = "0 in every epoch, so distillation is off: see weight and schedule under `distill`"
    yield Row(
        "weight * lambda", f"{shown or 'no term'} in epoch {(on or 0) + 1}", on is not None, fault
    )
    if on is None:
        return
    progress.epoch = on

    student.train()
    distillation.train()
    images, targets = next(loader.epoch(on))
    with torch.no_grad(), autocast():
        student(images)
        feats, view = distillation.student_taps.take(), distillation.look(images)
    for tap, feat in feats.items():
        maps = [feat] if view is None else [feat, view.feats[tap]]
        found = " <- ".join(
            f"{'x'.join(map(str, m.shape[1:]))}, std {m.float().std():.2g}" for m in maps
        )
        yield Row(
            tap,
            found,
            all(m.float().std() > 0 for m in maps),
            "a map that is constant or not finite",
        )

    ours, own = (
        [p for p in module.parameters() if p.requires_grad] for module in (student, distillation)
    )

    def gradients(losses: Callable[[], Losses], scale: float) -> list[Tensor]:
        """Of the losses of a forward pass of its own, by parameter of `ours` and `own`."""
        with autocast():
            total: Any = scale * sum(losses().values())
        if total.requires_grad:
            total.backward()
        found = [torch.zeros(()) if p.grad is None else p.grad for p in [*ours, *own]]
        optimizer.zero_grad()
        return found

    n = len(images)
    kd_scale = n if distillation.kd_scale == "batch" else distillation.kd_scale
    task = gradients(
        lambda: student.loss(student(images), targets), n if recipe.loss_scale == "batch" else 1
    )
    kd = gradients(lambda: distillation(images, student(images), targets, on), kd_scale)
    of_task, to_student, to_own = norm(task), norm(kd[: len(ours)]), norm(kd[len(ours) :])
    fault = "the terms do not reach the student, or not as numbers"
    yield Row("KD gradient, student", f"{to_student:.3g}", 0 < to_student < math.inf, fault)
    if own:
        fault = "align modules and terms learn nothing: repair the term, or set distill.align to frozen or none"
        yield Row("KD gradient, align and terms", f"{to_own:.3g}", 0 < to_own < math.inf, fault)
    ratio = to_student / of_task if of_task else math.inf
    weak = f" (weak, under {LEAST_RATIO:.0%}: see distill.kd_scale)" if ratio < LEAST_RATIO else ""
    yield Row("KD / task gradient", f"{ratio:.2%}{weak}")

    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    lost = sum(id(p) not in held for p in [*ours, *own])
    yield Row(
        "optimiser", f"{len(held)} tensors", not lost, f"{lost} that should learn are not in it"
    )

    kinds = [ours, own, [*teacher.state_dict().values()] if teacher else []]
    before = [digest(tensors) for tensors in kinds]
    engine.train_one_epoch(student, student, distillation, *loop)
    moved = [digest(tensors) != old for tensors, old in zip(kinds, before, strict=True)]
    yield Row(
        "student, some steps later",
        "moved" if moved[0] else "as before",
        moved[0],
        "it does not learn",
    )
    if own:
        yield Row(
            "align and terms, some steps later",
            "moved" if moved[1] else "as before",
            moved[1],
            "no learning",
        )
    if teacher:
        frozen = not moved[2] and not any(p.requires_grad for p in teacher.parameters())
        fault = "weights or BatchNorm statistics that change, or would: it has to be frozen"
        yield Row(
            "teacher, some steps later", "as before" if frozen else "not frozen", frozen, fault
        )
        if teacher.names == student.names:
            score = engine.evaluate(teacher, val_loader, metric, autocast)[metric.fitness]
            fault = "it detects nothing: train it first, and give teacher.weights"
            yield Row("teacher, held-out images", f"{metric.fitness} {score:.3f}", score > 0, fault)


def norm(gradients: Sequence[Tensor]) -> float:
    return math.hypot(*(float(g.float().norm()) for g in gradients))


def digest(tensors: Sequence[Tensor]) -> str:
    sha256 = hashlib.sha256()
    for tensor in tensors:
        sha256.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha256.hexdigest()


def report(rows: Iterator[Row]) -> None:
    """Prints the table as it grows. Raises UserError where a row is not good."""
    faults = []
    for row in rows:
        print(
            f"{'ok' if row.good else 'FAIL':5}{row.what:35}{row.found}"
            + ("" if row.good else f": {row.fault}")
        )
        faults += [] if row.good else [row.what]
    if faults:
        raise UserError(f"--check: {', '.join(faults)} failed, see above")
    print("--check: distillation is on")
