"""Fast-SCNN: a shallow path at 1/8 and a deep one at 1/32 that share their first layers.

Source: Poudel, Liwicki, Cipolla, "Fast-SCNN: Fast Semantic Segmentation Network", BMVC 2019.
In the form in which it is usually built: a 1x1 convolution after the pyramid pooling, and
two auxiliary heads, which the paper only mentions.

Legend: N images, H W cells, C channels, K classes.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdmini.bounds import Gain
from kdmini.segmentation.maps import Segmenter
from kdmini.weightfile import fill, trained_tensors

BINS = (1, 2, 3, 6)  # cells a side of the pyramid pooling
EXPANSION = 6


class FastSCNN(Segmenter):
    """The network; its taps are higher (stride 8), stages.0 (16), stages.1 and stages.2 (32),
    pooled (32) and fusion (8).

    `preds`: [logits (N, K, H / 8, W / 8), those of the auxiliary heads on `higher` and on
    `pooled`].
    weights: a best.pt of this network.
    aux: gain of the loss of the auxiliary heads.
    """

    def __init__(self, names: list[str], weights: str | None = None, aux: Gain = 0.4):
        super().__init__(names, aux)
        self.card: dict[str, Any] = {"network": "Fast-SCNN"}
        num_classes = len(self.names)
        self.higher = nn.Sequential(
            conv_bn(3, 32, 3, stride=2),
            *separable(32, 48, stride=2),
            *separable(48, 64, stride=2),
        )
        self.stages = nn.Sequential(
            bottlenecks(64, 64, stride=2),
            bottlenecks(64, 96, stride=2),
            bottlenecks(96, 128, stride=1),
        )
        self.pooled = PyramidPooling(128)
        self.fusion = Fusion(64, 128)
        self.head = nn.Sequential(
            *separable(128, 128),
            *separable(128, 128),
            nn.Dropout(0.1),
            nn.Conv2d(128, num_classes, 1),
        )
        self.aux_higher = auxiliary_head(64, num_classes)
        self.aux_pooled = auxiliary_head(128, num_classes)
        if weights:
            fill(self, trained_tensors(weights, self.names, self.card), weights)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(N, 3, H, W) RGB 0..1 -> preds."""
        higher, pooled, fused = self._fused(images)
        return [self.head(fused), self.aux_higher(higher), self.aux_pooled(pooled)]

    def features(self, images: Tensor) -> None:
        """Runs all but the heads, for the hooks."""
        self._fused(images)

    def _fused(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """-> the maps that the heads read."""
        higher = self.higher(self.normalised(images))
        pooled = self.pooled(self.stages(higher))
        return higher, pooled, self.fusion(higher, pooled)


# --- blocks


def conv_bn(
    channels: int, width: int, kernel: int, stride: int = 1, groups: int = 1, act: bool = True
) -> nn.Sequential:
    """Convolution, BatchNorm and, with `act`, ReLU."""
    conv = nn.Conv2d(channels, width, kernel, stride, kernel // 2, groups=groups, bias=False)
    layers = [conv, nn.BatchNorm2d(width)]
    return nn.Sequential(*layers, *([nn.ReLU()] if act else []))


def separable(channels: int, width: int, stride: int = 1) -> list[nn.Module]:
    """A depthwise convolution, then one across channels."""
    return [
        conv_bn(channels, channels, 3, stride, groups=channels),
        conv_bn(channels, width, 1),
    ]


def auxiliary_head(channels: int, num_classes: int) -> nn.Sequential:
    return nn.Sequential(
        conv_bn(channels, 32, 3),
        nn.Dropout(0.1),
        nn.Conv2d(32, num_classes, 1),
    )


def bottlenecks(channels: int, width: int, stride: int) -> nn.Sequential:
    """Three of them; the first has the stride."""
    return nn.Sequential(
        Bottleneck(channels, width, stride),
        Bottleneck(width, width),
        Bottleneck(width, width),
    )


class Bottleneck(nn.Module):
    """An inverted residual of MobileNetV2: wide inside, no ReLU at its end."""

    def __init__(self, channels: int, width: int, stride: int = 1):
        super().__init__()
        hidden = EXPANSION * channels
        self.shortcut = stride == 1 and channels == width
        self.layers = nn.Sequential(
            conv_bn(channels, hidden, 1),
            conv_bn(hidden, hidden, 3, stride, groups=hidden),
            conv_bn(hidden, width, 1, act=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.shortcut else self.layers(x)


class PyramidPooling(nn.Module):
    """Means over ever smaller parts of the map, beside it: (N, C, H, W) -> the same shape."""

    def __init__(self, channels: int):
        super().__init__()
        self.parts = nn.ModuleList(conv_bn(channels, channels // 4, 1) for _ in BINS)
        self.out = conv_bn(2 * channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        maps = [x]
        for bins, part in zip(BINS, self.parts, strict=True):
            maps.append(resized(part(means(x, bins)), x))
        return self.out(torch.cat(maps, dim=1))


class Fusion(nn.Module):
    """The deep map, at the size of the shallow one, and that one, added."""

    def __init__(self, shallow: int, width: int):
        super().__init__()
        self.depthwise = conv_bn(width, width, 3, groups=width)
        self.low = nn.Sequential(nn.Conv2d(width, width, 1), nn.BatchNorm2d(width))
        self.high = nn.Sequential(nn.Conv2d(shallow, width, 1), nn.BatchNorm2d(width))

    def forward(self, higher: Tensor, pooled: Tensor) -> Tensor:
        low = self.low(self.depthwise(resized(pooled, higher)))
        return F.relu(low + self.high(higher))


# --- sizes of maps


def resized(x: Tensor, like: Tensor) -> Tensor:
    """Bilinear, to the height and width of another map."""
    return F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=False)


def means(x: Tensor, bins: int) -> Tensor:
    """(N, C, H, W) -> (N, C, bins, bins), as F.adaptive_avg_pool2d, which has no deterministic
    backward on CUDA.
    """
    rows, columns = (shares(size, bins, x.device).to(x) for size in x.shape[2:])
    return rows @ x @ columns.T


def shares(size: int, bins: int, device: torch.device) -> Tensor:
    """(bins, size): what each cell of a side counts in the mean of a bin, float64.

    Made on the device, for a copy to it would make the host wait.
    """
    number = torch.arange(bins, device=device).unsqueeze(1)
    first = number * size // bins
    end = -(-(number + 1) * size // bins)  # rounded up
    cell = torch.arange(size, device=device)
    inside = (cell >= first) & (cell < end)
    return inside.double() / (end - first)
