"""What each distillation term costs: alignment, term and backward to the student's maps, both
networks' maps given.

python -m bench.terms [--imgsz 320] [--batch 4] [--rounds 9] [--device cuda]

Every config of configs/terms that distils a YOLO11, and attention transfer as in
configs/demo.yaml, with YOLO11m as
the teacher of YOLO11s at random weights. Not in the time: the student, and the teacher, whose head
runs only for terms that read preds (see docs/terms.md).
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

from bench import measure
from bench.step import noise, precision
from kdmini import config
from kdmini.contracts import Targets
from kdmini.detection.voc import VOC_NAMES
from kdmini.detection.yolo11.model import YOLO11
from train import make_distillation

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def term(path: Path, images: torch.Tensor, targets: Targets) -> Callable[[], None]:
    """-> forward and backward of the terms of a config."""
    settings = config.load(path)
    student, teacher = (
        YOLO11(VOC_NAMES, s).to(images.device, memory_format=torch.channels_last) for s in "sm"
    )
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
        feats, view = distillation.student_taps.take(), distillation.look(images)
    for tensor in (*feats.values(), *preds):
        tensor.requires_grad_()
    names = tuple(distillation.terms)

    def run() -> None:
        with precision(images):
            values = distillation.values(names, feats, view, preds, images, targets)
        sum(values.values()).backward()  # type: ignore[union-attr]
        for tensor in (*feats.values(), *preds):
            tensor.grad = None
        distillation.zero_grad()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--imgsz", type=int, default=320)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.manual_seed(0)
    images, targets = noise(args.batch, args.imgsz, args.device)
    paths = {"attention": CONFIGS / "demo.yaml"}
    paths |= {
        path.stem: path
        for path in sorted((CONFIGS / "terms").glob("*.yaml"))
        if "YOLO11" in path.read_text()
    }
    seconds = measure.take_turns(
        {name: term(path, images, targets) for name, path in paths.items()},
        args.rounds,
        args.device,
    )
    print(
        f"{measure.machine(args.device)}, imgsz {args.imgsz}, batch {args.batch}, {args.rounds} rounds\n"
    )
    print(measure.table(seconds, "attention", args.batch, "image"))


if __name__ == "__main__":
    main()
