"""Centred attention: where a network looks in this image more than it does in others.

Source: none; attention transfer (distill/attention.py), less what all images share. The maps of a
detector are nearly flat, and much the same for every photograph, so their plain distance pulls
at that: kdmini logs it as `distance/rolled` beside `distance/raw`.
Legend: N images of a batch (n, m two of them), H W cells, l a tap, S and T the maps of student
and teacher, F either of them, att(F) the attention map of unit norm.

    e_n(F) = att(F_n) - mean_m att(F_m)
    u_n(F) = e_n(F) / (||e_n(F)|| + EPS)
    L      = sum_l mean_n ||u_n(S_l) - u_n(T_l)||

The mean is over the images that one process sees at once. It needs two at least: the only image
of a batch differs from the mean in nothing, and L is 0.
"""

from typing import Annotated

import torch
from torch import Tensor, nn

from kdmini.bounds import Range
from kdmini.contracts import Targets, View
from kdmini.distill.attention import attention_map
from kdmini.terms.pairs import require_maps

# beside the norm of what is left of a map of norm 1: less than that has no direction
EPS = 1e-3


class CentredAttention(nn.Module):
    """The distance of the attention maps less their mean over the batch, summed over the taps.

    p: power of the activations in the attention map.
    """

    uses = frozenset({"feats"})
    reduction = "batch"  # there is no other

    def __init__(self, p: Annotated[float, Range(1, 8)] = 2.0):
        super().__init__()
        self.p = p

    def forward(self, student: View, teacher: View, targets: Targets) -> Tensor:
        require_maps(teacher)
        each = []
        for tap, feat in teacher.feats.items():
            goal = centred(attention_map(feat.detach(), self.p))
            difference = centred(attention_map(student.feats[tap], self.p)) - goal  # (N, H, W)
            each.append(torch.linalg.vector_norm(difference, dim=(1, 2)).mean())
        return torch.stack(each).sum()


def centred(maps: Tensor) -> Tensor:
    """(N, H, W) -> the same less its mean over N, of norm 1 where that is not next to nothing."""
    rest = maps - maps.mean(0)
    return rest / (torch.linalg.vector_norm(rest, dim=(1, 2), keepdim=True) + EPS)
