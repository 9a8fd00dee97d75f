"""VMamba with SegFormer's head: a state-space model in plain PyTorch that labels pixels.

Sources: Liu et al., "VMamba: Visual State Space Model", NeurIPS 2024, the released form
with a state of one number a channel; the head is that of Xie et al., "SegFormer", NeurIPS
2021.
Simplified: no stochastic depth.

Legend: N images, H W cells, C channels of a stage, D of a scan, R channels that dt is
made of, K classes, P = H W positions.
"""

import math
from typing import Annotated, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.convnext import LayerNorm2d  # over the channels of each cell

from kdmini.bounds import Range
from kdmini.segmentation.decoder import Decoder
from kdmini.segmentation.maps import Segmenter
from kdmini.segmentation.scan import cross_merge, cross_scan, scan, state_affinity
from kdmini.weightfile import fill, trained_tensors

DT_RANGE = (0.001, 0.1)  # of dt before training, drawn log-uniform


class Size(NamedTuple):
    """depths: blocks of each stage. channels: of the first stage. expansion: D / C."""

    depths: tuple[int, int, int, int]
    channels: int
    expansion: int


# the published ones, and one that is ours
SIZES = {
    "pico": Size((2, 2, 2, 2), 32, 1),
    "t_s1l8": Size((2, 2, 8, 2), 96, 1),
    "t_s2l5": Size((2, 2, 5, 2), 96, 2),
    "s_s1l20": Size((2, 2, 20, 2), 96, 1),
    "s_s2l15": Size((2, 2, 15, 2), 96, 2),
    "b_s2l15": Size((2, 2, 15, 2), 128, 2),
}


class VMamba(Segmenter):
    """The network; its taps are stages.0 to stages.3 (strides 4 to 32) and decoder, the map
    before the classes (stride 4).

    stages.3.B.mixer.graph gives what the positions hand to each other in block B of the last
    stage, (N, 4, P, P), an order of the scan each; what it costs is paid only where it is
    tapped.
    `preds`: [logits (N, K, H / 4, W / 4)].
    size: of the network, pico or one that the authors published.
    width: channels of the decoder.
    weights: a best.pt of this network.
    """

    def __init__(
        self,
        names: list[str],
        size: Literal["pico", "t_s1l8", "t_s2l5", "s_s1l20", "s_s2l15", "b_s2l15"] = "pico",
        width: Annotated[int, Range(1, 4096)] = 128,
        weights: str | None = None,
    ):
        super().__init__(names)
        self.card: dict[str, Any] = {"network": "VMamba", "size": size, "width": width}
        depths, first, expansion = SIZES[size]
        dims = [first * 2**stage for stage in range(len(depths))]
        self.stem = nn.Sequential(halving(3, first // 2), nn.GELU(), halving(first // 2, first))
        self.stages = nn.ModuleList()
        for channels, depth in zip(dims, depths, strict=True):
            last = channels == dims[-1]
            blocks = [Block(channels, expansion * channels, last) for _ in range(depth)]
            self.stages.append(nn.Sequential(*blocks))
        self.downsamples = nn.ModuleList(halving(c, 2 * c) for c in dims[:-1])
        self.norms = nn.ModuleList(LayerNorm2d(c) for c in dims)  # as before VMamba's own head
        self.decoder = Decoder(dims, width)
        self.dropout = nn.Dropout2d(0.1)  # of whole channels
        self.classifier = nn.Conv2d(width, len(self.names), 1)
        nn.init.normal_(self.classifier.weight, std=0.01)  # as every class is as likely
        if weights:
            tensors = trained_tensors(weights, self.names, self.card)
            fill(self, tensors, weights)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(N, 3, H, W) RGB 0..1 -> preds."""
        return [self.classifier(self.dropout(self._fused(images)))]

    def features(self, images: Tensor) -> None:
        """Runs all but the classifier, for the hooks."""
        self._fused(images)

    def _fused(self, images: Tensor) -> Tensor:
        x = self.stages[0](self.stem(self.normalised(images)))
        feats = [x]  # (N, C, H, W) of each stage, before the next one halves it
        for downsample, stage in zip(self.downsamples, self.stages[1:], strict=True):
            x = stage(downsample(x))
            feats.append(x)
        return self.decoder([norm(feat) for norm, feat in zip(self.norms, feats, strict=True)])


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
