"""What each distillation term costs, where the maps of both networks are there.

python -m bench.terms [--imgsz 320] [--batch 4] [--rounds 9] [--device cuda]

Every config of configs/terms that distils a YOLO11, and attention transfer as in
configs/demo.yaml, with YOLO11m as the teacher of YOLO11s at random weights. In the time:
alignment, term, and backward to the student's maps. Not in it: the student, and the
teacher, whose head runs only for terms that read preds (see docs/terms.md).
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench import measure
from bench.step import noise, precision
from kdmini import config
from kdmini.assemble import make_distillation
from kdmini.bounds import Count, ImageSize
from kdmini.detection.truth import Targets
from kdmini.detection.voc import VOC_NAMES
from kdmini.detection.yolo11.model import YOLO11
from kdmini.device import pick_device
from kdmini.typed import argument

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def configs() -> dict[str, Path]:
    """Name of a row -> its config."""
    paths = {"attention": CONFIGS / "demo.yaml"}
    for path in sorted((CONFIGS / "terms").glob("*.yaml")):
        if "YOLO11" in path.read_text():
            paths[path.stem] = path
    return paths


def term(path: Path, images: torch.Tensor, targets: Targets) -> Callable[[], None]:
    """-> forward and backward of the terms of a config."""
    settings = config.load(path)
    student = yolo11("s", images.device)
    teacher = yolo11("m", images.device)
    distillation = config.call(
        make_distillation,
        settings["distill"],
        str(path),
        student=student,
        teacher=teacher if settings.get("teacher") else None,
        imgsz=images.shape[-1],
    ).to(images.device)
    with torch.no_grad(), precision(images):
        preds = student(images)
        feats = distillation.student_taps.take()
        view = distillation.teacher_view(images)
    inputs = [*feats.values(), *preds]
    for tensor in inputs:
        tensor.requires_grad_()
    names = tuple(distillation.terms)

    def run() -> None:
        with precision(images):
            losses = distillation.losses(names, feats, view, preds, images, targets)
        loss: Any = sum(losses.values())
        loss.backward()
        for tensor in inputs:
            tensor.grad = None
        distillation.zero_grad()

    return run


def yolo11(scale: str, device: torch.device) -> YOLO11:
    return YOLO11(VOC_NAMES, scale).to(device, memory_format=torch.channels_last)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--imgsz", type=argument(ImageSize), default=320)
    parser.add_argument("--batch", type=argument(Count), default=4)
    parser.add_argument("--rounds", type=argument(Count), default=9)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    device = pick_device(args.device)
    torch.manual_seed(0)
    images, targets = noise(args.batch, args.imgsz, device)
    works = {name: term(path, images, targets) for name, path in configs().items()}
    seconds = measure.take_turns(works, args.rounds, device.type)
    print(
        f"{measure.machine(device.type)}, imgsz {args.imgsz}, batch {args.batch}, "
        f"{args.rounds} rounds\n"
    )
    print(measure.table(seconds, "attention", args.batch, "image"))


if __name__ == "__main__":
    main()
