"""Box formats, overlaps and anchor points.

Boxes are `xyxy` corners in pixels, continuous: a box that covers the first pixel is 0,
0, 1, 1. `dist_ltrb` are the distances from a point to the four sides, in units of that
point's stride.

Legend: N images, C channels, H W cells, A anchor points, G objects, K classes.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import batched_nms, nms

from kdmini.detection.truth import Detections, Targets

EPS = 1e-7  # keeps divisions finite
INSIDE = 1e-9  # pixels by which a point has to lie inside a box
MAX_CANDIDATES = 30_000  # of one image, before NMS: bounds its time on an untrained model

# of an object and an anchor that are compared at once, for each image of the batch: an
# assignment takes some 50 bytes for a pair, so 50 MB an image, where a step keeps five times as
# much of it at 640 px
MOST_PAIRS = 1 << 20


def left_top(boxes_xyxy: Tensor) -> Tensor:
    """(..., 4) -> (..., 2)."""
    return boxes_xyxy[..., :2]


def right_bottom(boxes_xyxy: Tensor) -> Tensor:
    """(..., 4) -> (..., 2)."""
    return boxes_xyxy[..., 2:]


def width_height(boxes_xyxy: Tensor) -> Tensor:
    """(..., 4) -> (..., 2), negative where a box is inside out."""
    return right_bottom(boxes_xyxy) - left_top(boxes_xyxy)


def box_area(boxes_xyxy: Tensor) -> Tensor:
    """(..., 4) -> (...), zero where a side is negative."""
    return area(width_height(boxes_xyxy).clamp(min=0))


def intersection(a_xyxy: Tensor, b_xyxy: Tensor) -> Tensor:
    """The area in common of boxes that broadcast, (..., 4), (..., 4) -> (...)."""
    end = torch.minimum(right_bottom(a_xyxy), right_bottom(b_xyxy))
    start = torch.maximum(left_top(a_xyxy), left_top(b_xyxy))
    return area((end - start).clamp(min=0))


def area(sides: Tensor) -> Tensor:
    """Width and height (..., 2) -> (...). Not by `prod`, whose gradient waits for the device."""
    return sides[..., 0] * sides[..., 1]


def enclosing_sides(a_xyxy: Tensor, b_xyxy: Tensor) -> Tensor:
    """Of the smallest box round both, (..., 4), (..., 4) -> width, height (..., 2)."""
    end = torch.maximum(right_bottom(a_xyxy), right_bottom(b_xyxy))
    start = torch.minimum(left_top(a_xyxy), left_top(b_xyxy))
    return end - start


def ciou(a_xyxy: Tensor, b_xyxy: Tensor) -> Tensor:
    """Complete IoU of boxes that broadcast, (..., 4), (..., 4) -> (...), in -1.5..1.

    IoU - (centre distance / enclosing diagonal)^2 - alpha * v, where v compares the
    aspect ratios.
    Source: Zheng et al., "Distance-IoU Loss", AAAI 2020, equations 6 to 12. alpha gets
    no gradient, as in the authors' code.
    """
    sides_a = width_height(a_xyxy)
    sides_b = width_height(b_xyxy)
    inter = intersection(a_xyxy, b_xyxy)
    union = area(sides_a) + area(sides_b) - inter + EPS
    iou = inter / union

    diagonal = enclosing_sides(a_xyxy, b_xyxy).square().sum(-1) + EPS
    twice_centre_a = left_top(a_xyxy) + right_bottom(a_xyxy)
    twice_centre_b = left_top(b_xyxy) + right_bottom(b_xyxy)
    twice_offset = twice_centre_a - twice_centre_b
    distance = twice_offset.square().sum(-1) / 4

    angle_a = angle(sides_a)
    angle_b = angle(sides_b)
    v = (4 / math.pi**2) * (angle_b - angle_a).square()
    with torch.no_grad():
        alpha = v / (v - iou + (1 + EPS))
    return iou - distance / diagonal - alpha * v


def angle(sides: Tensor) -> Tensor:
    """Width and height (..., 2) -> (...): between the diagonal and upright."""
    width = sides[..., 0]
    height = sides[..., 1]
    return torch.atan(width / (height + EPS))


def giou(a_xyxy: Tensor, b_xyxy: Tensor) -> Tensor:
    """Generalised IoU of boxes that broadcast, (..., 4), (..., 4) -> (...), in -1..1.

    Source: Rezatofighi et al., "Generalized Intersection over Union", CVPR 2019,
    algorithm 1. Torchvision's picks boxes by a mask, and so waits for the device.
    """
    inter = intersection(a_xyxy, b_xyxy)
    union = box_area(a_xyxy) + box_area(b_xyxy) - inter
    enclosing = area(enclosing_sides(a_xyxy, b_xyxy))
    iou = inter / (union + EPS)
    empty = (enclosing - union) / (enclosing + EPS)
    return iou - empty


def anchor_points(
    sizes: Sequence[Sequence[int]],
    strides: Sequence[int],
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Cell centres of all levels, row by row -> x y (A, 2) in pixels, stride (A, 1).

    sizes: H, W of each level.
    """
    points = []
    stride_of = []
    for (height, width), stride in zip(sizes, strides, strict=True):
        row = torch.arange(height, device=device, dtype=torch.float32)
        column = torch.arange(width, device=device, dtype=torch.float32)
        y = (row + 0.5) * stride
        x = (column + 0.5) * stride
        grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")
        points.append(torch.stack([grid_x, grid_y], -1).reshape(-1, 2))
        stride_of.append(torch.full((height * width, 1), float(stride), device=device))
    return torch.cat(points), torch.cat(stride_of)


def flatten_levels(maps: Sequence[Tensor]) -> Tensor:
    """(N, C, H, W) of each level -> (N, A, C) float32, ordered as anchor_points."""
    levels = [level.flatten(2) for level in maps]
    return torch.cat(levels, 2).transpose(1, 2).float()


def dist_ltrb_to_xyxy(dist_ltrb: Tensor, points: Tensor, stride_of: Tensor) -> Tensor:
    """(..., A, 4) strides, (A, 2) pixels, (A, 1) -> (..., A, 4) pixels."""
    pixels_ltrb = dist_ltrb * stride_of
    to_left_top, to_right_bottom = pixels_ltrb.chunk(2, -1)
    return torch.cat([points - to_left_top, points + to_right_bottom], -1)


def xyxy_to_dist_ltrb(boxes_xyxy: Tensor, points: Tensor, stride_of: Tensor) -> Tensor:
    """(..., A, 4) pixels, (A, 2) pixels, (A, 1) -> (..., A, 4) strides.

    Negative where the point is outside.
    """
    to_left_top = points - left_top(boxes_xyxy)
    to_right_bottom = right_bottom(boxes_xyxy) - points
    return torch.cat([to_left_top, to_right_bottom], -1) / stride_of


def centre_inside(points: Tensor, objects_xyxy: Tensor) -> Tensor:
    """(A, 2), (N, G, 4) -> (N, G, A) bool: the point lies in the object's box."""
    objects_xyxy = objects_xyxy.unsqueeze(-2)  # (N, G, 1, 4)
    to_left_top = points - left_top(objects_xyxy)
    to_right_bottom = right_bottom(objects_xyxy) - points
    nearest_side = torch.minimum(to_left_top, to_right_bottom).amin(-1)
    return nearest_side > INSIDE


def counted(points: Tensor, targets: Targets, positive: Tensor) -> Tensor | None:
    """Whether an anchor's classes count, (N, A, 1): 0 for a point (A, 2) in an ignored region
    that answers for no object, 1 for others. None without such regions.

    positive: (N, A) bool, those that do answer for one.
    """
    regions = targets.get("ignored_xyxy")  # (N, R, 4)
    if regions is None:
        return None
    images, most, _ = regions.shape
    count = images_at_once(images, most, len(points))
    parts = [centre_inside(points, some).any(1) for some in regions.split(count)]
    ignored = torch.cat(parts) & ~positive  # (N, A)
    return (~ignored).float().unsqueeze(2)


def images_at_once(images: int, objects: int, anchors: int) -> int:
    """How many of the images, of G objects (padded) and A anchors each, are assigned together, 1
    at least.

    The shapes alone decide, so that nothing waits for the device.
    """
    pairs = max(objects * anchors, 1)
    return max(images * MOST_PAIRS // pairs, 1)


def select(
    boxes_xyxy: Tensor,
    scores: Tensor,
    score: float,
    iou: float,
    max_det: int,
) -> Detections:
    """(A, 4), (A, K) -> the detections of one image, best first.

    Class by class, of boxes that overlap by more than `iou` the best one stays; at most
    `max_det` are left, each with more than `score`.
    """
    anchor, label = (scores > score).nonzero(as_tuple=True)
    candidate_scores = scores[anchor, label]
    if len(candidate_scores) > MAX_CANDIDATES:
        candidate_scores, best = candidate_scores.topk(MAX_CANDIDATES)
        anchor = anchor[best]
        label = label[best]

    candidate_boxes = boxes_xyxy[anchor]
    kept = nms_by_class(candidate_boxes, candidate_scores, label, iou)[:max_det]
    return {
        "boxes_xyxy": candidate_boxes[kept],
        "scores": candidate_scores[kept],
        "labels": label[kept],
    }


def nms_by_class(boxes_xyxy: Tensor, scores: Tensor, labels: Tensor, iou: float) -> Tensor:
    """(D, 4), (D,), (D,) -> (<= D,) index of those that stay, best first."""
    if boxes_xyxy.is_cpu or not len(boxes_xyxy):
        return batched_nms(boxes_xyxy, scores, labels, iou)
    return nms(apart_by_class(boxes_xyxy, labels), scores, iou)


def apart_by_class(boxes_xyxy: Tensor, labels: Tensor) -> Tensor:
    """Each class moved away from all others, (D, 4), (D,) -> (D, 4).

    As torchvision's batched_nms does it, which waits for the device on the way, and once a
    class where boxes are many.
    """
    beside = labels.to(boxes_xyxy.dtype) * (boxes_xyxy.max() + 1)
    return boxes_xyxy + beside[:, None]
