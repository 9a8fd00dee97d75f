"""The terms that are one line of algebra, written out in loops.

The letters are those of docs/terms.md.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdmini.contracts import View
from tests.terms.views import IMAGES, Scene, leaf

BINS = 5
CLASSES = 3
SIZES = [(3, 4), (2, 2)]  # H, W of the two levels, and of the tap at each
SHAPES = {  # student C before alignment, teacher C, H, W
    "tap0": (7, 5, 3, 4),
    "tap1": (7, 4, 2, 2),
}


def random_scene(dtype: torch.dtype = torch.float64, seed: int = 0, size: float = 1.0) -> Scene:
    """Aligned maps and preds of two levels; size: of the maps."""
    generator = torch.Generator().manual_seed(seed)

    def view() -> View:
        feats = {}
        for tap, (_, channels, height, width) in SHAPES.items():
            shape = (channels, height, width)
            feats[tap] = leaf(shape, generator, dtype, size)
        preds = []
        for height, width in SIZES:
            shape = (4 * BINS + CLASSES, height, width)
            preds.append(leaf(shape, generator, dtype, size=3))
        return View(feats, preds, torch.empty(0), [pred[:, 4 * BINS :] for pred in preds])

    return Scene(view(), view())


# --- of preds, cell by cell


class Cell(NamedTuple):
    level: int
    n: int
    y: int
    x: int


def cells() -> Iterator[Cell]:
    """Every cell of every level and image."""
    for level, (height, width) in enumerate(SIZES):
        for n in range(IMAGES):
            for y in range(height):
                for x in range(width):
                    yield Cell(level, n, y, x)


def classes_of(view: View, cell: Cell) -> list[Tensor]:
    pred = view.preds[cell.level]
    return list(pred[cell.n, 4 * BINS :, cell.y, cell.x])


def side_of(view: View, cell: Cell, side: int) -> list[Tensor]:
    pred = view.preds[cell.level]
    start = side * BINS
    return list(pred[cell.n, start : start + BINS, cell.y, cell.x])


def confidence(scene: Scene, cell: Cell) -> float:
    logits = classes_of(scene.teacher, cell)
    return max(sigmoid(logit, 1).item() for logit in logits)


def softmax(logits: list[Tensor], temperature: float) -> list[Tensor]:
    powers = [(logit / temperature).exp() for logit in logits]
    total: Any = sum(powers)
    return [power / total for power in powers]


def sigmoid(logit: Tensor, temperature: float) -> Tensor:
    return 1 / (1 + (-logit / temperature).exp())


def kl(p: list[Tensor], q: list[Tensor]) -> Any:
    total: Any = 0
    for a, b in zip(p, q, strict=True):
        total += a * (a / b).log()
    return total


def over_cells(scene: Scene, value: Callable[[Cell], Any], gamma: float = 1.0) -> Any:
    """The mean of a value over the cells, weighted by the teacher's confidence^gamma."""
    total: Any = 0
    whole = 0.0
    for cell in cells():
        weight = confidence(scene, cell) ** gamma
        total += weight * value(cell)
        whole += weight
    return total / whole


def plain_logits(scene: Scene, temperature: float, gamma: float, form: str) -> Any:
    def value(cell: Cell) -> Any:
        s = classes_of(scene.student, cell)
        t = classes_of(scene.teacher, cell)
        total: Any = 0
        if form == "softmax":
            total = kl(softmax(t, temperature), softmax(s, temperature))
        else:
            for logit_s, logit_t in zip(s, t, strict=True):
                q = sigmoid(logit_s, temperature)
                p = sigmoid(logit_t, temperature)
                total += kl([p, 1 - p], [q, 1 - q])
        return temperature**2 * total

    return over_cells(scene, value, gamma)


def plain_localisation(scene: Scene, temperature: float) -> Any:
    def value(cell: Cell) -> Any:
        total: Any = 0
        for side in range(4):
            q = softmax(side_of(scene.student, cell, side), temperature)
            p = softmax(side_of(scene.teacher, cell, side), temperature)
            total += kl(p, q) / 4
        return temperature**2 * total

    return over_cells(scene, value)


# --- of feature maps


def pairs(scene: Scene) -> Iterator[tuple[Tensor, Tensor]]:
    """The student's and the teacher's map of each tap."""
    for tap in SHAPES:
        yield scene.student.feats[tap], scene.teacher.feats[tap]


def plain_channelwise(scene: Scene, temperature: float) -> Any:
    total: Any = 0
    for s, t in pairs(scene):
        channels = s.shape[1]
        for n in range(IMAGES):
            for c in range(channels):
                q = softmax(list(s[n, c].reshape(-1)), temperature)
                p = softmax(list(t[n, c].reshape(-1)), temperature)
                total += temperature**2 * kl(p, q) / (IMAGES * channels)
    return total


def plain_pixels(scene: Scene, temperature: float) -> Any:
    def relations(feat: Tensor) -> list[list[Tensor]]:
        """(C, H, W) -> the cosines of every cell with all."""
        unit = [cell / cell.dot(cell).sqrt() for cell in feat.flatten(1).unbind(1)]
        return [[a.dot(b) for b in unit] for a in unit]

    total: Any = 0
    for s, t in pairs(scene):
        for n in range(IMAGES):
            rows = list(zip(relations(s[n]), relations(t[n]), strict=True))
            for of_student, of_teacher in rows:
                q = softmax(of_student, temperature)
                p = softmax(of_teacher, temperature)
                total += temperature**2 * kl(p, q) / (IMAGES * len(rows))
    return total


def plain_pearson(scene: Scene) -> Any:
    total: Any = 0
    for s, t in pairs(scene):
        channels = s.shape[1]
        for c in range(channels):
            x = s[:, c].reshape(-1)
            y = t[:, c].reshape(-1)
            x = x - x.sum() / len(x)
            y = y - y.sum() / len(y)
            energy = (x * x).sum() * (y * y).sum()
            correlation = (x * y).sum() / energy.sqrt()
            total += (1 - correlation) / channels
    return total


def plain_centred(scene: Scene, eps: float) -> Any:
    def own(feat: Tensor) -> Any:
        """What is left of the attention map of each image, (N, H * W)."""
        energy = (feat * feat).sum(1).reshape(len(feat), -1)
        maps = [row / row.dot(row).sqrt() for row in energy]
        mean = sum(maps) / len(maps)
        left = [row - mean for row in maps]
        return [row / (row.dot(row).sqrt() + eps) for row in left]

    total: Any = 0
    for s, t in pairs(scene):
        for x, y in zip(own(s), own(t), strict=True):
            total += (x - y).dot(x - y).sqrt() / IMAGES
    return total


def plain_standardised(scene: Scene, p: int) -> Any:
    def own(feat: Tensor) -> Any:
        """The attention map of each image, channel by channel, (N, H * W)."""
        energies: Any = [0] * len(feat)
        for c in range(feat.shape[1]):
            channel = feat[:, c].reshape(len(feat), -1)
            off = channel - channel.mean()
            deviation = (off * off).mean().sqrt()
            for n in range(len(feat)):
                energies[n] = energies[n] + (off[n] / deviation).abs() ** p
        return [energy / energy.dot(energy).sqrt() for energy in energies]

    total: Any = 0
    for s, t in pairs(scene):
        for x, y in zip(own(s), own(t), strict=True):
            total += (x - y).dot(x - y).sqrt() / IMAGES
    return total


def plain_gradient_weighted(scene: Scene, rows: list[Tensor]) -> Any:
    """rows: of each tap, (K, C), what its head multiplies the channels of a cell with."""
    total: Any = 0
    for (s, t), weights in zip(pairs(scene), rows, strict=True):
        for n in range(IMAGES):
            of_image: Any = 0
            whole = 0.0
            for y in range(s.shape[2]):
                for x in range(s.shape[3]):
                    scores = [sigmoid(row.dot(t[n, :, y, x]), 1).item() for row in weights]
                    best = max(scores)
                    slope = best * (1 - best)
                    row = weights[scores.index(best)]
                    g = sum((slope * weight.item()) ** 2 for weight in row)
                    difference = s[n, :, y, x] - t[n, :, y, x]
                    of_image += g * difference.dot(difference) / len(difference)
                    whole += g
            total += of_image / whole / IMAGES
    return total


def plain_cosine(scene: Scene) -> Any:
    total: Any = 0
    for s, t in pairs(scene):
        a_cell = 1 / s[:, 0].numel()
        for x, y in zip(s.movedim(1, 3).flatten(0, 2), t.movedim(1, 3).flatten(0, 2), strict=True):
            total += a_cell * (1 - x.dot(y) / (x.dot(x) * y.dot(y)).sqrt())
    return total


def plain_spatial(scene: Scene) -> Any:
    total: Any = 0
    for s, t in pairs(scene):
        difference = (s - t).reshape(-1)
        square: Any = sum(d * d for d in difference)
        total += square / len(difference)
    return total


def plain_score_weighted(scene: Scene) -> Any:
    total: Any = 0
    for level, (s, t) in enumerate(pairs(scene)):
        at_tap: Any = 0
        whole = 0.0
        for cell in cells():
            if cell.level != level:
                continue
            difference = (s - t)[cell.n, :, cell.y, cell.x]
            square: Any = sum(d * d for d in difference)
            weight = confidence(scene, cell)
            at_tap += weight * square / len(difference)
            whole += weight
        total += at_tap / whole
    return total


def plain_conv(x: Tensor, layer: Any) -> Tensor:
    """3x3, zeros around."""
    n, channels, height, width = x.shape
    padded = x.new_zeros(n, channels, height + 2, width + 2)
    padded[:, :, 1:-1, 1:-1] = x
    out = layer.bias.view(1, -1, 1, 1)
    for dy in range(3):
        for dx in range(3):
            moved = padded[:, :, dy : dy + height, dx : dx + width]
            weight = layer.weight[:, :, dy, dx]
            out = out + torch.einsum("nchw,oc->nohw", moved, weight)
    return out


def plain_masked(scene: Scene, term: Any) -> Any:
    """With the masks that torch's generator gives now, and the term's own generators."""
    total: Any = 0
    for (s, t), generator in zip(pairs(scene), term.generators, strict=True):
        first, _, second = generator
        draws = torch.rand(IMAGES, 1, *s.shape[2:], dtype=torch.float64)
        hidden = s.masked_fill(draws < 0.65, 0)
        generated = plain_conv(hidden, first).clamp(min=0)
        generated = plain_conv(generated, second)
        total += ((generated - t) ** 2).sum() / t.numel()
    return total
