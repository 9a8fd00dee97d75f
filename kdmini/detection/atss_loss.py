"""Anchors of ATSS, the selection of those that answer for an object, and the loss.

Sources: Zhang et al., "Bridging the Gap Between Anchor-based and Anchor-free Detection
via Adaptive Training Sample Selection", CVPR 2020, algorithm 1; Lin et al., "Focal
Loss", ICCV 2017; Tian et al., "FCOS", ICCV 2019, equation 3 (centerness).
Simplified: focal and centerness loss are divided by the positives of one rank, not of
all. All shapes are fixed whatever the number of objects, so nothing waits for the
device.

Legend: N images, A anchors of all levels, G objects (padded), C candidates, K classes,
H W cells.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_iou, sigmoid_focal_loss

from kdmini.detection.boxes import (
    anchor_points,
    centre_inside,
    counted,
    flatten_levels,
    giou,
    images_at_once,
    left_top,
    right_bottom,
    xyxy_to_dist_ltrb,
)
from kdmini.detection.truth import Targets

LEVELS = {"p3": 8, "p4": 16, "p5": 32, "p6": 64, "p7": 128}  # name of the tap -> stride
SIDE = 8  # of an anchor, in strides
CANDIDATES = 9  # an object's closest anchors on each level
OFFSET = 0.1  # of an anchor's side, for a prediction of 1
SCALE = 0.2  # of the logarithm of its side, for a prediction of 1
LARGEST = math.log(1000 / 16)  # bounds exp: a box is at most 62 anchors wide
EPS = 1e-7  # keeps centerness, and its gradient, finite


class Anchors(NamedTuple):
    """One square a cell."""

    points: Tensor  # (A, 2) centres, pixels
    sides: Tensor  # (A, 1) pixels
    counts: list[int]  # anchors on each level


def anchors_of(maps: Sequence[Tensor]) -> Anchors:
    """Of maps (N, C, H, W) of the five levels."""
    sizes = [level.shape[2:] for level in maps]
    points, stride_of = anchor_points(sizes, list(LEVELS.values()), maps[0].device)
    counts = [height * width for height, width in sizes]
    return Anchors(points, SIDE * stride_of, counts)


def deltas_to_xyxy(deltas: Tensor, anchors: Anchors) -> Tensor:
    """Offsets of the centre, logarithms of the sides (N, A, 4) -> (N, A, 4) pixels."""
    centres = anchors.points + OFFSET * deltas[..., :2] * anchors.sides
    growth = (SCALE * deltas[..., 2:]).clamp(max=LARGEST).exp()
    half = anchors.sides * growth / 2
    return torch.cat([centres - half, centres + half], -1)


class Assignment(NamedTuple):
    boxes_xyxy: Tensor  # (N, A, 4) the object's box, pixels; meaningless on background
    labels: Tensor  # (N, A) int64, -1 on background


@torch.no_grad()
def assign(anchors: Anchors, targets: Targets) -> Assignment:
    """Which anchor answers for which object.

    An object's positives are those of its candidates, CANDIDATES of each level by
    distance of the centres, that have their centre in its box and an IoU of at least
    mean + standard deviation of its candidates' IoU. What several objects claim goes to
    the one with the highest IoU.
    """
    # one more object that is padding: G is never 0
    objects_xyxy = F.pad(targets["boxes_xyxy"], (0, 0, 0, 1))  # (N, G, 4)
    labels = F.pad(targets["labels"], (0, 1), value=-1)  # (N, G)
    images, objects = labels.shape
    count = images_at_once(images, objects, len(anchors.points))
    groups = zip(objects_xyxy.split(count), labels.split(count), strict=True)
    parts = [assign_together(anchors, *group) for group in groups]
    if len(parts) == 1:
        return parts[0]
    owner_xyxy, owner_label = map(torch.cat, zip(*parts, strict=True))
    return Assignment(owner_xyxy, owner_label)


def assign_together(anchors: Anchors, objects_xyxy: Tensor, labels: Tensor) -> Assignment:
    """As `assign`, of objects_xyxy (N, G, 4) and labels (N, G)."""
    half = anchors.sides / 2
    anchors_xyxy = torch.cat([anchors.points - half, anchors.points + half], 1)
    iou = box_iou(objects_xyxy.flatten(0, 1), anchors_xyxy)
    iou = iou.unflatten(0, labels.shape)  # (N, G, A)

    candidates = closest_anchors(objects_xyxy, anchors)  # (N, G, C)
    overlap = iou.gather(2, candidates)  # (N, G, C)
    threshold = overlap.mean(2, keepdim=True) + overlap.std(2, keepdim=True)
    candidate = torch.zeros_like(iou, dtype=torch.bool)  # (N, G, A)
    candidate.scatter_(2, candidates, True)
    inside = centre_inside(anchors.points, objects_xyxy)
    real = (labels >= 0).unsqueeze(2)  # (N, G, 1), False where padded
    claimed = candidate & (iou >= threshold) & inside & real  # (N, G, A)

    best, owner = iou.masked_fill(~claimed, -1).max(1)  # (N, A)
    owner_xyxy = objects_xyxy.gather(1, owner.unsqueeze(2).expand(-1, -1, 4))
    owner_label = labels.gather(1, owner).masked_fill(best < 0, -1)
    return Assignment(owner_xyxy, owner_label)


def closest_anchors(objects_xyxy: Tensor, anchors: Anchors) -> Tensor:
    """(N, G, 4) -> (N, G, C): the anchors of each level with the closest centres."""
    centres = (left_top(objects_xyxy) + right_bottom(objects_xyxy)) / 2
    offsets = centres.unsqueeze(2) - anchors.points  # (N, G, A, 2)
    distances = torch.linalg.vector_norm(offsets, dim=-1)
    closest = []
    start = 0  # the level's first anchor
    for level in distances.split(anchors.counts, 2):
        count = level.shape[2]
        index = level.topk(min(CANDIDATES, count), largest=False).indices
        closest.append(start + index)
        start += count
    return torch.cat(closest, 2)


def centerness_of(boxes_xyxy: Tensor, points: Tensor) -> Tensor:
    """(N, A, 4), (A, 2) -> (N, A): 1 in the centre of the box, 0 at its sides."""
    pixels = torch.ones_like(points[:, :1])  # the distances with a stride of 1
    ltrb = xyxy_to_dist_ltrb(boxes_xyxy, points, pixels).clamp(min=EPS)
    across = ltrb[..., 0::2]
    down = ltrb[..., 1::2]
    product = across.amin(-1) / across.amax(-1) * down.amin(-1) / down.amax(-1)
    return product.sqrt()


def detection_loss(preds: Mapping[str, Sequence[Tensor]], targets: Targets) -> dict[str, Tensor]:
    """The preds of ATSS -> {"box", "cls", "centerness"}, scalars in float32.

    GIoU is weighted by the true centerness, and divided by the sum of that; the other
    two by the number of positives. Both sums are taken as 1 at least. Ignored regions take
    the background out of cls.
    """
    anchors = anchors_of(preds["cls"])
    logits = flatten_levels(preds["cls"])  # (N, A, K)
    deltas = flatten_levels(preds["box"])  # (N, A, 4)
    centerness_logits = flatten_levels(preds["centerness"]).squeeze(2)  # (N, A)
    assigned = assign(anchors, targets)
    positive = (assigned.labels >= 0).float()  # (N, A)
    positives = positive.sum().clamp(min=1)

    # scatter, as one_hot would look at its input's values and so wait for the device
    label = assigned.labels.clamp(min=0).unsqueeze(2)  # (N, A, 1)
    target = torch.zeros_like(logits).scatter_(2, label, positive.unsqueeze(2))
    focal = sigmoid_focal_loss(logits, target, alpha=0.25, gamma=2.0)
    kept = counted(anchors.points, targets, assigned.labels >= 0)
    if kept is not None:
        focal = focal * kept
    cls = focal.sum() / positives

    true_centerness = centerness_of(assigned.boxes_xyxy, anchors.points)  # (N, A)
    bce = F.binary_cross_entropy_with_logits(
        centerness_logits, true_centerness, positive, reduction="sum"
    )
    weight = true_centerness * positive
    boxes_xyxy = deltas_to_xyxy(deltas, anchors)
    distance = 1 - giou(boxes_xyxy, assigned.boxes_xyxy)
    box = (distance * weight).sum() / weight.sum().clamp(min=1)
    return {"box": box, "cls": cls, "centerness": bce / positives}
