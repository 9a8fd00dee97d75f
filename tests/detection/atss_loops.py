"""ATSS in plain loops: the selection of algorithm 1, and the losses of the papers."""

import math
import statistics
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.ops import generalized_box_iou

from kdmini.detection.atss_loss import LEVELS

Box = list[float]  # x1, y1, x2, y2


class Square(NamedTuple):
    """An anchor."""

    x: float
    y: float
    side: float

    def box_xyxy(self) -> Box:
        half = self.side / 2
        return [self.x - half, self.y - half, self.x + half, self.y + half]

    def has_centre_in(self, box: Box) -> bool:
        x1, y1, x2, y2 = box
        return x1 < self.x < x2 and y1 < self.y < y2

    def distance(self, box: Box) -> float:
        """Of the centres."""
        x1, y1, x2, y2 = box
        return math.hypot(self.x - (x1 + x2) / 2, self.y - (y1 + y2) / 2)


def squares_of(maps: list[Tensor]) -> list[list[Square]]:
    """Of each level, row by row; their sides are eight strides."""
    levels = []
    for level, stride in zip(maps, LEVELS.values(), strict=True):
        squares = []
        for row in range(level.shape[2]):
            for column in range(level.shape[3]):
                x = (column + 0.5) * stride
                y = (row + 0.5) * stride
                squares.append(Square(x, y, 8 * stride))
        levels.append(squares)
    return levels


class Selection(NamedTuple):
    owners: list[list[int]]  # of each image and anchor, the object it answers for, or -1
    contested: int  # anchors that several objects claim


def select_by_the_paper(maps: list[Tensor], targets: dict) -> Selection:
    levels = squares_of(maps)
    owners = []
    contested = 0
    for boxes, labels in zip(targets["boxes_xyxy"], targets["labels"], strict=True):
        claims: dict[int, list[tuple[float, int]]] = {}  # anchor -> IoU and object of each claim
        for g, box in enumerate(boxes.tolist()):
            if labels[g] >= 0:
                for anchor, overlap in positives_of(box, levels).items():
                    claims.setdefault(anchor, []).append((overlap, g))
        contested += sum(len(claim) > 1 for claim in claims.values())
        count = sum(len(squares) for squares in levels)
        owners.append([max(claims[a])[1] if a in claims else -1 for a in range(count)])
    return Selection(owners, contested)


def positives_of(box: Box, levels: list[list[Square]]) -> dict[int, float]:
    """-> number of each anchor that the object claims, and its IoU."""
    candidates: dict[int, Square] = {}
    start = 0
    for squares in levels:
        by_distance = sorted(range(len(squares)), key=lambda i: squares[i].distance(box))
        candidates |= {start + i: squares[i] for i in by_distance[:9]}
        start += len(squares)
    overlaps = {a: iou(square.box_xyxy(), box) for a, square in candidates.items()}
    threshold = statistics.fmean(overlaps.values()) + statistics.stdev(overlaps.values())
    return {
        a: overlap
        for a, overlap in overlaps.items()
        if overlap >= threshold and candidates[a].has_centre_in(box)
    }


def iou(a: Box, b: Box) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    inter = max(width, 0) * max(height, 0)
    return inter / (area(a) + area(b) - inter)


def area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def looped_loss(preds: dict[str, list[Tensor]], targets: dict) -> dict[str, float]:
    """-> box, cls, centerness, without gains."""
    squares = [square for level in squares_of(preds["cls"]) for square in level]
    owners = select_by_the_paper(preds["cls"], targets).owners
    box = 0.0
    cls = 0.0
    centerness = 0.0
    weights = 0.0
    positives = 0
    for n in range(len(owners)):
        logits = rows_of(preds["cls"], n)
        deltas = rows_of(preds["box"], n)
        centred = rows_of(preds["centerness"], n)
        for a, g in enumerate(owners[n]):
            label = int(targets["labels"][n, g]) if g >= 0 else -1
            regions = targets["ignored_xyxy"][n].tolist() if "ignored_xyxy" in targets else []
            if g >= 0 or not any(squares[a].has_centre_in(region) for region in regions):
                cls += focal_loss(logits[a], label)
            if g >= 0:
                true = targets["boxes_xyxy"][n, g].tolist()
                weight = true_centerness(squares[a], true)
                positives += 1
                weights += weight
                box += weight * giou_loss(drawn(squares[a], deltas[a]), true)
                centerness += cross_entropy(centred[a][0], weight)
    assert positives > 5
    assert weights > 1
    return {
        "box": box / weights,
        "cls": cls / positives,
        "centerness": centerness / positives,
    }


def rows_of(maps: list[Tensor], n: int) -> list[list[float]]:
    """(A, C) of image n."""
    return torch.cat([level[n].flatten(1) for level in maps], 1).T.tolist()


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def focal_loss(logits: list[float], label: int) -> float:
    """Summed over the classes; label -1 is background."""
    loss = 0.0
    for k, logit in enumerate(logits):
        p = sigmoid(logit)
        if k == label:
            loss -= 0.25 * (1 - p) ** 2 * math.log(p)
        else:
            loss -= 0.75 * p**2 * math.log(1 - p)
    return loss


def cross_entropy(logit: float, target: float) -> float:
    p = sigmoid(logit)
    return -target * math.log(p) - (1 - target) * math.log(1 - p)


def true_centerness(square: Square, box: Box) -> float:
    x1, y1, x2, y2 = box
    across = (square.x - x1, x2 - square.x)
    down = (square.y - y1, y2 - square.y)
    return math.sqrt(min(across) / max(across) * min(down) / max(down))


def drawn(square: Square, deltas: list[float]) -> Box:
    """The box that these deltas say."""
    dx, dy, dw, dh = deltas
    x = square.x + 0.1 * dx * square.side
    y = square.y + 0.1 * dy * square.side
    width = square.side * math.exp(0.2 * dw)
    height = square.side * math.exp(0.2 * dh)
    return [x - width / 2, y - height / 2, x + width / 2, y + height / 2]


def giou_loss(box: Box, true: Box) -> float:
    return 1 - generalized_box_iou(torch.tensor([box]), torch.tensor([true])).item()
