"""Masked generative distillation (MGD): the teacher's map from part of the student's.

Source: Yang et al., "Masked Generative Distillation", ECCV 2022.
Legend: N images, C channels, H W cells, l a tap, n an image, h w a cell, S and T the
aligned maps of student and teacher, m the mask.

    m_nhw = 0 with probability `masked`, else 1; one draw for all channels of a cell
    gen   = Conv3x3, ReLU, Conv3x3, as wide as the teacher; trained with the student
    L     = sum_l mean over N, C, H, W of (gen_l(S_l * m) - T_l)^2

Simplified: a mean, where the paper sums over C, H, W, so that the weight does not
depend on their number. The mask comes from torch's global generator, whose state
checkpoints keep: runs stay reproducible. Under autocast the convolutions run in half
precision like all others; the difference is in float32. The generators serve training
alone: they are no part of the student.
"""

import torch
from torch import Tensor, nn

from kdmini.bounds import ShareBelowOne
from kdmini.contracts import Targets, View
from kdmini.distill.align import Shapes
from kdmini.terms.pairs import aligned


class MaskedGeneration(nn.Module):
    """The squared difference of generated and real maps, summed over the taps.

    masked: the share of cells to hide.
    """

    uses = frozenset({"feats"})

    def __init__(self, shapes: Shapes, masked: ShareBelowOne = 0.65):
        super().__init__()
        self.masked = masked
        widths = [teacher_channels for _, teacher_channels, _, _ in shapes.values()]
        self.generators = nn.ModuleList(generator(width) for width in widths)

    def forward(self, student: View, teacher: View, targets: Targets) -> Tensor:
        pairs = aligned(student, teacher).values()
        each = []
        for (s, t), generate in zip(pairs, self.generators, strict=True):
            kept = torch.rand_like(s[:, :1]) >= self.masked  # (N, 1, H, W)
            each.append((generate(s * kept) - t).square().mean())
        return torch.stack(each).sum()


def generator(channels: int) -> nn.Module:
    """(N, C, H, W) -> the same shape."""
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 3, padding=1),
    )
