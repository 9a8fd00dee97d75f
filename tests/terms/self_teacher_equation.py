"""FRSKD on small maps of three tasks, and its equations written out.

The letters are those of kdmini/terms/self_teacher.py, pyramid.py and imitations.py.
"""

import json
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdmini.contracts import Targets, View
from kdmini.detection.yolo11.model import YOLO11
from kdmini.segmentation.maps import Segmenter
from kdmini.terms.pyramid import Fuse
from kdmini.terms.self_teacher import SelfTeacher
from tests.conftest import TINY
from tests.terms.views import IMAGES, leaf

NAMES = ["circle", "square", "triangle"]
SIDES = 64  # channels of the box sides in preds, before the classes
SHAPES = {  # student C, teacher C, H, W
    "fine": (6, 12, 8, 8),
    "middle": (5, 10, 4, 4),
    "coarse": (7, 14, 2, 2),
}
ODD = {
    "first": (4, 4, 11, 9),
    "second": (4, 4, 6, 5),
    "third": (6, 6, 3, 3),
    "fourth": (8, 8, 2, 2),
}
SHARES = (0.5, 1.5, 0.7)  # of a Fuse's maps, before they are normalised


def make_student(**settings: Any) -> Any:
    return YOLO11(NAMES, json.loads(TINY), **settings)


class Sorter(nn.Module):
    """Says one class of an image: preds (N, K)."""

    names = NAMES

    def make_head(self, channels: Sequence[int]) -> nn.Module:
        return MeanHead(channels[-1], len(NAMES))

    def class_maps(self, preds: Tensor) -> list[Tensor]:
        return [preds[:, :, None, None]]

    def loss(self, preds: Tensor, targets: Targets) -> dict[str, Tensor]:
        return {"ce": F.cross_entropy(preds, targets["labels"])}


class MeanHead(nn.Linear):
    def forward(self, feats: Sequence[Tensor]) -> Tensor:  # type: ignore[override]
        return super().forward(feats[-1].mean((2, 3)))


def make_term(
    student: Any = None,
    shares: tuple[float, ...] = SHARES,
    shapes: Any = SHAPES,
    **settings: Any,
) -> SelfTeacher:
    """The same at every call with the same arguments."""
    if student is None:
        student = make_student()
    settings.setdefault("width", 4)
    torch.manual_seed(3)
    term = SelfTeacher(shapes, student, **settings)
    with torch.no_grad():
        for module in term.modules():
            if isinstance(module, Fuse):
                inputs = len(module.weight)
                module.weight.copy_(torch.tensor(shares[:inputs]))
        for module in term.refine.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(-0.5, 1.5)
                module.bias.normal_(0, 0.5)
    return term


def random_feats(seed: int, dtype: torch.dtype = torch.float64, shapes: Any = SHAPES) -> Any:
    """Of maps with values below 0."""
    generator = torch.Generator().manual_seed(seed)
    feats = {}
    for tap, (channels, _, height, width) in shapes.items():
        feats[tap] = leaf((channels, height, width), generator, dtype)
    return feats


def random_view(seed: int, dtype: torch.dtype = torch.float64) -> View:
    """A detector's feats and preds of images of 64 pixels."""
    generator = torch.Generator().manual_seed(seed + 100)
    preds = []
    for _, _, height, width in SHAPES.values():
        shape = (SIDES + len(NAMES), height, width)
        preds.append(leaf(shape, generator, dtype))
    classes = [pred[:, SIDES:] for pred in preds]
    images = torch.zeros(IMAGES, 3, 64, 64)
    return View(random_feats(seed, dtype), preds, images, classes)


def mask_view(seed: int) -> View:
    """A map of logits, as large as the first of the feats."""
    generator = torch.Generator().manual_seed(seed + 100)
    _, _, height, width = SHAPES["fine"]
    logits = leaf((len(NAMES), height, width), generator)
    return View(random_feats(seed), [logits], torch.zeros(IMAGES, 3, 64, 64), [logits])


def class_view(seed: int) -> View:
    generator = torch.Generator().manual_seed(seed + 100)
    logits = leaf((len(NAMES),), generator)
    images = torch.zeros(IMAGES, 3, 88, 72)
    return View(random_feats(seed, shapes=ODD), logits, images, Sorter().class_maps(logits))


def make_targets(objects: int = 2) -> Targets:
    """The first of three boxes of 24 pixels; of the second image, the third is padding.

    And a mask and a class of each image.
    """
    left_top = torch.tensor([[4.0, 4.0], [20.0, 30.0], [2.0, 40.0]])
    boxes_xyxy = torch.cat([left_top, left_top + 24], 1).expand(IMAGES, -1, -1)
    labels = torch.tensor([[0, 2, 1], [1, 0, -1]])
    return {
        "boxes_xyxy": boxes_xyxy[:, :objects],
        "labels": labels[:, :objects],
        "ids": ["a", "b"],
    }


def mask_targets() -> Targets:
    """Three quarters are void."""
    mask = torch.arange(64 * 64).view(1, 64, 64).expand(IMAGES, -1, -1) % 3
    mask = mask.clone()
    mask[:, :48] = 255
    return {"mask": mask.to(torch.uint8), "ids": ["a", "b"]}


def class_targets() -> Targets:
    return {"labels": torch.tensor([2, 0]), "ids": ["a", "b"]}


# --- the pyramid


def plain_norm(x: Tensor, norm: Any) -> Tensor:
    """BatchNorm over the batch, channel by channel."""
    channels = []
    for c in range(x.shape[1]):
        values = x[:, c]
        mean = values.sum() / values.numel()
        variance = ((values - mean) ** 2).sum() / values.numel()
        channels.append((values - mean) / (variance + 1e-5).sqrt() * norm.weight[c] + norm.bias[c])
    return torch.stack(channels, 1)


def plain_pointwise(x: Tensor, weight: Tensor) -> Tensor:
    return torch.einsum("nchw,dc->ndhw", x, weight[:, :, 0, 0])


def plain_conv_bn(x: Tensor, block: Any) -> Tensor:
    if isinstance(block, nn.Identity):
        return x
    conv, norm = block
    return plain_norm(plain_pointwise(x, conv.weight), norm)


def plain_depthwise(x: Tensor, weight: Tensor) -> Tensor:
    """A sum over the nine neighbours, 0 beyond the border."""
    _, _, height, width = x.shape
    padded = F.pad(x, (1, 1, 1, 1))
    total: Any = 0
    for i in range(3):
        for j in range(3):
            factor = weight[:, 0, i, j].view(1, -1, 1, 1)
            total = total + factor * padded[:, :, i : i + height, j : j + width]
    return total


def plain_fuse(block: Any, *maps: Tensor) -> Tensor:
    shares = [max(weight.item(), 0.0) for weight in block.weight]
    assert len(shares) == len(maps)
    total = sum(shares) + 1e-6
    x: Any = 0
    for share, part in zip(shares, maps, strict=True):
        x = x + share / total * part

    depthwise, pointwise, norm, _, again, pointwise_again, last = block.conv
    x = plain_norm(plain_pointwise(plain_depthwise(x, depthwise.weight), pointwise.weight), norm)
    x = x.clamp(min=0)
    x = plain_depthwise(x, again.weight)
    return plain_norm(plain_pointwise(x, pointwise_again.weight), last)


def plain_up(x: Tensor, like: Tensor) -> Tensor:
    """The nearest cell: that whose share of the side it lies in."""
    height, width = x.shape[2:]
    rows, columns = like.shape[2:]
    row_of = [i * height // rows for i in range(rows)]
    column_of = [j * width // columns for j in range(columns)]
    return x[:, :, row_of][:, :, :, column_of]


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


def plain_layer(layer: Any, maps: list[Tensor], lateral: list[Tensor]) -> list[Tensor]:
    """-> before ReLU."""
    last = len(maps) - 1
    y = {last: lateral[last]}
    raw = {}
    for level in range(last - 1, -1, -1):
        raised = plain_conv_bn(plain_up(y[level + 1], maps[level]), layer.after_up[level])
        raw[level] = plain_fuse(layer.downward[level], lateral[level], raised)
        y[level] = raw[level].clamp(min=0)

    outputs = [raw[0]]
    for level in range(1, last + 1):
        second = plain_conv_bn(maps[level], layer.second[level - 1]).clamp(min=0)
        finer = plain_down(outputs[-1].clamp(min=0))
        lowered = plain_conv_bn(finer, layer.after_down[level - 1])
        middle = [y[level]] if level < last else []
        outputs.append(plain_fuse(layer.upward[level - 1], second, *middle, lowered))
    return outputs


def plain_refine(net: Any, feats: list[Tensor]) -> list[Tensor]:
    """-> the self-teacher's maps before ReLU."""
    pairs = zip(feats, net.lateral, strict=True)
    lateral = [plain_conv_bn(feat, block).clamp(min=0) for feat, block in pairs]
    raw = plain_layer(net.layers[0], feats, lateral)
    for layer in net.layers[1:]:
        maps = [x.clamp(min=0) for x in raw]
        raw = plain_layer(layer, maps, maps)
    return raw


# --- the imitations of its maps


def plain_map(feat: Tensor) -> Tensor:
    """(C, H, W) -> the attention map; the mean over channels, as the paper has it."""
    energy = (feat**2).mean(0)
    return energy / (energy**2).sum().sqrt()


def plain_attention(term: Any, feats: list[Tensor], raw: list[Tensor]) -> Any:
    total: Any = 0
    for s, t in zip(feats, raw, strict=True):
        for n in range(IMAGES):
            difference = plain_map(s[n]) - plain_map(t[n].clamp(min=0))
            total = total + (difference**2).sum() / difference.numel() / IMAGES
    return total


def plain_fitnet(term: Any, feats: list[Tensor], raw: list[Tensor]) -> Any:
    total: Any = 0
    for block, s, t in zip(term.imitate.regress, feats, raw, strict=True):
        difference = plain_conv_bn(s, block).clamp(min=0) - t.clamp(min=0)
        total = total + (difference**2).sum() / difference.numel()
    return total


def plain_overhaul(term: Any, feats: list[Tensor], raw: list[Tensor]) -> Any:
    total: Any = 0
    fuses = [term.refine.layers[-1].downward[0], *term.refine.layers[-1].upward]
    for level, (s, t) in enumerate(zip(feats, raw, strict=True), start=1):
        ours = plain_conv_bn(s, term.imitate.regress[level - 1])
        norm = fuses[level - 1].conv[-1]
        part: Any = 0
        for c in range(t.shape[1]):
            lowest = mean_below_zero(norm.bias[c].item(), abs(norm.weight[c].item()))
            for own, goal in zip(ours[:, c].flatten(), t[:, c].flatten(), strict=True):
                wanted = max(goal.item(), lowest)
                if own.item() > wanted or wanted > 0:
                    part = part + (own - wanted) ** 2
        total = total + part / IMAGES / 2 ** (len(feats) - level)
    return total


def mean_below_zero(mean: float, deviation: float, steps: int = 20_000) -> float:
    """Of a normal variable, where it is below 0: a sum over thin slices."""
    likeliest = min(mean, 0)
    low = likeliest - 12 * deviation
    weight = moment = 0.0
    for step in range(steps):
        x = low * (step + 0.5) / steps
        density = math.exp((likeliest - x) * (likeliest + x - 2 * mean) / (2 * deviation**2))
        weight += density
        moment += density * x
    return moment / weight


PLAIN = {"attention": plain_attention, "fitnet": plain_fitnet, "overhaul": plain_overhaul}


# --- the imitation of its class scores


def plain_sigmoid(logits: Tensor, temperature: float) -> Tensor:
    return 1 / (1 + (-logits / temperature).exp())


def plain_sigmoid_kl(student: list[Tensor], own: list[Tensor], temperature: float) -> Any:
    """Class maps of both -> a mean weighed by the self-teacher's confidence."""
    total: Any = 0
    whole: Any = 0
    for s, t in zip(student, own, strict=True):
        q = plain_sigmoid(s, temperature)
        p = plain_sigmoid(t, temperature)
        yes = p * (p / q).log()
        no = (1 - p) * ((1 - p) / (1 - q)).log()
        weight = plain_sigmoid(t, 1).amax(1)
        total += (weight * (yes + no).sum(1)).sum()
        whole += weight.sum()
    return temperature**2 * total / whole


def plain_softmax_kl(student: list[Tensor], own: list[Tensor], temperature: float) -> Any:
    """A mean over images and cells."""
    total: Any = 0
    cells = 0
    for s, t in zip(student, own, strict=True):
        for n in range(IMAGES):
            for i in range(s.shape[2]):
                for j in range(s.shape[3]):
                    q = (s[n, :, i, j] / temperature).exp()
                    p = (t[n, :, i, j] / temperature).exp()
                    q = q / q.sum()
                    p = p / p.sum()
                    total = total + (p * (p / q).log()).sum()
                    cells += 1
    return temperature**2 * total / cells


def make_segmenter() -> Segmenter:
    return Segmenter(NAMES)
