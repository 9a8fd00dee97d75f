"""A config's terms alone, without the task and with `align` as it begins, on one batch."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

import train as train_script
from kdmini import config
from kdmini.optim import Recipe, make_sgd
from tests.conftest import TINY

NAMES = ["circle", "square", "triangle", "star", "ring", "cross"]
SMALL = [f"student.scale={TINY}", "teacher.scale=[0.5, 0.125, 1024]", "teacher.weights=null"]


def teach(path: Path, imgsz: int, targets: Any, steps: int) -> list[float]:
    """-> the sum of the terms at each step. They reach the student and their own parameters, and
    not the teacher.
    """
    torch.manual_seed(0)
    settings = config.load(path, SMALL)
    student, teacher = (
        config.build(settings[who], who, names=NAMES) for who in ("student", "teacher")
    )
    images = torch.rand(4, 3, imgsz, imgsz)
    for norm in (m for m in teacher.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.momentum = (
            None  # the statistics are those of the images, so that these are seen to the last layer
        )
    teacher.train()(images)
    distillation = config.call(
        train_script.make_distillation,
        settings["distill"],
        "distill",
        student=student,
        teacher=teacher,
        imgsz=imgsz,
    )
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    optimizer = make_sgd(
        [student, distillation.terms], Recipe(epochs=1, batch=4, nbs=4, lr0=0.2, weight_decay=0)
    )
    losses: list[float] = []
    for _ in range(steps):
        loss: Any = sum(distillation(images, student(images), targets, 0).values())
        loss.backward()
        losses.append(loss.item())
        if len(losses) == 1:
            assert sum(p.grad.abs().sum() for p in student.parameters() if p.grad is not None) > 0
            assert all(
                p.grad is not None and p.grad.abs().sum() > 0
                for p in distillation.terms.parameters()
            )
        nn.utils.clip_grad_norm_([*student.parameters(), *distillation.terms.parameters()], 10.0)
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())
    return losses
