"""Task-aligned assignment: which anchor answers for which object, and with what target score.

Source: Feng et al., "TOOD: Task-aligned One-stage Object Detection", ICCV 2021, section 3.2.
Every step keeps its shape whatever the number of objects, so nothing here waits for the device.
Legend: N images, G objects (padded), A anchor points, K classes.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kdmini.contracts import Targets
from kdmini.detection.boxes import centre_inside, ciou

ALPHA, BETA, CANDIDATES = 0.5, 6.0, 10
EPS = 1e-9


class Assignment(NamedTuple):
    boxes_xyxy: Tensor  # (N, A, 4) the object's box, pixels; meaningless on background
    scores: Tensor  # (N, A, K) soft class target, zero on background


@torch.no_grad()
def assign(scores: Tensor, boxes_xyxy: Tensor, points: Tensor, targets: Targets) -> Assignment:
    """scores (N, A, K) 0..1, boxes_xyxy (N, A, 4) and points (A, 2) in pixels -> Assignment."""
    objects_xyxy, labels = targets["boxes_xyxy"], targets["labels"]  # (N, G, 4), (N, G)
    if labels.shape[1] == 0:
        return Assignment(torch.zeros_like(boxes_xyxy), torch.zeros_like(scores))
    inside = centre_inside(points, objects_xyxy) & (labels >= 0).unsqueeze(-1)  # (N, G, A)
    overlap = (
        ciou(objects_xyxy.unsqueeze(2), boxes_xyxy.unsqueeze(1)).clamp(min=0) * inside
    )  # (N, G, A)
    alignment = class_score(scores, labels).pow(ALPHA) * overlap.pow(BETA)  # (N, G, A)
    owned = best_object(top_candidates(alignment) & inside, overlap)  # (N, G, A)

    score = target_score(alignment * owned, overlap * owned)  # (N, A)
    owner = owned.int().argmax(1)  # (N, A)
    label = labels.clamp(min=0).gather(1, owner)
    boxes = objects_xyxy.gather(1, owner.unsqueeze(-1).expand(-1, -1, 4))
    # scatter, as one_hot would look at its input's values and so wait for the device
    return Assignment(
        boxes, torch.zeros_like(scores).scatter_(2, label.unsqueeze(-1), score.unsqueeze(-1))
    )


def class_score(scores: Tensor, labels: Tensor) -> Tensor:
    """(N, A, K), (N, G) -> (N, G, A): each anchor's score for each object's class."""
    index = labels.clamp(min=0).unsqueeze(-1).expand(-1, -1, scores.shape[1])
    return scores.transpose(1, 2).gather(1, index)


def top_candidates(alignment: Tensor) -> Tensor:
    """(N, G, A) -> (N, G, A) bool: the best-aligned anchors of each object."""
    best = alignment.topk(min(CANDIDATES, alignment.shape[-1]), dim=-1).indices
    return torch.zeros_like(alignment, dtype=torch.bool).scatter_(-1, best, True)


def best_object(candidate: Tensor, overlap: Tensor) -> Tensor:
    """(N, G, A) -> (N, G, A) bool: an anchor that several objects claim goes to the one it overlaps
    most.
    """
    contested = candidate.sum(1, keepdim=True) > 1
    closest = torch.zeros_like(candidate).scatter_(1, overlap.argmax(1, keepdim=True), True)
    return torch.where(contested, closest, candidate)


def target_score(alignment: Tensor, overlap: Tensor) -> Tensor:
    """(N, G, A) of owned anchors -> (N, A): alignment, scaled so that an object's best anchor gets
    its best overlap.
    """
    scale = overlap.amax(-1, keepdim=True) / (alignment.amax(-1, keepdim=True) + EPS)
    return (alignment * scale).amax(1)
