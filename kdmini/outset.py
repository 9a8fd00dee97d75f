"""At the outset of a run: what is about to happen, and what would be training for nothing."""

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from kdmini import config, distributed
from kdmini.contracts import UserError
from kdmini.engine import Training
from kdmini.optim import Recipe

LONG_WARMUP = 0.5  # of all steps; from there on a line warns


# --- what would be void


def void_terms(distillation: Any, epochs: int) -> str:
    """Why nothing is distilled, or not by all terms; empty where each of them has its time."""
    if not distillation.terms:
        return "distill has no term; add one, or set distill=null"
    idle = []
    for name, weight in distillation.weights.items():
        lambdas = [distillation.lambdas(epoch)[name] for epoch in range(epochs)]
        if not any(lambdas):
            idle.append(f"distill.{name}: lambda is 0 in all {epochs} epochs; see its schedule")
        elif not weight and len(distillation.weights) == 1:
            idle.append(f"distill.{name}: weight is 0")
    return "; ".join(idle)


def void_teacher(section: Mapping[str, Any], teacher: Any, distillation: Any) -> str:
    """Why there is nothing to learn from the teacher; empty where there is."""
    parameters, _ = config.parameters_of(config.locate(section["build"], "teacher"), "teacher")
    if "weights" in parameters and not section.get("weights"):
        return "teacher: has no weights, so it has learned nothing; give teacher.weights"
    unread = unread_classes(teacher)
    if unread and distillation.needs_preds:
        return (
            f"teacher: its weights have not learned {unread}, and a term reads its scores; "
            "train it on the classes of the data first"
        )
    return ""


def unread_classes(network: Any) -> str:
    """The classes of which a network has read no weights, in words; empty where there is none,
    or where it cannot tell.
    """
    names = getattr(network, "unread", [])
    return f"{len(names)} of {len(network.names)} classes, such as {names[0]!r}" if names else ""


# --- what would fail in the first step


@torch.no_grad()
def refuse_lone_values(student: nn.Module, distillation: Any, images: int, imgsz: int) -> None:
    """Raises UserError where a BatchNorm would get one value a channel, which has no variance.

    images: that a process has in a step. Call before compilation.
    """
    if images > 1:
        return
    pixels = torch.zeros(1, 3, imgsz, imgsz, device=next(student.parameters()).device)
    try:
        # copies, for it changes statistics; the taps' hooks go with the student's
        copy.deepcopy(student).train()(pixels)
        copy.deepcopy(distillation.align).train()(distillation.student_taps.take())
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise UserError(
            f"train.batch: one image of {imgsz} px a process leaves a BatchNorm one value a "
            "channel; give two images, or a larger data.imgsz"
        ) from error


# --- what is about to happen


def describe(training: Training, teacher: Any) -> None:
    """Prints it, and warns where a setting may surprise."""
    recipe = training.recipe
    loader: Any = training.loader
    student = training.student
    terms = training.distillation.terms
    print(f"student: {summary(student)}, {len(student.names)} classes, on {loader.device}")
    if loader.device.type == "cpu" and not torch.cuda.is_available():
        print("device: torch finds no CUDA device, so this runs on the CPU")
    if teacher:
        print(f"teacher: {summary(teacher)}, frozen")
        taps = ", ".join(training.distillation.taps)
        print(f"terms: {', '.join(terms) or 'none'}; taps: {taps}")
    world = distributed.world()
    ranks = f", {world} processes" if world > 1 else ""
    print(
        f"data: {len(loader.store)} images, {len(loader)} steps an epoch, "
        f"{recipe.epochs} epochs{ranks}"
    )
    describe_phases(recipe, len(loader), loader.augment)
    for name, term in terms.items():
        reduction = getattr(term, "reduction", "")
        if recipe.accumulate > 1 and reduction in ("notes", "batch"):
            print(
                f"warning: distill.{name}: its reduction, `{reduction}`, depends on the batch, "
                f"which is {recipe.batch} here, not train.nbs={recipe.nbs}; `sample`, where "
                "it has that, does not"
            )


def describe_phases(recipe: Recipe, steps: int, augment: Any) -> None:
    """What becomes of the epochs. steps: of an epoch."""
    total = recipe.epochs * steps
    warmup = min(recipe.warmup(steps), total)
    with_mosaic = max(recipe.epochs - augment.close_mosaic, 0) if augment.mosaic else 0
    print(
        f"schedule: {updates(recipe, steps):,} updates of the weights; warm-up in {warmup:,} of "
        f"{total:,} steps; mosaic in {with_mosaic} of {recipe.epochs} epochs"
    )
    if warmup >= LONG_WARMUP * total:
        print(
            f"warning: the warm-up takes {warmup / total:.0%} of the run, whose learning rate "
            f"reaches {highest_lr(recipe, steps) / recipe.lr0:.0%} of train.lr0; lower "
            "train.warmup_steps and train.warmup_epochs, or train longer"
        )
    if augment.mosaic and not with_mosaic:
        print(
            f"warning: mosaic never happens, as the last data.augment.close_mosaic="
            f"{augment.close_mosaic} epochs are without; lower that, or set data.augment.mosaic=0"
        )


def updates(recipe: Recipe, steps: int) -> int:
    """Of the weights in the whole run; steps: of an epoch."""
    warm = min(math.ceil((recipe.warmup(steps) + 1) / steps), recipe.epochs)
    count = (recipe.epochs - warm) * math.ceil(steps / recipe.accumulate)
    step = 0
    while step < warm * steps:
        step += recipe.micro_batches(step, steps)
        count += 1
    return count


def highest_lr(recipe: Recipe, steps: int) -> float:
    """Of the weights, in the whole run."""
    last = recipe.epochs * steps - 1
    candidates = {min(recipe.warmup(steps), last), *range(steps - 1, last + 1, steps)}
    return max(recipe.at(step, steps).lr for step in candidates)


def summary(model: nn.Module) -> str:
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    return f"{type(model).__name__}, {millions:.2f} M parameters"
