"""Spatial imitation: the student's features follow the teacher's, cell by cell.

Source: Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015, equation 3; the
`spa` of the research notes.
Legend: N images, C channels, H W cells, l a tap, S and T the aligned maps of student
and teacher.

    L = sum_l mean over N, C, H, W of (S_l - T_l)^2

Simplified: all taps at once, from the first epoch, where FitNets trains up to one hint
before the task begins. The BatchNorm of `align` gives S unit variance, T keeps its own:
L then has a floor above zero (see `pearson`).
"""

import torch
from torch import Tensor, nn

from kdmini.contracts import Targets, View
from kdmini.terms.pairs import aligned


class SpatialImitation(nn.Module):
    """The mean squared difference of the maps, summed over the taps."""

    uses = frozenset({"feats"})

    def forward(self, student: View, teacher: View, targets: Targets) -> Tensor:
        pairs = aligned(student, teacher).values()
        each = [(s - t).square().mean() for s, t in pairs]
        return torch.stack(each).sum()
