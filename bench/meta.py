"""Detectors on the meta device, where tensors have shapes and no content."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from kdmini.detection.yolo11.model import YOLO11

Scale = str | list[float]

LAYERS = (6, 8, 13, 16, 19, 22)  # tapped
TAPS = {f"model.{layer}": f"model.{layer}" for layer in LAYERS}


def detector(scale: Scale, classes: int = 20) -> YOLO11:
    names = [str(label) for label in range(classes)]
    with torch.device("meta"):
        return YOLO11(names, scale)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def image(imgsz: int) -> Tensor:
    return torch.empty(1, 3, imgsz, imgsz, device="meta")


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """In Markdown."""
    dashes = ["---"] * len(head)
    lines = []
    for cells in (head, dashes, *rows):
        text = " | ".join(map(str, cells))
        lines.append(f"| {text} |")
    return "\n".join(lines)
