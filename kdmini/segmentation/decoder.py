"""SegFormer's head of MLPs, which every pyramid of four maps can have.

Source: Xie et al., "SegFormer: Simple and Efficient Design for Semantic Segmentation with
Transformers", NeurIPS 2021.

Legend: N images, H W cells, C channels of a stage, W width.

    as written    ReLU(BatchNorm(fuse(concat_i(enlarge(linear_i(x_i))))))
    as computed   ReLU(BatchNorm(sum_i(enlarge((fuse_i linear_i) x_i))))

fuse_i are the columns of the 1x1 convolution that meet stage i. Enlarging is the same for
all channels, so it may come after them; and two linear maps in a row are one, on the small
map of few channels. The sum is the same, for a fraction of the work.
"""

from collections import OrderedDict
from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Decoder(nn.Module):
    """Maps of the stages, each half as large as the one before -> one of them all,
    (N, W, H, W) at the size of the first.
    """

    linear: Any  # an nn.Linear for each stage
    fuse: Any

    def __init__(self, dims: Sequence[int], width: int):
        super().__init__()
        self.linear = nn.ModuleList(nn.Linear(dim, width) for dim in dims)
        for linear in self.linear:
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        self.fuse = nn.Sequential(
            OrderedDict(
                conv=nn.Conv2d(len(dims) * width, width, 1, bias=False),
                norm=nn.BatchNorm2d(width),
                act=nn.ReLU(),
            )
        )

    def forward(self, feats: Sequence[Tensor]) -> Tensor:
        size = feats[0].shape[2:]
        conv = self.fuse.conv
        parts = conv.weight.flatten(1).chunk(len(feats), dim=1)[::-1]  # they are deepest first
        maps = []
        for linear, part, feat in zip(self.linear, parts, feats, strict=True):
            weight = part @ linear.weight  # (W, C)
            bias = part @ linear.bias
            x = F.conv2d(feat, weight[:, :, None, None], bias)
            maps.append(F.interpolate(x, size, mode="bilinear", align_corners=False))
        if conv.bias is not None:  # of a BatchNorm that was merged into it
            maps.append(conv.bias[:, None, None])
        return self.fuse.act(self.fuse.norm(reduce(torch.add, maps)))
