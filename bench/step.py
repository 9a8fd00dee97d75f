"""What a distillation step costs: the student alone, the research notes' form, and kdmini's.

python -m bench.step [--imgsz 320] [--batch 4] [--rounds 9]

Variants take turns in one process, on one thread; process CPU time; median and quartiles over the rounds.
The notes' form: teacher with BatchNorm and head, alignment with bias, attention as published, everything NCHW.
"""

import argparse
import platform
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from kdmini.data.voc import VOC_NAMES
from kdmini.distill.attention import AttentionTransfer
from kdmini.distill.step import Distillation, Weighted, tap_shapes
from kdmini.distill.taps import Taps
from kdmini.yolo11.model import YOLO11

TAPS = [f"model.{layer}" for layer in (6, 8, 13, 16, 19, 22)]


def student_alone(images: torch.Tensor, targets: dict) -> Callable[[], None]:
    student = YOLO11(VOC_NAMES, "s").to(memory_format=torch.channels_last).train()

    def step() -> None:
        backward(student, sum(student.loss(student(images), targets).values()))

    return step


def notes_form(images: torch.Tensor, targets: dict) -> Callable[[], None]:
    student, teacher = YOLO11(VOC_NAMES, "s").train(), YOLO11(VOC_NAMES, "m").eval().requires_grad_(False)
    shapes = tap_shapes(student, teacher, dict(zip(TAPS, TAPS, strict=True)), images.shape[-1])
    align = nn.ModuleList(
        nn.Sequential(nn.Conv2d(cs, ct, 1), nn.BatchNorm2d(ct, affine=False)) for cs, ct, _, _ in shapes.values()
    )
    student_taps, teacher_taps = Taps(student, TAPS), Taps(teacher, TAPS)

    def attention(feat: torch.Tensor) -> torch.Tensor:
        energy = torch.pow(torch.abs(feat), 2).sum(dim=1)
        return energy / (torch.norm(energy, p=2, dim=(1, 2), keepdim=True) + 1e-8)

    def step() -> None:
        loss = sum(student.loss(student(images), targets).values())
        with torch.no_grad():
            teacher(images)
        pairs = zip(align, student_taps.take().values(), teacher_taps.take().values(), strict=True)
        for layer, ours, theirs in pairs:
            loss = loss + torch.norm(attention(layer(ours)) - attention(theirs), p=2) / len(images)
        backward(student, loss)

    return step


def kdmini_form(images: torch.Tensor, targets: dict) -> Callable[[], None]:
    student = YOLO11(VOC_NAMES, "s").to(memory_format=torch.channels_last).train()
    teacher = YOLO11(VOC_NAMES, "m").to(memory_format=torch.channels_last)
    pairs = dict(zip(TAPS, TAPS, strict=True))
    shapes = tap_shapes(student, teacher, pairs, images.shape[-1])
    distillation = Distillation(student, teacher, {"attention": Weighted(AttentionTransfer(), 1.0)}, pairs, shapes)

    def step() -> None:
        preds = student(images)
        kd = distillation(images, preds, targets, 0)
        backward(student, sum(student.loss(preds, targets).values()) + sum(kd.values()))

    return step


def backward(student: nn.Module, loss: torch.Tensor) -> None:
    loss.backward()
    student.zero_grad()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--imgsz", type=int, default=320)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images = torch.rand(args.batch, 3, args.imgsz, args.imgsz)
    corners = torch.rand(args.batch, 8, 2, 2).sort(2).values.flatten(2) * args.imgsz
    targets = {"boxes_xyxy": corners, "labels": torch.randint(0, 20, (args.batch, 8))}
    variants = {make.__name__: make(images, targets) for make in (student_alone, notes_form, kdmini_form)}

    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for round_ in range(args.rounds + 1):
        for name, step in variants.items():
            started = time.process_time()
            step()
            if round_:  # the first round warms up
                seconds[name].append(time.process_time() - started)

    print(
        f"torch {torch.__version__}, {platform.machine()}, imgsz {args.imgsz}, batch {args.batch}, {args.rounds} rounds"
    )
    print(f"{'':14}{'ms an image':>12}{'to student alone: median (quartiles)':>40}")
    for name, values in seconds.items():
        low, middle, high = np.percentile(np.array(values) / np.array(seconds["student_alone"]), (25, 50, 75))
        cost = 1000 * np.median(values) / args.batch
        print(f"{name:14}{cost:12.1f}{f'{middle:.2f} ({low:.2f}, {high:.2f})':>40}")
    ratio = np.array(seconds["notes_form"]) / np.array(seconds["kdmini_form"])
    low, middle, high = np.percentile(ratio, (25, 50, 75))
    print(f"kdmini against the notes' form: {middle:.2f}x ({low:.2f}, {high:.2f})")


if __name__ == "__main__":
    main()
