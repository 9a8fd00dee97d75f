"""Wide residual networks for images of 32 pixels, as attention transfer teaches them.

Sources: Zagoruyko & Komodakis, "Wide Residual Networks", BMVC 2016; the same, "Paying More
Attention to Attention", ICLR 2017, section 4.1: WRN-16-1, 16-2, 40-1 and 40-2, whose taps are
the outputs of the three groups.
Legend: N images, S image size, C channels.
"""

from typing import Annotated, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from kdmini.bounds import Range, ShareBelowOne
from kdmini.classification.classifier import Classifier

WIDTHS = (16, 32, 64)  # of the groups, times the width


class WideResNet(Classifier):
    """The network; its taps are group1, group2 and group3, of strides 1, 2 and 4.

    `preds`: logits (N, K).
    depth: layers with weights, those of the shortcuts aside; 6 n + 4.
    width: factor of the channels.
    weights: a best.pt of this network.
    label_smoothing: share of each target that goes to all classes alike.
    """

    def __init__(
        self,
        names: list[str],
        depth: Literal[10, 16, 22, 28, 40] = 16,
        width: Annotated[int, Range(1, 20)] = 1,
        weights: str | None = None,
        label_smoothing: ShareBelowOne = 0.0,
    ):
        super().__init__(names, label_smoothing)
        self.card = {"network": "WRN", "depth": depth, "width": width}
        first, second, third = (width * channels for channels in WIDTHS)
        blocks = (depth - 4) // 6
        self.conv = nn.Conv2d(3, WIDTHS[0], 3, padding=1, bias=False)
        self.group1 = group(WIDTHS[0], first, blocks, stride=1)
        self.group2 = group(first, second, blocks, stride=2)
        self.group3 = group(second, third, blocks, stride=2)
        self.norm = nn.BatchNorm2d(third)
        self.fc = nn.Linear(third, len(self.names))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
        if weights:
            self.read(weights)

    def body(self, images: Tensor) -> Tensor:
        """(N, 3, S, S), normalised -> (N, C, S / 4, S / 4)."""
        feat = self.group3(self.group2(self.group1(self.conv(images))))
        return F.relu(self.norm(feat))


class Block(nn.Module):
    """Two convolutions, each after BatchNorm and ReLU, beside a shortcut."""

    def __init__(self, channels: int, width: int, stride: int):
        super().__init__()
        # in the order in which they run: fold() takes the norm after a convolution for its own
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.shortcut: nn.Module | None = None
        if channels != width:
            self.shortcut = nn.Conv2d(channels, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, width, H / stride, W / stride)."""
        active = F.relu(self.norm1(x))
        out = self.conv2(F.relu(self.norm2(self.conv1(active))))
        return out + (self.shortcut(active) if self.shortcut else x)


def group(channels: int, width: int, blocks: int, stride: int) -> nn.Sequential:
    """Blocks of one width; the first has the stride."""
    rest = [Block(width, width, 1) for _ in range(blocks - 1)]
    return nn.Sequential(Block(channels, width, stride), *rest)
