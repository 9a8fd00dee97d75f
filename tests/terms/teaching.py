"""The terms of a config at work: alone on one batch, and in a short run."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import train as train_script
from kdmini import config
from kdmini.assemble import make_distillation
from kdmini.optim import Recipe, make_optimizer
from tests.commands import run
from tests.conftest import TINY

NAMES = ["circle", "square", "triangle", "star", "ring", "cross"]
SMALL = [
    f"student.scale={TINY}",
    "teacher.scale=[0.5, 0.125, 1024]",
    "teacher.weights=null",
    "allow_void=true",
]


class Pieces(NamedTuple):
    student: Any
    teacher: Any  # None where the config has none
    distillation: Any
    images: Tensor  # (4, 3, imgsz, imgsz)


def build(path: Path, overrides: list[str], imgsz: int, names: list[str] = NAMES) -> Pieces:
    """Student, teacher and distillation of a config, with `align` as it begins.

    The teacher's BatchNorms have the statistics of the images.
    """
    torch.manual_seed(0)
    settings = config.load(path, overrides)
    student = config.build(settings["student"], "student", names=names)
    teacher = None
    if settings.get("teacher"):
        teacher = config.build(settings["teacher"], "teacher", names=names)
    images = torch.rand(4, 3, imgsz, imgsz)
    if teacher is not None:
        settle(teacher, images)  # before distillation folds its BatchNorms
    before = copy_of(student)
    distillation = config.call(
        make_distillation,
        settings["distill"],
        "distill",
        student=student,
        teacher=teacher,
        imgsz=imgsz,
    )
    assert_unchanged(student, before)  # for it was run, to see the shapes
    return Pieces(student, teacher, distillation, images)


def teach(path: Path, imgsz: int, targets: Any, steps: int, lr0: float) -> list[float]:
    """-> the sum of the terms at each step, without the task.

    They reach the student and their own parameters, and not the teacher.
    """
    student, teacher, distillation, images = build(path, SMALL, imgsz)
    before = copy_of(teacher)

    recipe = Recipe(epochs=1, batch=4, nbs=4, lr0=lr0, weight_decay=0)
    optimizer = make_optimizer([student, distillation.terms], recipe)
    learning = [*student.parameters(), *distillation.terms.parameters()]
    losses: list[float] = []
    for _ in range(steps):
        terms = distillation(images, student(images), targets, 0)
        loss: Any = sum(terms.values())
        loss.backward()
        losses.append(loss.item())
        if len(losses) == 1:
            assert any(is_reached(p) for p in student.parameters())
            assert all(is_reached(p) for p in distillation.terms.parameters())
        nn.utils.clip_grad_norm_(learning, 10.0)
        optimizer.step()
        optimizer.zero_grad()

    assert_unchanged(teacher, before)
    assert all(p.grad is None for p in teacher.parameters())
    return losses


def train(path: Path, folder: Path, *overrides: str) -> list[dict[str, Any]]:
    """-> the records of a run of the config in a folder."""
    run(train_script, "--config", path, *overrides, f"run={folder}")
    return records_of(folder)


def records_of(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def settle(model: nn.Module, images: Tensor) -> None:
    """Statistics of these images in every BatchNorm, so that the last layer sees them."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    model.train()(images)


def is_reached(parameter: nn.Parameter) -> bool:
    return parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)


def copy_of(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_unchanged(model: nn.Module, before: dict[str, Tensor]) -> None:
    now = model.state_dict()
    assert now.keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in now.items())
