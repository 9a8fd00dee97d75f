"""Spatial imitation: the student's aligned features follow the teacher's, cell by cell.

Source: Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015, equation 3; the `spa` of the
research notes.
Legend: N images, C channels, H W cells, l a tap, S and T aligned student and teacher.

    L = sum_l mean over N, C, H, W of (S_l - T_l)^2

Simplified: all taps at once, from the first epoch, where FitNets trains up to one hint before the
task begins. The BatchNorm of `align` gives S unit variance, T keeps its own: L then has a floor
above zero (see `pearson`)."""

import torch
from torch import Tensor, nn

from kdmini.contracts import Targets, UserError, View


class SpatialImitation(nn.Module):
    uses = frozenset({"feats"})

    def forward(self, student: View, teacher: View, targets: Targets) -> Tensor:
        return torch.stack(
            [(s - t).square().mean() for s, t in aligned(student, teacher).values()]
        ).sum()


def aligned(student: View, teacher: View) -> dict[str, tuple[Tensor, Tensor]]:
    """tap -> both maps (N, C, H, W), in float32 at least, the teacher's without gradient.

    Raises UserError where there are none, or where their channels differ.
    """
    if not teacher.feats:
        raise UserError("distill.taps: a term that compares feature maps has none; name some")
    pairs = {
        tap: (wide(student.feats[tap]), wide(feat).detach()) for tap, feat in teacher.feats.items()
    }
    for tap, (s, t) in pairs.items():
        if s.shape != t.shape:
            raise UserError(
                f"distill.align: {tap} has {s.shape[1]} channels, the teacher {t.shape[1]}; use `all`"
            )
    return pairs


def wide(x: Tensor) -> Tensor:
    """Half precision to float32: squares overflow float16 at 256."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
