"""Masked generative distillation (MGD): the student's features, cells of them hidden, have to yield
the teacher's.

Source: Yang et al., "Masked Generative Distillation", ECCV 2022.
Legend: N images, C channels, H W cells, l a tap, S and T aligned student and teacher.

    M_nhw = 0 with probability `masked`, else 1; one draw for all channels of a cell
    G     = Conv3x3, ReLU, Conv3x3, of the teacher's width; trained with the student, used in training alone
    L     = sum_l mean over N, C, H, W of (G_l(S_l * M) - T_l)^2

Simplified: a mean, where the paper sums over C, H, W, so that the weight does not depend on their
number. The mask comes from torch's global generator, whose state checkpoints keep: runs stay
reproducible. Under autocast the convolutions run in half precision like all others; the difference
is in float32."""

import torch
from torch import Tensor, nn

from kdmini.contracts import Targets, UserError, View
from kdmini.distill.align import Shapes
from kdmini.terms.pairs import aligned


class MaskedGeneration(nn.Module):
    uses = frozenset({"feats"})

    def __init__(self, shapes: Shapes, masked: float = 0.65):
        super().__init__()
        if not 0 <= masked < 1:
            raise UserError(
                f"distill: masked is {masked}, the share of cells to hide; use 0 to below 1"
            )
        self.masked = masked
        self.generators = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(ct, ct, 3, padding=1), nn.ReLU(), nn.Conv2d(ct, ct, 3, padding=1)
            )
            for _, ct, _, _ in shapes.values()
        )

    def forward(self, student: View, teacher: View, targets: Targets) -> Tensor:
        pairs = aligned(student, teacher).values()
        each = [
            self.distance(*pair, generate)
            for pair, generate in zip(pairs, self.generators, strict=True)
        ]
        return torch.stack(each).sum()

    def distance(self, student: Tensor, teacher: Tensor, generate: nn.Module) -> Tensor:
        """(N, C, H, W) twice -> scalar."""
        shown = torch.rand_like(student[:, :1]) >= self.masked  # (N, 1, H, W)
        return (generate(student * shown) - teacher).square().mean()
