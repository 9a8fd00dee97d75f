"""Loss and decoding of maps of class logits.

Legend: N images, S image size, K classes, h w cells of a map.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kdmini.contracts import Losses, Prediction, Targets

VOID = 255  # label of a pixel that teaches nothing
AUXILIARY = 0.4  # weight of a map that is there for training alone


def loss(preds: Sequence[Tensor], targets: Targets) -> Losses:
    """preds, (N, K, h, w) each, the main one first -> {"ce", "aux"}; "aux" where there are
    auxiliary maps.
    """
    labels = targets["mask"].flatten().long()  # (N S S)
    size = targets["mask"].shape[1:]
    losses = [cross_entropy(logits, labels, size) for logits in preds]
    if len(losses) == 1:
        return {"ce": losses[0]}
    return {"ce": losses[0], "aux": AUXILIARY * torch.stack(losses[1:]).sum()}


def cross_entropy(logits: Tensor, labels: Tensor, size: Sequence[int]) -> Tensor:
    """The sum over pixels that are not void, by the number of all."""
    whole = F.interpolate(logits.float(), size, mode="bilinear", align_corners=False)
    rows = whole.permute(0, 2, 3, 1).flatten(0, 2)  # (N S S, K)
    total = F.cross_entropy(rows, labels, ignore_index=VOID, reduction="sum")
    return total / labels.numel()


def decode(preds: Sequence[Tensor]) -> list[Prediction]:
    """-> {"logits": (K, h, w)} of each image."""
    return [{"logits": logits} for logits in preds[0].float()]
