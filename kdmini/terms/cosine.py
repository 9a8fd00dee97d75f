"""Cosine distance: the features of a cell point where the teacher's do, however long they are.

Source: Ranzinger et al., "AM-RADIO: Agglomerative Vision Foundation Model Reduce All
Domains Into One", CVPR 2024, which matches the cells of general vision models by it.
Legend: N images, C channels, H W cells, l a tap, n an image, h w a cell, S and T the
aligned maps of student and teacher.

    L = sum_l mean_nhw (1 - cos(S_lnhw, T_lnhw))

The cosine is that of two vectors of C channels.
Simplified: the paper adds a smooth L1 distance.
"""

import torch
from torch import Tensor, nn

from kdmini.contracts import Targets, View
from kdmini.terms.pairs import aligned

LEAST = 1e-6  # mean square of a cell: bounds the gradient of one that does not fire


class CosineDistance(nn.Module):
    """One minus the cosine, the mean over the cells, summed over the taps."""

    uses = frozenset({"feats"})

    def forward(self, student: View, teacher: View, targets: Targets) -> Tensor:
        pairs = aligned(student, teacher).values()
        each = [1 - (unit(s) * unit(t)).mean() for s, t in pairs]
        return torch.stack(each).sum()


def unit(feat: Tensor) -> Tensor:
    """(N, C, H, W) -> the same, each cell with the mean square 1 over its channels."""
    return feat / feat.square().mean(1, keepdim=True).clamp(min=LEAST).sqrt()
