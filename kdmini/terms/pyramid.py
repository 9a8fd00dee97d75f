"""A BiFPN on the maps of a network: coarse maps tell finer ones, and these the coarse ones.

Sources: Ji et al., "Refine Myself by Teaching Myself: Feature Refinement via
Self-Knowledge Distillation", CVPR 2021, section 3.1; the shares are those of Tan et al.,
"EfficientDet", CVPR 2020, section 3.3.
Legend: N images, C channels, H W cells; l a level of L, 1 the finest, each half as large as
the one before (rounded up); S the network's maps.

    X_l = ReLU(Lateral(S_l))
    Z_l = ReLU(Second(S_l))
    Y_l = ReLU(Fuse(X_l, up(Y_l+1)))                    Y_L = X_L
    T_l = ReLU(Fuse(Z_l, Y_l, down(T_l-1)))             T_1 = Y_1; T_L without Y_L

A further layer reads T in the place of S, and of X: it has no Lateral. Lateral and Second
are Conv1x1 + BatchNorm; so is what follows `up` and `down` where two levels differ in their
channels.
Simplified: `down` looks at the same cells on both sides, where the authors' borders depend
on whether a size is even; S is read as it is, where their own networks leave out the ReLU
before it.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-6  # of the authors, in the shares of what is fused


class Pyramid(nn.Module):
    """L maps (N, C_l, H_l, W_l) -> the same sizes, widths[l] channels, before the last ReLU.

    layers: how often the maps are told of each other.
    """

    layers: Any  # a Layer each

    def __init__(self, channels: Sequence[int], widths: Sequence[int], layers: int = 1):
        super().__init__()
        pairs = zip(channels, widths, strict=True)
        self.lateral = nn.ModuleList(conv_bn(c, width) for c, width in pairs)
        of_layers = [channels, *[widths] * (layers - 1)]
        self.layers = nn.ModuleList(Layer(inputs, widths) for inputs in of_layers)

    def forward(self, feats: Sequence[Tensor]) -> list[Tensor]:
        pairs = zip(self.lateral, feats, strict=True)
        lateral = [conv(feat).relu() for conv, feat in pairs]
        raw = self.layers[0](feats, lateral)
        for layer in self.layers[1:]:
            maps = [x.relu() for x in raw]
            raw = layer(maps, maps)
        return raw

    def norms(self) -> list[nn.BatchNorm2d]:
        """The last BatchNorm of each level, whose outputs are those of the pyramid."""
        return [fuse.conv[-1] for fuse in self.layers[-1].fuses()]


class Layer(nn.Module):
    """Down from the coarsest map to the finest, and up again.

    inputs: channels of the maps that it reads on the way up.
    """

    def __init__(self, inputs: Sequence[int], widths: Sequence[int]):
        super().__init__()
        finer = widths[:-1]
        coarser = widths[1:]
        steps = [*zip(finer, coarser, strict=True)]
        pairs = zip(inputs[1:], coarser, strict=True)
        self.second = nn.ModuleList(conv_bn(c, width) for c, width in pairs)
        self.after_up = nn.ModuleList(matching(below, above) for above, below in steps)
        self.after_down = nn.ModuleList(matching(above, below) for above, below in steps)
        self.downward = nn.ModuleList(Fuse(2, width) for width in finer)
        upward = [Fuse(3, width) for width in coarser[:-1]]
        self.upward = nn.ModuleList([*upward, Fuse(2, coarser[-1])])

    def fuses(self) -> list["Fuse"]:
        """Those that give the maps of the layer."""
        return [self.downward[0], *self.upward]

    def forward(self, maps: Sequence[Tensor], lateral: Sequence[Tensor]) -> list[Tensor]:
        """maps: what is read on the way up. lateral: what is read on the way down, of
        `widths` channels. -> the maps of the layer, before their ReLU.
        """
        x = lateral[-1]
        told: list[Tensor] = []  # on the way down, the coarsest left out
        for level in reversed(range(len(maps) - 1)):
            raised = self.after_up[level](up(x, lateral[level]))
            raw = self.downward[level](lateral[level], raised)
            x = raw.relu()
            told.insert(0, x)

        outputs = [raw]
        for level, fuse in enumerate(self.upward, start=1):
            parts = [self.second[level - 1](maps[level]).relu()]
            if level < len(told):
                parts.append(told[level])
            lowered = self.after_down[level - 1](down(outputs[-1].relu()))
            outputs.append(fuse(*parts, lowered))
        return outputs


class Fuse(nn.Module):
    """Maps of one shape (N, C, H, W), summed by learnt shares and convolved twice."""

    def __init__(self, inputs: int, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(inputs))
        self.conv = nn.Sequential(*separable(channels), nn.ReLU(), *separable(channels))

    def forward(self, *maps: Tensor) -> Tensor:
        positive = self.weight.relu()
        shares = positive / (positive.sum() + EPS)
        mixed = sum(share * x for share, x in zip(shares, maps, strict=True))
        return self.conv(mixed)


def conv_bn(c_in: int, c_out: int) -> nn.Sequential:
    """Conv1x1 and BatchNorm."""
    return nn.Sequential(nn.Conv2d(c_in, c_out, 1, bias=False), nn.BatchNorm2d(c_out))


def matching(c_in: int, c_out: int) -> nn.Module:
    return nn.Identity() if c_in == c_out else conv_bn(c_in, c_out)


def separable(channels: int) -> list[nn.Module]:
    """A depthwise convolution, one across channels, BatchNorm."""
    depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
    pointwise = nn.Conv2d(channels, channels, 1, bias=False)
    return [depthwise, pointwise, nn.BatchNorm2d(channels)]


def up(x: Tensor, like: Tensor) -> Tensor:
    """(N, C, H, W) -> the height and width of the finer map: the nearest cell."""
    # autocast would make float32 of the map, and of what is added to it
    with torch.autocast(x.device.type, enabled=False):
        return F.interpolate(x, like.shape[2:])


def down(x: Tensor) -> Tensor:
    """(N, C, H, W) -> half of both, rounded up: the largest of 3x3 around every second cell."""
    return F.max_pool2d(x, 3, stride=2, padding=1)
