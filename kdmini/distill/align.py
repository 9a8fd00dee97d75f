"""Alignment: a 1x1 convolution brings each tap of the student to the teacher's number of
channels.

Legend: N images, Cs and Ct channels of student and teacher, H W cells.
"""

from collections.abc import Mapping
from typing import Literal

from torch import nn

from kdmini.bounds import Count
from kdmini.contracts import Feats

Shapes = Mapping[str, tuple[Count, Count, Count, Count]]  # tap -> (Cs, Ct, H, W)
Mode = Literal["all", "unequal", "none", "frozen"]


class Align(nn.Module):
    """Conv1x1 + BatchNorm(affine=False) at each tap: {tap: (N, Cs, H, W)} -> {tap: (N, Ct, H,
    W)}.

    mode: `all` taps, `unequal` only where the channels differ, `none`, or `frozen`: all, as
    initialised. The convolution has no bias: the BatchNorm after it would take it out again.
    """

    def __init__(self, shapes: Shapes, mode: Mode = "all"):
        super().__init__()
        self.taps = list(shapes)
        layers = [align_layer(cs, ct, mode) for cs, ct, _, _ in shapes.values()]
        # a list, for a ModuleDict does not take names with dots
        self.layers = nn.ModuleList(layers)
        self.requires_grad_(mode != "frozen")

    def forward(self, feats: Feats) -> Feats:
        """-> the student's maps, with the teacher's channels."""
        self.mend_statistics()
        return {tap: layer(feats[tap]) for tap, layer in zip(self.taps, self.layers, strict=True)}

    def mend_statistics(self) -> None:
        """Running statistics that a step has left not finite begin anew: else they would
        spoil every evaluation.
        """
        for name, value in self.named_buffers():
            start = 1.0 if name.endswith("running_var") else 0.0
            value.nan_to_num_(start, start, start)


def align_layer(cs: int, ct: int, mode: Mode) -> nn.Module:
    if mode == "none" or (mode == "unequal" and cs == ct):
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(cs, ct, 1, bias=False), nn.BatchNorm2d(ct, affine=False))
