"""The blocks of YOLO11 and its head, named as in the published architecture.

The attributes (cv1, cv2, m, ...) are parts of the public state_dict keys.

Legend: N images, C channels, H W cells, K classes.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STRIDES = (8, 16, 32)  # pixels a cell, of the three levels of the head
REG_MAX = 16  # bins of the distance distribution: a side is 0 to 15 strides away
BOX_CHANNELS = 4 * REG_MAX  # distance logits of a cell; K class logits follow


class BatchNorm(nn.BatchNorm2d):
    """Without the count of its batches, which only a momentum of None asks for: on a card it
    would be a launch for each of some 80 layers.
    """

    momentum: float

    def forward(self, x: Tensor) -> Tensor:
        if self.momentum is None:
            return super().forward(x)
        statistics = (self.running_mean, self.running_var)
        learned = (self.weight, self.bias)
        return F.batch_norm(x, *statistics, *learned, self.training, self.momentum, self.eps)


class Conv(nn.Module):
    """Convolution, BatchNorm, SiLU.

    groups: c_in makes it depthwise. act: False leaves the SiLU out.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        kernel: int = 1,
        stride: int = 1,
        groups: int = 1,
        act: bool = True,
    ):
        super().__init__()
        self.conv = nn.Conv2d(
            c_in,
            c_out,
            kernel,
            stride,
            padding=kernel // 2,
            groups=groups,
            bias=False,
        )
        self.bn: nn.Module = BatchNorm(c_out, eps=1e-3, momentum=0.03)
        # not in place: autograd would clone what it needs of the input
        self.act = nn.SiLU() if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class Bottleneck(nn.Module):
    """Two 3x3 convolutions with a residual connection."""

    def __init__(self, channels: int, expansion: float = 0.5):
        super().__init__()
        hidden = int(channels * expansion)
        self.cv1 = Conv(channels, hidden, 3)
        self.cv2 = Conv(hidden, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.cv2(self.cv1(x))


class C3k(nn.Module):
    """Cross-stage partial block: two bottlenecks on one half of the channels only."""

    def __init__(self, channels: int):
        super().__init__()
        hidden = channels // 2
        self.cv1 = Conv(channels, hidden)
        self.cv2 = Conv(channels, hidden)
        self.cv3 = Conv(2 * hidden, channels)
        self.m = nn.Sequential(
            Bottleneck(hidden, expansion=1.0),
            Bottleneck(hidden, expansion=1.0),
        )

    def forward(self, x: Tensor) -> Tensor:
        through = self.m(self.cv1(x))
        around = self.cv2(x)
        return self.cv3(torch.cat([through, around], 1))


class C3k2(nn.Module):
    """Cross-stage partial block that keeps the output of every inner block."""

    def __init__(
        self,
        c_in: int,
        c_out: int,
        repeats: int,
        use_c3k: bool,
        expansion: float = 0.5,
    ):
        super().__init__()
        hidden = int(c_out * expansion)
        inner = C3k if use_c3k else Bottleneck
        self.cv1 = Conv(c_in, 2 * hidden)
        self.cv2 = Conv((2 + repeats) * hidden, c_out)
        self.m = nn.ModuleList(inner(hidden) for _ in range(repeats))

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.cv1(x).chunk(2, 1))
        for block in self.m:
            parts.append(block(parts[-1]))
        return self.cv2(torch.cat(parts, 1))


class SPPF(nn.Module):
    """Spatial pyramid pooling: three 5x5 max-pools in a row see 5, 9 and 13 cells."""

    def __init__(self, channels: int):
        super().__init__()
        hidden = channels // 2
        self.cv1 = Conv(channels, hidden)
        self.cv2 = Conv(4 * hidden, channels)
        self.m = nn.MaxPool2d(5, stride=1, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.cv1(x)]
        for _ in range(3):
            parts.append(self.m(parts[-1]))
        return self.cv2(torch.cat(parts, 1))


class Attention(nn.Module):
    """Self-attention between all positions of a map.

    Keys are half as wide as values; the position comes from a 3x3 depthwise
    convolution.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.heads = max(channels // 64, 1)
        self.value_dim = channels // self.heads
        self.key_dim = self.value_dim // 2
        keys = self.key_dim * self.heads  # channels of all keys, and of all queries
        self.qkv = Conv(channels, 2 * keys + channels, act=False)
        self.proj = Conv(channels, channels, act=False)
        self.pe = Conv(channels, channels, 3, groups=channels, act=False)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        qkv = self.qkv(x).view(n, self.heads, -1, h * w)
        dims = [self.key_dim, self.key_dim, self.value_dim]
        q, k, v = qkv.split(dims, 2)  # (N, heads, dim, HW)
        similarity = (q.transpose(-2, -1) @ k) * self.key_dim**-0.5  # (N, heads, HW, HW)
        attention = similarity.softmax(-1)
        out = (v @ attention.transpose(-2, -1)).view(n, c, h, w)
        position = self.pe(v.reshape(n, c, h, w))
        return self.proj(out + position)


class PSABlock(nn.Module):
    """Attention and a two-layer perceptron, each with a residual connection."""

    def __init__(self, channels: int):
        super().__init__()
        self.attn = Attention(channels)
        self.ffn = nn.Sequential(
            Conv(channels, 2 * channels),
            Conv(2 * channels, channels, act=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        return x + self.ffn(x)


class C2PSA(nn.Module):
    """Half of the channels pass through attention blocks, half go round them."""

    def __init__(self, channels: int, repeats: int):
        super().__init__()
        hidden = channels // 2
        self.cv1 = Conv(channels, 2 * hidden)
        self.cv2 = Conv(2 * hidden, channels)
        self.m = nn.Sequential(*(PSABlock(hidden) for _ in range(repeats)))

    def forward(self, x: Tensor) -> Tensor:
        around, through = self.cv1(x).chunk(2, 1)
        through = self.m(through)
        return self.cv2(torch.cat([around, through], 1))


class Upsample(nn.Upsample):
    """Twice the height and width, each cell four times."""

    def __init__(self) -> None:
        super().__init__(scale_factor=2)

    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        if not torch.amp.is_autocast_available(kind):  # as on `meta`
            return super().forward(x)
        # it would make float32 of the map, and of the concatenation behind it
        with torch.autocast(kind, enabled=False):
            return super().forward(x)


class Concat(nn.Module):
    """Joins maps of one size along their channels."""

    def forward(self, x: Sequence[Tensor]) -> Tensor:
        return torch.cat(tuple(x), 1)


class DFL(nn.Module):
    """Carries the bin numbers 0..15 under their public key, and computes nothing.

    `expected_dist` in loss.py does the arithmetic.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(REG_MAX, 1, 1, bias=False).requires_grad_(False)
        self.conv.weight.data[:] = torch.arange(float(REG_MAX)).view(1, REG_MAX, 1, 1)


class Detect(nn.Module):
    """Decoupled head: at each level 64 distance logits and K class logits a cell.

    cls_width: channels of the class branch; by default the public rule's for K classes.
    """

    def __init__(self, channels: Sequence[int], num_classes: int, cls_width: int | None = None):
        super().__init__()
        box_width = max(channels[0] // 4, BOX_CHANNELS)
        cls_width = cls_width or max(channels[0], min(num_classes, 100))
        self.cv2 = nn.ModuleList(box_branch(c, box_width) for c in channels)
        self.cv3 = nn.ModuleList(class_branch(c, cls_width, num_classes) for c in channels)
        self.dfl = DFL()
        for level, stride in enumerate(STRIDES):
            # about five objects in 640 x 640 pixels, spread over classes and cells
            prior = math.log(5 / num_classes / (640 / stride) ** 2)
            nn.init.constant_(self.get_parameter(f"cv2.{level}.2.bias"), 1.0)
            nn.init.constant_(self.get_parameter(f"cv3.{level}.2.bias"), prior)

    def forward(self, feats: Sequence[Tensor]) -> list[Tensor]:
        """(N, C, H, W) at three levels -> (N, 64 + K, H, W) at three levels."""
        preds = []
        for box, cls, feat in zip(self.cv2, self.cv3, feats, strict=True):
            preds.append(torch.cat([box(feat), cls(feat)], 1))
        return preds


def box_branch(c_in: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        Conv(c_in, width, 3),
        Conv(width, width, 3),
        nn.Conv2d(width, BOX_CHANNELS, 1),
    )


def class_branch(c_in: int, width: int, num_classes: int) -> nn.Sequential:
    return nn.Sequential(
        separable(c_in, width),
        separable(width, width),
        nn.Conv2d(width, num_classes, 1),
    )


def separable(c_in: int, c_out: int) -> nn.Sequential:
    """A depthwise and a pointwise convolution."""
    return nn.Sequential(
        Conv(c_in, c_in, 3, groups=c_in),
        Conv(c_in, c_out),
    )
