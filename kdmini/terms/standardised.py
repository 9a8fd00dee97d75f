"""Standardised attention: where a network's channels are far from what they are elsewhere.

Source: none; attention transfer (distill/attention.py) of features whose channels have been
brought to one scale, as Pearson distillation (pearson.py) brings them. The plain map of a
detector is nearly flat: channels that are large everywhere outweigh those that answer to
something.
Legend: N images of a batch (n one of them), C channels (c one of them), H W cells, l a tap, S and
T the maps of student and teacher, F either of them, att(F) the attention map of unit norm.

    F' = (F - mean_c) / sqrt(variance_c + eps)    both of a channel, over N, H, W
    L  = sum_l mean_n ||att(S'_l) - att(T'_l)||,  att(F') of sum_c |F'_c|^p

The statistics are those of the images that one process sees at once.
"""

from typing import Annotated

import torch
from torch import Tensor, nn

from kdmini.bounds import Range
from kdmini.contracts import Targets, View
from kdmini.distill.attention import map_distance
from kdmini.terms.pairs import require_maps, wide
from kdmini.terms.pearson import standardise


class StandardisedAttention(nn.Module):
    """The distance of the attention maps of standardised features, summed over the taps.

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
            goal = standardise(wide(feat.detach()))
            own = standardise(wide(student.feats[tap]))
            each.append(map_distance(own, goal, self.p).mean())
        return torch.stack(each).sum()
