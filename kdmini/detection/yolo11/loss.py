"""The detection loss: BCE on classes, CIoU and distribution focal loss (DFL) on boxes.

Legend: N images, A anchor points, K classes, R bins of the distance distribution.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kdmini.detection.boxes import (
    anchor_points,
    ciou,
    counted,
    dist_ltrb_to_xyxy,
    flatten_levels,
    xyxy_to_dist_ltrb,
)
from kdmini.detection.truth import Targets
from kdmini.detection.yolo11.assign import assign


def detection_loss(
    preds: Sequence[Tensor],
    targets: Targets,
    strides: Sequence[int],
    reg_max: int,
) -> dict[str, Tensor]:
    """Raw maps (N, 4R + K, H, W) per level -> {"box", "cls", "dfl"}, float32 scalars.

    Each is a sum over the anchors divided by the sum of all target scores (at least 1);
    boxes are weighted by their anchor's target score. A batch without objects gives
    box = dfl = 0. Ignored regions take the background out of cls, and change no divisor.
    """
    sizes = [level.shape[2:] for level in preds]
    points, stride_of = anchor_points(sizes, strides, preds[0].device)
    outputs = flatten_levels(preds)  # (N, A, 4R + K)
    num_classes = outputs.shape[2] - 4 * reg_max
    dist_logits, logits = outputs.split([4 * reg_max, num_classes], 2)
    dist_ltrb = expected_dist(dist_logits, reg_max)  # (N, A, 4)
    boxes_xyxy = dist_ltrb_to_xyxy(dist_ltrb, points, stride_of)  # (N, A, 4)

    scores = logits.detach().sigmoid()
    assigned = assign(scores, boxes_xyxy.detach(), points, targets)
    weight = assigned.scores.sum(-1)  # (N, A), zero on background
    total = weight.sum().clamp(min=1)

    kept = counted(points, targets, weight > 0)
    cls = F.binary_cross_entropy_with_logits(logits, assigned.scores, kept, reduction="sum")
    distance = 1 - ciou(boxes_xyxy, assigned.boxes_xyxy)  # (N, A)
    box = (distance * weight).sum()
    true_dist = xyxy_to_dist_ltrb(assigned.boxes_xyxy, points, stride_of)
    focal = distribution_focal(dist_logits, true_dist, reg_max)  # (N, A)
    dfl = (focal * weight).sum()
    return {"box": box / total, "cls": cls / total, "dfl": dfl / total}


def expected_dist(dist_logits: Tensor, reg_max: int) -> Tensor:
    """(N, A, 4R) -> (N, A, 4): the mean of each side's distribution, in strides."""
    bins = torch.arange(reg_max, device=dist_logits.device, dtype=dist_logits.dtype)
    p = dist_logits.unflatten(-1, (4, reg_max)).softmax(-1)  # (N, A, 4, R)
    # no matrix product: autocast would run it in half precision
    return (p * bins).sum(-1)


def distribution_focal(dist_logits: Tensor, dist_ltrb: Tensor, reg_max: int) -> Tensor:
    """(N, A, 4R), true distances (N, A, 4) in strides -> (N, A), a mean over sides.

    Cross-entropy with the two bins beside the true distance.
    Source: Li et al., "Generalized Focal Loss", NeurIPS 2020, equation 6.
    """
    # so that the bin to the right exists
    dist_ltrb = dist_ltrb.clamp(0, reg_max - 1 - 0.01)
    left = dist_ltrb.long()  # (N, A, 4)
    share_right = dist_ltrb - left
    index = left.unsqueeze(-1)  # (N, A, 4, 1)
    log_p = dist_logits.unflatten(-1, (4, reg_max)).log_softmax(-1)  # (N, A, 4, R)
    log_left = log_p.gather(-1, index).squeeze(-1)
    log_right = log_p.gather(-1, index + 1).squeeze(-1)
    log_likelihood = log_left * (1 - share_right) + log_right * share_right
    return -log_likelihood.mean(-1)
