"""FRSKD on small maps, and its equations written out.

The letters are those of kdmini/terms/self_teacher.py.
"""

import json
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdmini.contracts import Targets, View
from kdmini.detection.yolo11.model import YOLO11
from kdmini.terms.self_teacher import Fuse, SelfTeacher
from tests.conftest import TINY
from tests.terms.views import IMAGES, leaf

NAMES = ["circle", "square", "triangle"]
SIDES = 64  # channels of the box sides in preds, before the classes
SHAPES = {  # student C, teacher C, H, W
    "fine": (6, 12, 8, 8),
    "middle": (5, 10, 4, 4),
    "coarse": (7, 14, 2, 2),
}
SHARES = (0.5, 1.5, 0.7)  # of a Fuse's maps, before they are normalised


def make_student(**settings: Any) -> Any:
    return YOLO11(NAMES, json.loads(TINY), **settings)


def make_term(
    student: Any = None,
    shares: tuple[float, ...] = SHARES,
    **settings: Any,
) -> SelfTeacher:
    """The same at every call with the same arguments."""
    if student is None:
        student = make_student()
    settings.setdefault("width", 4)
    torch.manual_seed(3)
    term = SelfTeacher(SHAPES, student, **settings)
    with torch.no_grad():
        for module in term.modules():
            if isinstance(module, Fuse):
                inputs = len(module.weight)
                module.weight.copy_(torch.tensor(shares[:inputs]))
    return term


def random_view(seed: int, dtype: torch.dtype = torch.float64) -> View:
    """Feats and preds of images of 64 pixels."""
    generator = torch.Generator().manual_seed(seed)
    feats = {}
    for tap, (channels, _, height, width) in SHAPES.items():
        shape = (channels, height, width)
        feats[tap] = leaf(shape, generator, dtype)
    preds = []
    for _, _, height, width in SHAPES.values():
        shape = (SIDES + len(NAMES), height, width)
        preds.append(leaf(shape, generator, dtype))
    classes = [pred[:, SIDES:] for pred in preds]
    return View(feats, preds, torch.zeros(IMAGES, 3, 64, 64), classes)


def make_targets(objects: int = 2) -> Targets:
    """The first of three boxes of 24 pixels; of the second image, the third is padding."""
    left_top = torch.tensor([[4.0, 4.0], [20.0, 30.0], [2.0, 40.0]])
    boxes_xyxy = torch.cat([left_top, left_top + 24], 1).expand(IMAGES, -1, -1)
    labels = torch.tensor([[0, 2, 1], [1, 0, -1]])
    return {
        "boxes_xyxy": boxes_xyxy[:, :objects],
        "labels": labels[:, :objects],
        "ids": ["a", "b"],
    }


# --- the pyramid


def plain_conv(x: Tensor, block: Any) -> Tensor:
    """Convolution, BatchNorm over the batch, SiLU."""
    weight = block.conv.weight
    padding = weight.shape[-1] // 2
    x = F.conv2d(x, weight, padding=padding, groups=block.conv.groups)

    mean = x.mean((0, 2, 3), keepdim=True)
    variance = x.var((0, 2, 3), correction=0, keepdim=True)
    scale = block.bn.weight.view(1, -1, 1, 1)
    offset = block.bn.bias.view(1, -1, 1, 1)
    x = (x - mean) / (variance + 1e-3).sqrt() * scale + offset
    return x / (1 + (-x).exp())


def plain_fuse(block: Any, *maps: Tensor) -> Tensor:
    shares = [max(weight.item(), 0.0) for weight in block.weight]
    total = sum(shares) + 1e-4
    mixed: Any = 0
    for share, x in zip(shares, maps, strict=True):
        mixed = mixed + share / total * x

    depthwise, pointwise = block.conv
    assert depthwise.conv.groups == mixed.shape[1]
    return plain_conv(plain_conv(mixed, depthwise), pointwise)


def plain_up(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, 2).repeat_interleave(2, 3)


def plain_down(x: Tensor) -> Tensor:
    """The largest of the 3x3 cells around every second one."""
    _, _, height, width = x.shape
    rows = []
    for i in range(0, height, 2):
        row = []
        for j in range(0, width, 2):
            top = max(i - 1, 0)
            left = max(j - 1, 0)
            around = x[:, :, top : i + 2, left : j + 2]
            row.append(around.amax((2, 3)))
        rows.append(torch.stack(row, 2))
    return torch.stack(rows, 2)


def plain_refine(net: Any, feats: list[Tensor]) -> list[Tensor]:
    pairs = zip(feats, net.lateral, strict=True)
    x1, x2, x3 = (plain_conv(feat, block) for feat, block in pairs)
    y2 = plain_fuse(net.p2, x2, plain_up(x3))
    t1 = plain_fuse(net.t1, x1, plain_up(y2))
    t2 = plain_fuse(net.t2, x2, y2, plain_down(t1))
    t3 = plain_fuse(net.t3, x3, plain_down(t2))
    return [t1, t2, t3]


# --- the imitations


def plain_map(feat: Tensor) -> Tensor:
    """(C, H, W) -> the attention map."""
    energy = (feat**2).sum(0)
    return energy / (energy**2).sum().sqrt()


def plain_attention(s: Tensor, t: Tensor) -> Any:
    total: Any = 0
    for n in range(IMAGES):
        difference = plain_map(s[n]) - plain_map(t[n])
        total += (difference**2).sum().sqrt() / IMAGES
    return total


def plain_sigmoid(logits: Tensor, temperature: float) -> Tensor:
    return 1 / (1 + (-logits / temperature).exp())


def plain_soft(student: list[Tensor], own: list[Tensor], temperature: float) -> Any:
    """preds of both -> the loss of the class logits."""
    total: Any = 0
    whole: Any = 0
    for pred_s, pred_t in zip(student, own, strict=True):
        s = pred_s[:, SIDES:]
        t = pred_t[:, SIDES:]
        q = plain_sigmoid(s, temperature)
        p = plain_sigmoid(t, temperature)
        yes = p * (p / q).log()
        no = (1 - p) * ((1 - p) / (1 - q)).log()
        weight = plain_sigmoid(t, 1).amax(1)
        total += (weight * (yes + no).sum(1)).sum()
        whole += weight.sum()
    return temperature**2 * total / whole
