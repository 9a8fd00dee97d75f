"""What a student imitates of the maps of its self-teacher, three ways.

Each takes the student's maps S_l as they are, and the self-teacher's before their ReLU, R_l
(T_l = ReLU(R_l)), with the BatchNorms that R_l comes from. No gradient reaches the
self-teacher. A sum over the L levels:

    attention   mean (att(S_l) - att(T_l))^2
    fitnet      mean (ReLU(C_l(S_l)) - T_l)^2
    overhaul    sum (C_l(S_l) - G_l)^2 [C_l(S_l) > G_l or G_l > 0] / N / 2^(L - l)
    G_l = max(R_l, m_l)

C_l is a learnt Conv1x1 + BatchNorm, to the self-teacher's channels. m_l, of a channel, is
what its values below 0 are on average: of a normal variable with the mean b and deviation g
that its BatchNorm gives it, b - g * phi(b / g) / Phi(-b / g).

Sources: Zagoruyko & Komodakis, "Paying More Attention to Attention", ICLR 2017, with att(F)
of kdmini/distill/attention.py; Romero et al., "FitNets", ICLR 2015; Heo et al., "A
Comprehensive Overhaul of Feature Distillation", ICCV 2019, section 3. In the form of Ji et
al., "Refine Myself by Teaching Myself", CVPR 2021; but m_l follows the BatchNorm as it
learns, where their code keeps what it is before training, -0.798 everywhere.
Legend: N images, C channels, H W cells; means over N, H, W, and C where it is left.
"""

import math
from collections.abc import Sequence
from itertools import count

import torch
from torch import Tensor, nn

from kdmini.distill.attention import AttentionTransfer
from kdmini.terms.pairs import wide
from kdmini.terms.pyramid import conv_bn


class Attention(nn.Module):
    """The attention maps, which need no common channels."""

    def __init__(self, channels: Sequence[int], widths: Sequence[int]):
        super().__init__()
        self.transfer = AttentionTransfer("mean_square")

    def forward(
        self, feats: Sequence[Tensor], raw: Sequence[Tensor], norms: Sequence[nn.BatchNorm2d]
    ) -> Tensor:
        pairs = zip(feats, raw, strict=True)
        return torch.stack([self.transfer.distance(s, t.detach().relu()) for s, t in pairs]).sum()


class FitNet(nn.Module):
    """The maps themselves."""

    def __init__(self, channels: Sequence[int], widths: Sequence[int]):
        super().__init__()
        self.regress = regressors(channels, widths)

    def forward(
        self, feats: Sequence[Tensor], raw: Sequence[Tensor], norms: Sequence[nn.BatchNorm2d]
    ) -> Tensor:
        distances = []
        for regress, s, t in zip(self.regress, feats, raw, strict=True):
            difference = wide(regress(s)).relu() - wide(t).detach().relu()
            distances.append(difference.square().mean())
        return torch.stack(distances).sum()


class Overhaul(nn.Module):
    """What the maps are before their ReLU, as far as it matters after it."""

    def __init__(self, channels: Sequence[int], widths: Sequence[int]):
        super().__init__()
        self.regress = regressors(channels, widths)

    def forward(
        self, feats: Sequence[Tensor], raw: Sequence[Tensor], norms: Sequence[nn.BatchNorm2d]
    ) -> Tensor:
        distances = []
        levels = zip(count(1), self.regress, feats, raw, norms, strict=False)
        for level, regress, s, t, norm in levels:
            ours = wide(regress(s))
            goal = torch.maximum(wide(t).detach(), margin(norm).to(ours).view(-1, 1, 1))
            counts = (ours > goal) | (goal > 0)
            square = (ours - goal).square() * counts
            distances.append(square.sum() / len(s) / 2 ** (len(feats) - level))
        return torch.stack(distances).sum()


IMITATIONS = {"attention": Attention, "fitnet": FitNet, "overhaul": Overhaul}


def regressors(channels: Sequence[int], widths: Sequence[int]) -> nn.ModuleList:
    return nn.ModuleList(conv_bn(c, width) for c, width in zip(channels, widths, strict=True))


def margin(norm: nn.BatchNorm2d) -> Tensor:
    """(C,): the mean of what is below 0 in each channel of a BatchNorm's normal outputs.

    phi(a) / Phi(-a) is sqrt(2 / pi) / erfcx(a / sqrt(2)), which is exact also where next to
    nothing is below 0.
    """
    deviation = norm.weight.detach().abs().clamp(min=torch.finfo(norm.weight.dtype).tiny)
    mean = norm.bias.detach()
    ratio = mean / deviation
    return mean - deviation * math.sqrt(2 / math.pi) / torch.special.erfcx(ratio / math.sqrt(2))
