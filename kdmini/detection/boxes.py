"""Box formats, overlaps and anchor points.

Boxes are `xyxy` corners in pixels, continuous: a box that covers the first pixel is 0, 0, 1, 1.
`dist_ltrb` are the distances from a point to the four sides, in units of that point's stride.

Legend: A anchor points, B boxes.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import batched_nms

from kdmini.contracts import Detections

EPS = 1e-7


def box_area(boxes_xyxy: Tensor) -> Tensor:
    """(..., 4) -> (...), zero where a side is negative."""
    sides = (boxes_xyxy[..., 2:] - boxes_xyxy[..., :2]).clamp(min=0)
    return sides[..., 0] * sides[..., 1]


def intersection(a_xyxy: Tensor, b_xyxy: Tensor) -> Tensor:
    """(..., 4), (..., 4) -> (...), broadcast against each other."""
    sides = torch.minimum(a_xyxy[..., 2:], b_xyxy[..., 2:]) - torch.maximum(
        a_xyxy[..., :2], b_xyxy[..., :2]
    )
    sides = sides.clamp(min=0)
    return sides[..., 0] * sides[..., 1]


def ciou(a_xyxy: Tensor, b_xyxy: Tensor) -> Tensor:
    """Complete IoU of boxes that broadcast against each other, (..., 4), (..., 4) -> (...), in
    -1.5..1.

    IoU - (centre distance / enclosing diagonal)^2 - alpha * v, where v compares the aspect ratios.
    Source: Zheng et al., "Distance-IoU Loss", AAAI 2020, equations 6 to 12. alpha gets no gradient,
    as in the authors' code.
    """
    wh_a, wh_b = a_xyxy[..., 2:] - a_xyxy[..., :2], b_xyxy[..., 2:] - b_xyxy[..., :2]
    inter = intersection(a_xyxy, b_xyxy)
    union = wh_a.prod(-1) + wh_b.prod(-1) - inter + EPS
    iou = inter / union

    enclosing = torch.maximum(a_xyxy[..., 2:], b_xyxy[..., 2:]) - torch.minimum(
        a_xyxy[..., :2], b_xyxy[..., :2]
    )
    diagonal = enclosing.square().sum(-1) + EPS
    twice_offset = (a_xyxy[..., :2] + a_xyxy[..., 2:]) - (b_xyxy[..., :2] + b_xyxy[..., 2:])
    distance = twice_offset.square().sum(-1) / 4

    angle_a = torch.atan(wh_a[..., 0] / (wh_a[..., 1] + EPS))
    angle_b = torch.atan(wh_b[..., 0] / (wh_b[..., 1] + EPS))
    v = (4 / math.pi**2) * (angle_b - angle_a).square()
    with torch.no_grad():
        alpha = v / (v - iou + (1 + EPS))
    return iou - distance / diagonal - alpha * v


def anchor_points(
    sizes: Sequence[Sequence[int]], strides: Sequence[int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cell centres of all levels, row by row, in pixels: (A, 2) x y, and the stride of each, (A,
    1).
    """
    points, stride_of = [], []
    for (height, width), stride in zip(sizes, strides, strict=True):
        y = (torch.arange(height, device=device, dtype=torch.float32) + 0.5) * stride
        x = (torch.arange(width, device=device, dtype=torch.float32) + 0.5) * stride
        grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")
        points.append(torch.stack([grid_x, grid_y], -1).reshape(-1, 2))
        stride_of.append(torch.full((height * width, 1), float(stride), device=device))
    return torch.cat(points), torch.cat(stride_of)


def dist_ltrb_to_xyxy(dist_ltrb: Tensor, points: Tensor, stride_of: Tensor) -> Tensor:
    """(..., A, 4) strides, (A, 2) pixels, (A, 1) -> (..., A, 4) pixels."""
    left_top, right_bottom = (dist_ltrb * stride_of).chunk(2, -1)
    return torch.cat([points - left_top, points + right_bottom], -1)


def xyxy_to_dist_ltrb(boxes_xyxy: Tensor, points: Tensor, stride_of: Tensor) -> Tensor:
    """(..., A, 4) pixels, (A, 2) pixels, (A, 1) -> (..., A, 4) strides; negative where the point is
    outside.
    """
    return torch.cat([points - boxes_xyxy[..., :2], boxes_xyxy[..., 2:] - points], -1) / stride_of


def centre_inside(points: Tensor, objects_xyxy: Tensor) -> Tensor:
    """(A, 2), (N, G, 4) -> (N, G, A) bool: the anchor point lies within the object's box."""
    left_top = points - objects_xyxy[..., None, :2]
    right_bottom = objects_xyxy[..., None, 2:] - points
    return torch.minimum(left_top, right_bottom).amin(-1) > EPS


MAX_CANDIDATES = 30_000  # of one image, before NMS: bounds its time on an untrained model


def select(
    boxes_xyxy: Tensor, scores: Tensor, score: float, iou: float, max_det: int
) -> Detections:
    """(A, 4), (A, K) -> the detections of one image."""
    anchor, label = (scores > score).nonzero(as_tuple=True)
    found = scores[anchor, label]
    if len(found) > MAX_CANDIDATES:
        found, best = found.topk(MAX_CANDIDATES)
        anchor, label = anchor[best], label[best]
    keep = batched_nms(boxes_xyxy[anchor], found, label, iou)[:max_det]
    return {"boxes_xyxy": boxes_xyxy[anchor[keep]], "scores": found[keep], "labels": label[keep]}
