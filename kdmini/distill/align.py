"""Alignment: a 1x1 convolution brings each tap of the student to the teacher's number of
channels.

Legend: N images, Cs and Ct channels of student and teacher, H W cells.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from kdmini.bounds import Count
from kdmini.contracts import Feats, UserError

Shapes = Mapping[str, tuple[Count, Count, Count, Count]]  # tap -> (Cs, Ct, H, W)
Mode = Literal["all", "unequal", "none", "frozen"]


def same_size(ours: Feats, theirs: Feats) -> tuple[Feats, Feats]:
    """Of each pair of maps the larger is brought to the size of the smaller, by the mean over
    blocks of cells.

    Pair by pair, at whatever size the images have. Raises UserError where one size is no
    multiple of the other, or where a map has no counterpart.
    """
    if ours.keys() != theirs.keys():
        raise UserError(
            f"distill: the student has {len(ours)} maps ({', '.join(ours)}), the teacher "
            f"{len(theirs)} ({', '.join(theirs)}); name a teacher of the same kind, or "
            "take terms that read feats alone"
        )
    of_ours: dict[str, Tensor] = {}
    of_theirs: dict[str, Tensor] = {}
    for tap in ours:
        size = smaller(ours[tap].shape[2:], theirs[tap].shape[2:], tap)
        of_ours[tap] = reduced(ours[tap], size)
        of_theirs[tap] = reduced(theirs[tap], size)
    return of_ours, of_theirs


def smaller(one: Sequence[int], other: Sequence[int], name: str) -> Sequence[int]:
    """The smaller of two sizes H, W. Raises UserError where the larger is no multiple of it."""
    low, high = sorted((tuple(one), tuple(other)))
    if any(large % small for small, large in zip(low, high, strict=True)):
        sizes = [f"{height}x{width}" for height, width in (one, other)]
        raise UserError(
            f"distill.taps: {name} is {sizes[0]} in the student, {sizes[1]} in the teacher; pair "
            "taps of which one is a multiple of the other"
        )
    return low


def reduced(feat: Tensor, size: Sequence[int]) -> Tensor:
    """(N, C, H, W) -> (N, C, *size), the mean over blocks of cells."""
    factors = [length // small for length, small in zip(feat.shape[2:], size, strict=True)]
    return feat if factors == [1, 1] else F.avg_pool2d(feat, factors)


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
