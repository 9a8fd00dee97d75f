"""The detection loss one anchor and one object at a time, in float64."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import complete_box_iou

from tests.detection.yolo11.scenes import BINS, BOX_CHANNELS, CLASSES, SIZES, STRIDES, Object


@dataclass
class Anchor:
    x: float
    y: float
    stride: int
    bins: Tensor  # (4, R) distance logits
    logits: Tensor  # (K,)

    def box_xyxy(self) -> list[float]:
        """What the maps say, in pixels."""
        distances = []
        for side in self.bins.softmax(1).tolist():
            mean = sum(number * p for number, p in enumerate(side))
            distances.append(mean * self.stride)
        left, top, right, bottom = distances
        return [self.x - left, self.y - top, self.x + right, self.y + bottom]

    def lies_in(self, item: Object) -> bool:
        return self.is_inside(item.box_xyxy)

    def is_inside(self, box_xyxy: list[float]) -> bool:
        x1, y1, x2, y2 = box_xyxy
        return x1 < self.x < x2 and y1 < self.y < y2

    def true_distances(self, item: Object) -> list[float]:
        """Left, top, right, bottom, in strides."""
        x1, y1, x2, y2 = item.box_xyxy
        pixels = [self.x - x1, self.y - y1, x2 - self.x, y2 - self.y]
        return [distance / self.stride for distance in pixels]


@dataclass
class Answer:
    """An anchor's object, and its target score."""

    item: Object
    score: float


def looped_loss(
    maps: list[Tensor],
    scenes: list[list[Object]],
    regions: list[list[list[float]]] | None = None,
) -> dict[str, float]:
    """-> box, cls, dfl. regions: boxes of each image that are ignored."""
    box = 0.0
    cls = 0.0
    dfl = 0.0
    total = 0.0
    for n, objects in enumerate(scenes):
        anchors = anchors_of(maps, n)
        answers = answers_of(anchors, objects)
        for a, anchor in enumerate(anchors):
            answer = answers.get(a)
            answers_for_one = answer is not None and answer.score > 0
            in_region = any(anchor.is_inside(region) for region in (regions or {n: []})[n])
            if answers_for_one or not in_region:
                cls += class_loss(anchor, answer)
            if answer and answer.score:
                total += answer.score
                box += answer.score * (1 - ciou(answer.item, anchor))
                dfl += answer.score * distribution_loss(anchor, answer.item)
    total = max(total, 1)
    return {"box": box / total, "cls": cls / total, "dfl": dfl / total}


def anchors_of(maps: list[Tensor], n: int) -> list[Anchor]:
    """Of image n, in the order of anchor_points."""
    anchors = []
    for level, stride, (height, width) in zip(maps, STRIDES, SIZES, strict=True):
        for row in range(height):
            for column in range(width):
                cell = level[n, :, row, column].double()
                anchors.append(
                    Anchor(
                        x=(column + 0.5) * stride,
                        y=(row + 0.5) * stride,
                        stride=stride,
                        bins=cell[:BOX_CHANNELS].view(4, BINS),
                        logits=cell[BOX_CHANNELS:],
                    )
                )
    return anchors


def answers_of(anchors: list[Anchor], objects: list[Object]) -> dict[int, Answer]:
    """Task-aligned assignment -> number of the anchor -> what it answers for."""
    overlap = torch.zeros(len(objects), len(anchors), dtype=torch.float64)
    alignment = torch.zeros_like(overlap)
    claims: list[set[int]] = [set() for _ in anchors]  # the objects that claim each
    for g, item in enumerate(objects):
        for a, anchor in enumerate(anchors):
            if anchor.lies_in(item):
                score = anchor.logits[item.label].sigmoid().item()
                overlap[g, a] = max(ciou(item, anchor), 0)
                alignment[g, a] = score**0.5 * overlap[g, a] ** 6
        best_first = sorted(range(len(anchors)), key=lambda a: -alignment[g, a])
        for a in best_first[:10]:
            if anchors[a].lies_in(item):
                claims[a].add(g)

    owners = {}
    for a, claimants in enumerate(claims):
        if len(claimants) == 1:
            owners[a] = min(claimants)
        elif claimants:
            owners[a] = int(overlap[:, a].argmax())

    answers = {}
    for a, g in owners.items():
        own = [other for other, owner in owners.items() if owner == g]
        most = alignment[g, own].max().item()
        score = 0.0
        if most > 0:
            score = (alignment[g, a] / most * overlap[g, own].max()).item()
        answers[a] = Answer(objects[g], score)
    return answers


def ciou(item: Object, anchor: Anchor) -> float:
    true = torch.tensor([item.box_xyxy], dtype=torch.float64)
    predicted = torch.tensor([anchor.box_xyxy()], dtype=torch.float64)
    return complete_box_iou(true, predicted).item()


def class_loss(anchor: Anchor, answer: Answer | None) -> float:
    """Binary cross-entropy, summed over the classes."""
    target = torch.zeros(CLASSES, dtype=torch.float64)
    if answer:
        target[answer.item.label] = answer.score
    log_p = F.logsigmoid(anchor.logits)
    log_not_p = F.logsigmoid(-anchor.logits)
    return -(target * log_p + (1 - target) * log_not_p).sum().item()


def distribution_loss(anchor: Anchor, item: Object) -> float:
    """Cross-entropy with the two bins beside each distance, the mean of the sides."""
    loss = 0.0
    log_p = anchor.bins.log_softmax(1)
    for side, distance in zip(log_p, anchor.true_distances(item), strict=True):
        clamped = min(max(distance, 0), 14.99)
        low = math.floor(clamped)
        share_high = clamped - low
        loss -= ((1 - share_high) * side[low] + share_high * side[low + 1]).item()
    return loss / 4
