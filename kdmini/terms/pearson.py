"""Pearson distillation (PKD): each of the student's channels correlates with the teacher's,
whatever their scale.

Source: Cao et al., "PKD: General Distillation Framework for Object Detectors via Pearson
Correlation Coefficient", NeurIPS 2022.
Legend: N images, C channels, H W cells, l a tap, S and T aligned student and teacher.

    F^ = (F - mean) / sqrt(variance + eps)      mean and variance of a channel over N, H, W
    L  = sum_l mean over N, C, H, W of (S^_l - T^_l)^2 / 2  =  sum_l mean_c (1 - r_lc)      r: the correlation

Simplified: nothing. The statistics are those of the micro-batch of one process.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdmini.contracts import Targets, View
from kdmini.terms.pairs import aligned

EPS = 1e-6  # beside the variance: bounds the gradient of a channel that is constant


class PearsonDistillation(nn.Module):
    uses = frozenset({"feats"})

    def forward(self, student: View, teacher: View, targets: Targets) -> Tensor:
        pairs = aligned(student, teacher).values()
        return torch.stack(
            [(standardise(s) - standardise(t)).square().mean() / 2 for s, t in pairs]
        ).sum()


def standardise(feat: Tensor) -> Tensor:
    """(N, C, H, W) -> the same, each channel with mean 0 and variance 1."""
    return F.batch_norm(feat, None, None, training=True, eps=EPS)
