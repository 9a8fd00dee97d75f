"""Pearson distillation (PKD): channels correlate with the teacher's, scale aside.

Source: Cao et al., "PKD: General Distillation Framework for Object Detectors via
Pearson Correlation Coefficient", NeurIPS 2022.
Legend: N images, C channels, H W cells, l a tap, S and T the aligned maps of student
and teacher, F either of them.

    F' = (F - mean) / sqrt(variance + eps)    both of a channel, over N, H, W
    L  = sum_l mean over N, C, H, W of (S'_l - T'_l)^2 / 2
       = sum_l mean_c (1 - r_lc)              r_lc the correlation of channel c at tap l

Simplified: nothing. The statistics are those of the images that one process sees at once;
with `reduction: sample` of each image, over H, W, and L is the mean over the images.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdmini.contracts import Targets, View
from kdmini.terms.pairs import Reduction, aligned

EPS = 1e-6  # beside the variance: bounds the gradient of a channel that is constant


class PearsonDistillation(nn.Module):
    """One minus the correlation, the mean over the channels, summed over the taps.

    reduction: `batch`, a correlation over the cells of all images of a batch; `sample`, one
        for each image, which accumulation does not change.
    """

    uses = frozenset({"feats"})

    def __init__(self, reduction: Reduction = "batch"):
        super().__init__()
        self.reduction = reduction
        self.standardise = standardise if reduction == "batch" else standardise_each

    def forward(self, student: View, teacher: View, targets: Targets) -> Tensor:
        pairs = aligned(student, teacher).values()
        each = [(self.standardise(s) - self.standardise(t)).square().mean() / 2 for s, t in pairs]
        return torch.stack(each).sum()


def standardise(feat: Tensor) -> Tensor:
    """(N, C, H, W) -> the same, each channel with mean 0 and variance 1."""
    return F.batch_norm(feat, None, None, training=True, eps=EPS)


def standardise_each(feat: Tensor) -> Tensor:
    """(N, C, H, W) -> the same, each channel of each image with mean 0 and variance 1."""
    return F.instance_norm(feat, eps=EPS)
