"""The detection loss: BCE on classes, CIoU and distribution focal loss (DFL) on boxes.

Legend: N images, A anchor points, K classes, R bins of the distance distribution.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kdmini.contracts import Targets
from kdmini.detection.boxes import anchor_points, ciou, dist_ltrb_to_xyxy, xyxy_to_dist_ltrb
from kdmini.detection.yolo11.assign import assign


def detection_loss(
    preds: Sequence[Tensor], targets: Targets, strides: Sequence[int], reg_max: int
) -> dict[str, Tensor]:
    """Raw maps (N, 4R + K, H, W) per level -> {"box", "cls", "dfl"}, scalars in float32.

    Each is a sum over the anchors divided by the sum of all target scores (at least 1); boxes are
    weighted by their anchor's target score. A batch without objects gives box = dfl = 0.
    """
    points, stride_of = anchor_points([p.shape[2:] for p in preds], strides, preds[0].device)
    flat = torch.cat([p.flatten(2) for p in preds], 2).transpose(1, 2).float()  # (N, A, 4R + K)
    dist_logits, logits = flat.split([4 * reg_max, flat.shape[2] - 4 * reg_max], 2)
    boxes_xyxy = dist_ltrb_to_xyxy(
        expected_dist(dist_logits, reg_max), points, stride_of
    )  # (N, A, 4)

    assigned = assign(logits.detach().sigmoid(), boxes_xyxy.detach(), points, targets)
    weight = assigned.scores.sum(-1)  # (N, A), zero on background
    total = weight.sum().clamp(min=1)

    bce = F.binary_cross_entropy_with_logits(logits, assigned.scores, reduction="sum")
    box = ((1 - ciou(boxes_xyxy, assigned.boxes_xyxy)) * weight).sum()
    dist_ltrb = xyxy_to_dist_ltrb(assigned.boxes_xyxy, points, stride_of)
    dfl = (distribution_focal(dist_logits, dist_ltrb, reg_max) * weight).sum()
    return {"box": box / total, "cls": bce / total, "dfl": dfl / total}


def expected_dist(dist_logits: Tensor, reg_max: int) -> Tensor:
    """(N, A, 4R) -> (N, A, 4): the mean of each side's distribution, in strides."""
    bins = torch.arange(reg_max, device=dist_logits.device, dtype=dist_logits.dtype)
    # no matrix product: autocast would run it in half precision
    return (dist_logits.unflatten(-1, (4, reg_max)).softmax(-1) * bins).sum(-1)


def distribution_focal(dist_logits: Tensor, dist_ltrb: Tensor, reg_max: int) -> Tensor:
    """(N, A, 4R), (N, A, 4) in strides -> (N, A): cross-entropy with the two bins beside the true
    distance.

    Source: Li et al., "Generalized Focal Loss", NeurIPS 2020, equation 6.
    """
    dist_ltrb = dist_ltrb.clamp(0, reg_max - 1 - 0.01)  # so that the bin to the right exists
    left = dist_ltrb.long()  # (N, A, 4)
    share_right = dist_ltrb - left
    log_p = dist_logits.unflatten(-1, (4, reg_max)).log_softmax(-1)  # (N, A, 4, R)
    log_left = log_p.gather(-1, left.unsqueeze(-1)).squeeze(-1)
    log_right = log_p.gather(-1, left.unsqueeze(-1) + 1).squeeze(-1)
    return -(log_left * (1 - share_right) + log_right * share_right).mean(-1)
