"""Pixel relations: which cells of an image are alike, row by row of all their similarities.

Source: Yang et al., "Cross-Image Relational Knowledge Distillation for Semantic
Segmentation" (CIRKD), CVPR 2022, its relation between pixels.
Legend: N images, C channels, H W cells, l a tap, n an image, i j two of the cells, S and T
the maps of student and teacher, F either of them, tau the temperature.

    r_nij(F) = cos(F_ni, F_nj)
    p_ni(F)  = softmax over j of r_nij(F) / tau
    L        = sum_l mean over n, i of tau^2 * KL(p_ni(T) || p_ni(S))

Simplified: within each image. CIRKD also relates the pixels of all images of a batch, which
would weigh otherwise when a batch is split, and those to a memory of many batches. The
factor tau^2 is that of the other terms here. No channels are compared, so `align` may be
`none`.
Holds (H W)^2 numbers an image: for maps of a few thousand cells, or with `pool`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdmini.bounds import Count, Temperature
from kdmini.contracts import Targets, View
from kdmini.terms.pairs import require_maps, softmax_kl, wide

EPS = 1e-6  # beside the mean square: bounds the gradient of a cell that does not fire


class PixelRelation(nn.Module):
    """The divergence of the similarities of each cell, summed over the taps.

    temperature: tau; the smaller, the more the cells count that are most alike.
    pool: side of the blocks of cells of which the mean is taken first.
    """

    uses = frozenset({"feats"})

    def __init__(self, temperature: Temperature = 0.1, pool: Count = 1):
        super().__init__()
        self.temperature = temperature
        self.pool = pool

    def forward(self, student: View, teacher: View, targets: Targets) -> Tensor:
        require_maps(teacher)
        each = []
        with torch.autocast(student.images.device.type, enabled=False):
            for tap, feat in teacher.feats.items():
                s = self.relations(wide(student.feats[tap]))
                t = self.relations(wide(feat).detach())
                divergence = softmax_kl(s, t, 2, self.temperature)  # (N, cells)
                each.append(divergence.mean())
        return torch.stack(each).sum()

    def relations(self, feat: Tensor) -> Tensor:
        """(N, C, H, W) -> r, (N, cells, cells)."""
        pooled = F.avg_pool2d(feat, self.pool, ceil_mode=True) if self.pool > 1 else feat
        cells = pooled.flatten(2)
        unit = cells / (cells.square().mean(1, keepdim=True) + EPS).sqrt()
        return unit.mT @ unit / unit.shape[1]
