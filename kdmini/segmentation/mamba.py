"""VMamba with SegFormer's head: a state-space model in plain PyTorch that labels pixels.

Sources: Liu et al., "VMamba: Visual State Space Model", NeurIPS 2024, the released form
with a state of one number a channel; the head is that of Xie et al., "SegFormer", NeurIPS
2021.
Simplified: no stochastic depth.

Legend: N images, H W cells, C channels of a stage, D of a scan, R channels that dt is
made of, K classes, P = H W positions.
"""

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.convnext import LayerNorm2d  # over the channels of each cell

from kdmini.bounds import Range
from kdmini.contracts import Losses, Prediction, Targets
from kdmini.segmentation import maps
from kdmini.segmentation.scan import cross_merge, cross_scan, scan, state_affinity
from kdmini.weightfile import fill, trained_tensors

# of red, green and blue, of ImageNet
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

DT_RANGE = (0.001, 0.1)  # of dt before training, drawn log-uniform

Scale = Literal["pico", "t_s1l8", "t_s2l5", "s_s1l20", "s_s2l15", "b_s2l15"]


class Size(NamedTuple):
    """depths: blocks of each stage. channels: of the first stage. expansion: D / C."""

    depths: tuple[int, int, int, int]
    channels: int
    expansion: int


# the published ones, and one that is ours
SIZES: dict[Scale, Size] = {
    "pico": Size((2, 2, 2, 2), 32, 1),
    "t_s1l8": Size((2, 2, 8, 2), 96, 1),
    "t_s2l5": Size((2, 2, 5, 2), 96, 2),
    "s_s1l20": Size((2, 2, 20, 2), 96, 1),
    "s_s2l15": Size((2, 2, 15, 2), 96, 2),
    "b_s2l15": Size((2, 2, 15, 2), 128, 2),
}


class VMamba(nn.Module):
    """The network; its taps are encoder.stages.0 to encoder.stages.3, at strides 4 to 32, and
    encoder.stages.3.B.mixer.graph, what the positions hand to each other in its block B.

    `preds`: [class logits (N, K, H / 4, W / 4)].
    scale: pico, or one that the authors published.
    width: channels of the head.
    weights: a best.pt of this network.
    """

    stride = 32
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        names: list[str],
        scale: Scale = "pico",
        width: Annotated[int, Range(1, 4096)] = 128,
        weights: str | None = None,
    ):
        super().__init__()
        self.names = list(names)
        self.card: dict[str, Any] = {"network": "VMamba", "scale": scale, "width": width}
        self.encoder = Encoder(SIZES[scale])
        self.head = Head(self.encoder.channels, width, len(self.names))
        # not in the state_dict, as nothing learns them
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1), persistent=False)
        if weights:
            tensors = trained_tensors(weights, self.names, self.card)
            fill(self, tensors, weights)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(N, 3, H, W) RGB 0..1, sides divisible by 32 -> preds."""
        return [self.head(self.features(images))]

    def features(self, images: Tensor) -> list[Tensor]:
        """What the head reads."""
        return self.encoder((images - self.mean) / self.std)

    def class_maps(self, preds: list[Tensor]) -> list[Tensor]:
        return preds

    def loss(self, preds: list[Tensor], targets: Targets) -> Losses:
        return maps.loss(preds, targets)

    @torch.no_grad()
    def decode(self, preds: list[Tensor]) -> list[Prediction]:
        return maps.decode(preds)


class Encoder(nn.Module):
    """Four stages, each at half the size and twice the channels of the one before."""

    def __init__(self, size: Size):
        super().__init__()
        first = size.channels
        self.channels = [first * 2**stage for stage in range(4)]
        self.stem = nn.Sequential(halving(3, first // 2), nn.GELU(), halving(first // 2, first))
        self.stages = nn.ModuleList()
        self.downsamples = nn.ModuleList(halving(c, 2 * c) for c in self.channels[:-1])
        for stage, depth in enumerate(size.depths):
            channels = self.channels[stage]
            last = stage == len(size.depths) - 1
            blocks = [Block(channels, size.expansion * channels, last) for _ in range(depth)]
            self.stages.append(nn.Sequential(*blocks))

    def forward(self, images: Tensor) -> list[Tensor]:
        """-> what each stage gives, (N, C, H, W) at strides 4, 8, 16 and 32."""
        x = self.stages[0](self.stem(images))
        outputs = [x]
        for downsample, stage in zip(self.downsamples, self.stages[1:], strict=True):
            x = stage(downsample(x))
            outputs.append(x)
        return outputs


class Block(nn.Module):
    """x + SS2D(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, channels: int, inner: int, has_graph: bool):
        super().__init__()
        self.norm1 = LayerNorm2d(channels)
        self.mixer = SS2D(channels, inner, has_graph)
        self.norm2 = LayerNorm2d(channels)
        self.mlp = nn.Sequential(
            dense(channels, 4 * channels),
            nn.GELU(),
            dense(4 * channels, channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class SS2D(nn.Module):
    """The selective scan over a map in four orders, whose outputs are summed.

    graph: a place for a tap on the state affinity, (N, 4, P, P), which is computed only
        where there is a hook; at the last stage alone, for its size is P^2.
    """

    def __init__(self, channels: int, inner: int, has_graph: bool):
        super().__init__()
        rank = math.ceil(channels / 16)  # R
        self.split = [4 * rank, 4, 4]
        self.expand = dense(channels, inner, bias=False)
        self.depthwise = nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=False)
        self.select = nn.Conv2d(inner, sum(self.split), 1, bias=False)
        self.dt = nn.Conv2d(4 * rank, 4 * inner, 1, groups=4, bias=False)
        self.norm = LayerNorm2d(inner)
        self.shrink = dense(inner, channels, bias=False)
        self.graph = nn.Identity() if has_graph else None

        # of one dimension each, which the optimiser takes as free from weight decay
        self.dt_bias = nn.Parameter(first_dt(4 * inner).expm1().log())  # before the softplus
        self.a_log = nn.Parameter(torch.zeros(4 * inner))  # of -A, which is -1
        self.d = nn.Parameter(torch.ones(4 * inner))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> the same."""
        u = F.silu(self.depthwise(self.expand(x)))  # (N, D, H, W)
        low, b, c = self.select(u).split(self.split, 1)
        dt = self.dt(low)
        # half precision would round dt_bias by a hundredth, and the decays of all steps
        with torch.autocast(x.device.type, enabled=False):
            y = self.norm(self.scanned(u, dt, b, c))  # float32 as dt_bias is
        return self.shrink(y)

    def scanned(self, u: Tensor, dt: Tensor, b: Tensor, c: Tensor) -> Tensor:
        """u (N, D, H, W), dt (N, 4D, H, W) before bias and softplus, b and c (N, 4, H, W) -> y,
        (N, D, H, W), the sum over the four orders.
        """
        dt = F.softplus(dt + self.dt_bias[:, None, None])
        log_a = -dt * self.a_log.exp()[:, None, None]
        dt = dt.unflatten(1, (4, -1))  # (N, 4, D, H, W)
        log_a = log_a.unflatten(1, (4, -1))
        b = b[:, :, None]
        c = c[:, :, None]
        if self.graph is not None and self.graph._forward_hooks:
            self.graph(state_affinity(log_a, dt, b, c))

        inputs = dt * b * u[:, None]
        h = scan(cross_scan(log_a.exp()), cross_scan(inputs))
        y = cross_merge(h, *u.shape[2:]) * c
        skip = self.d.unflatten(0, (4, -1)).sum(0)  # (D,)
        return y.sum(1) + skip[:, None, None] * u


class Head(nn.Module):
    """SegFormer's: every stage to `width` channels and the size of the first, one layer over
    all of them, and the classes.
    """

    def __init__(self, channels: Sequence[int], width: int, num_classes: int):
        super().__init__()
        self.levels = nn.ModuleList(
            nn.Sequential(LayerNorm2d(c), dense(c, width)) for c in channels
        )
        self.fuse = nn.Conv2d(len(channels) * width, width, 1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.dropout = nn.Dropout2d(0.1)
        self.classes = nn.Conv2d(width, num_classes, 1)

    def forward(self, feats: Sequence[Tensor]) -> Tensor:
        """(N, C, H, W) of every stage -> class logits (N, K, H, W) at the size of the first."""
        size = feats[0].shape[2:]
        levels = []
        for level, feat in zip(self.levels, feats, strict=True):
            x = F.interpolate(level(feat), size, mode="bilinear", align_corners=False)
            levels.append(x)
        fused = self.fuse(torch.cat(levels[::-1], 1))  # deepest first
        return self.classes(self.dropout(F.relu(self.norm(fused))))


def halving(c_in: int, c_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(c_in, c_out, 3, 2, 1), LayerNorm2d(c_out))


def dense(c_in: int, c_out: int, bias: bool = True) -> nn.Conv2d:
    """A linear layer, the same for every cell."""
    layer = nn.Conv2d(c_in, c_out, 1, bias=bias)
    nn.init.trunc_normal_(layer.weight, std=0.02)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def first_dt(count: int) -> Tensor:
    """Log-uniform in DT_RANGE."""
    low, high = map(math.log, DT_RANGE)
    return torch.empty(count).uniform_(low, high).exp()
