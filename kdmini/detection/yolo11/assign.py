"""Task-aligned assignment: which anchor answers for which object, and how surely.

Source: Feng et al., "TOOD", ICCV 2021, section 3.2.
Every step keeps its shape whatever the number of objects, so nothing here waits for the
device. Where a batch is large or dense, a few images at a time bound the memory.

Legend: N images, G objects (padded), A anchor points, K classes.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kdmini.detection.boxes import centre_inside, ciou, images_at_once
from kdmini.detection.truth import Targets

ALPHA = 0.5  # exponent of the class score in the alignment
BETA = 6.0  # exponent of the overlap
CANDIDATES = 10  # best-aligned anchors that an object may claim
EPS = 1e-9  # keeps a division finite


class Assignment(NamedTuple):
    boxes_xyxy: Tensor  # (N, A, 4) the object's box, pixels; meaningless on background
    scores: Tensor  # (N, A, K) soft class target, zero on background


@torch.no_grad()
def assign(
    scores: Tensor,
    boxes_xyxy: Tensor,
    points: Tensor,
    targets: Targets,
) -> Assignment:
    """What each anchor is to predict, given what it predicts now.

    scores (N, A, K) 0..1, boxes_xyxy (N, A, 4) and points (A, 2) in pixels.
    """
    labels = targets["labels"]  # (N, G)
    images, objects = labels.shape
    if objects == 0:
        return Assignment(torch.zeros_like(boxes_xyxy), torch.zeros_like(scores))

    count = images_at_once(images, objects, len(points))
    of_images = (scores, boxes_xyxy, targets["boxes_xyxy"], labels)
    groups = zip(*(tensor.split(count) for tensor in of_images), strict=True)
    parts = [assign_together(points, *group) for group in groups]
    if len(parts) == 1:
        return parts[0]
    owner_xyxy, target = map(torch.cat, zip(*parts, strict=True))
    return Assignment(owner_xyxy, target)


def assign_together(
    points: Tensor,
    scores: Tensor,
    boxes_xyxy: Tensor,
    objects_xyxy: Tensor,
    labels: Tensor,
) -> Assignment:
    """As `assign`, of objects_xyxy (N, G, 4) and labels (N, G)."""
    real = (labels >= 0).unsqueeze(-1)  # (N, G, 1), False where padded
    inside = centre_inside(points, objects_xyxy) & real  # (N, G, A)
    overlap = ciou(objects_xyxy.unsqueeze(2), boxes_xyxy.unsqueeze(1))
    overlap = overlap.clamp(min=0) * inside  # (N, G, A)
    object_score = class_score(scores, labels)  # (N, G, A)
    # a cube squared, both by products: pow(6) rounds the last values of a tensor otherwise
    # than the same values inside one, and so would depend on which images are together
    overlap_beta = overlap.pow(BETA / 2).square()
    alignment = object_score.pow(ALPHA) * overlap_beta  # (N, G, A)
    candidate = top_candidates(alignment) & inside
    owned = best_object(candidate, overlap)  # (N, G, A), at most one G an anchor

    owner = owned.int().argmax(1)  # (N, A)
    owner_xyxy = objects_xyxy.gather(1, owner.unsqueeze(-1).expand(-1, -1, 4))
    label = labels.clamp(min=0).gather(1, owner)  # (N, A)
    score = target_score(alignment * owned, overlap * owned)  # (N, A)
    # scatter, as one_hot would look at its input's values and so wait for the device
    target = torch.zeros_like(scores)
    target.scatter_(2, label.unsqueeze(-1), score.unsqueeze(-1))
    return Assignment(owner_xyxy, target)


def class_score(scores: Tensor, labels: Tensor) -> Tensor:
    """(N, A, K), (N, G) -> (N, G, A): each anchor's score for each object's class."""
    anchors = scores.shape[1]
    index = labels.clamp(min=0).unsqueeze(-1).expand(-1, -1, anchors)
    return scores.transpose(1, 2).gather(1, index)


def top_candidates(alignment: Tensor) -> Tensor:
    """(N, G, A) -> (N, G, A) bool: the best-aligned anchors of each object."""
    count = min(CANDIDATES, alignment.shape[-1])
    best = alignment.topk(count, dim=-1).indices
    return torch.zeros_like(alignment, dtype=torch.bool).scatter_(-1, best, True)


def best_object(candidate: Tensor, overlap: Tensor) -> Tensor:
    """(N, G, A) -> (N, G, A) bool: one object for each anchor, or none.

    An anchor that several objects claim goes to the object that its box overlaps most of
    all.
    """
    contested = candidate.sum(1, keepdim=True) > 1
    closest = overlap.argmax(1, keepdim=True)  # (N, 1, A)
    closest_alone = torch.zeros_like(candidate).scatter_(1, closest, True)
    return torch.where(contested, closest_alone, candidate)


def target_score(alignment: Tensor, overlap: Tensor) -> Tensor:
    """(N, G, A) of owned anchors -> (N, A): the alignment, scaled object by object.

    An object's best anchor gets the object's best overlap.
    """
    best_overlap = overlap.amax(-1, keepdim=True)
    best_alignment = alignment.amax(-1, keepdim=True)
    scale = best_overlap / (best_alignment + EPS)
    return (alignment * scale).amax(1)
