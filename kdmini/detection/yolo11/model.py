"""YOLO11, n to x, with the public layer numbers (model.0 .. model.23) and state_dict keys.

Layers, widths and depths are those of the published architecture; a block is named as it is there.
Legend: N images, C channels, H W cells, A anchor points, K classes.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from kdmini.contracts import Detections, Losses, Targets, UserError
from kdmini.detection.boxes import anchor_points, dist_ltrb_to_xyxy, select
from kdmini.detection.yolo11 import weights as weight_files
from kdmini.detection.yolo11.loss import detection_loss, expected_dist

STRIDES = (8, 16, 32)
REG_MAX = 16  # bins of the distance distribution: a side is 0 to 15 strides away

SCALES = {  # depth, width, max channels
    "n": (0.50, 0.25, 1024),
    "s": (0.50, 0.50, 1024),
    "m": (0.50, 1.00, 512),
    "l": (1.00, 1.00, 512),
    "x": (1.00, 1.50, 512),
}


class Conv(nn.Module):
    """Convolution, BatchNorm, SiLU. `groups=c_in` makes it depthwise; `act=False` leaves the SiLU
    out.
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
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn: nn.Module = nn.BatchNorm2d(c_out, eps=1e-3, momentum=0.03)
        self.act = nn.SiLU(inplace=True) if act else nn.Identity()

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
    """Cross-stage partial block: half of the channels pass through two bottlenecks, half go round
    them.
    """

    def __init__(self, channels: int):
        super().__init__()
        hidden = channels // 2
        self.cv1 = Conv(channels, hidden)
        self.cv2 = Conv(channels, hidden)
        self.cv3 = Conv(2 * hidden, channels)
        self.m = nn.Sequential(*(Bottleneck(hidden, expansion=1.0) for _ in range(2)))

    def forward(self, x: Tensor) -> Tensor:
        return self.cv3(torch.cat([self.m(self.cv1(x)), self.cv2(x)], 1))


class C3k2(nn.Module):
    """Cross-stage partial block that keeps the output of every inner block."""

    def __init__(self, c_in: int, c_out: int, repeats: int, use_c3k: bool, expansion: float = 0.5):
        super().__init__()
        hidden = int(c_out * expansion)
        self.cv1 = Conv(c_in, 2 * hidden)
        self.cv2 = Conv((2 + repeats) * hidden, c_out)
        self.m = nn.ModuleList(
            C3k(hidden) if use_c3k else Bottleneck(hidden) for _ in range(repeats)
        )

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.cv1(x).chunk(2, 1))
        for block in self.m:
            parts.append(block(parts[-1]))
        return self.cv2(torch.cat(parts, 1))


class SPPF(nn.Module):
    """Spatial pyramid pooling: three 5x5 max-pools in a row see 5, 9 and 13 cells."""

    def __init__(self, channels: int):
        super().__init__()
        self.cv1 = Conv(channels, channels // 2)
        self.cv2 = Conv(channels // 2 * 4, channels)
        self.m = nn.MaxPool2d(5, stride=1, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.cv1(x)]
        for _ in range(3):
            parts.append(self.m(parts[-1]))
        return self.cv2(torch.cat(parts, 1))


class Attention(nn.Module):
    """Self-attention between all positions; keys are half as wide as values, position comes from a
    3x3 depthwise.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.heads = max(channels // 64, 1)
        self.value_dim = channels // self.heads
        self.key_dim = self.value_dim // 2
        self.qkv = Conv(channels, channels + 2 * self.key_dim * self.heads, act=False)
        self.proj = Conv(channels, channels, act=False)
        self.pe = Conv(channels, channels, 3, groups=channels, act=False)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        qkv = self.qkv(x).view(n, self.heads, -1, h * w)
        q, k, v = qkv.split([self.key_dim, self.key_dim, self.value_dim], 2)  # (N, heads, dim, HW)
        attention = ((q.transpose(-2, -1) @ k) * self.key_dim**-0.5).softmax(
            -1
        )  # (N, heads, HW, HW)
        out = (v @ attention.transpose(-2, -1)).view(n, c, h, w)
        return self.proj(out + self.pe(v.reshape(n, c, h, w)))


class PSABlock(nn.Module):
    """Attention and a two-layer perceptron, each with a residual connection."""

    def __init__(self, channels: int):
        super().__init__()
        self.attn = Attention(channels)
        self.ffn = nn.Sequential(
            Conv(channels, 2 * channels), Conv(2 * channels, channels, act=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        return x + self.ffn(x)


class C2PSA(nn.Module):
    """Half of the channels pass through attention blocks, half go round them."""

    def __init__(self, channels: int, repeats: int):
        super().__init__()
        self.cv1 = Conv(channels, 2 * (channels // 2))
        self.cv2 = Conv(2 * (channels // 2), channels)
        self.m = nn.Sequential(*(PSABlock(channels // 2) for _ in range(repeats)))

    def forward(self, x: Tensor) -> Tensor:
        around, through = self.cv1(x).chunk(2, 1)
        return self.cv2(torch.cat([around, self.m(through)], 1))


class Concat(nn.Module):
    def forward(self, x: Sequence[Tensor]) -> Tensor:
        return torch.cat(tuple(x), 1)


class DFL(nn.Module):
    """Carries the bin numbers 0..15 under their public key; `expected_dist` does the arithmetic."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(REG_MAX, 1, 1, bias=False).requires_grad_(False)
        self.conv.weight.data[:] = torch.arange(float(REG_MAX)).view(1, REG_MAX, 1, 1)


class Detect(nn.Module):
    """Decoupled head: at each level 4 * 16 distance logits and K class logits a cell."""

    def __init__(self, channels: Sequence[int], num_classes: int):
        super().__init__()
        box_width = max(channels[0] // 4, 4 * REG_MAX)
        cls_width = max(channels[0], min(num_classes, 100))
        self.cv2 = nn.ModuleList(
            nn.Sequential(
                Conv(c, box_width, 3),
                Conv(box_width, box_width, 3),
                nn.Conv2d(box_width, 4 * REG_MAX, 1),
            )
            for c in channels
        )
        self.cv3 = nn.ModuleList(
            nn.Sequential(
                nn.Sequential(Conv(c, c, 3, groups=c), Conv(c, cls_width)),
                nn.Sequential(
                    Conv(cls_width, cls_width, 3, groups=cls_width), Conv(cls_width, cls_width)
                ),
                nn.Conv2d(cls_width, num_classes, 1),
            )
            for c in channels
        )
        self.dfl = DFL()
        for level, stride in enumerate(STRIDES):
            nn.init.constant_(self.get_parameter(f"cv2.{level}.2.bias"), 1.0)
            # about five objects in an image of 640 pixels, spread over classes and cells
            prior = math.log(5 / num_classes / (640 / stride) ** 2)
            nn.init.constant_(self.get_parameter(f"cv3.{level}.2.bias"), prior)

    def forward(self, feats: Sequence[Tensor]) -> list[Tensor]:
        """(N, C, H, W) at three levels -> (N, 64 + K, H, W) at three levels."""
        return [
            torch.cat([box(f), cls(f)], 1)
            for box, cls, f in zip(self.cv2, self.cv3, feats, strict=True)
        ]


class YOLO11(nn.Module):
    """The detector. `preds` are the raw maps of the three levels, (N, 64 + K, H, W), in training
    and evaluation.

    scale: n, s, m, l, x, or [depth, width, max channels] for one of your own.
    weights: a file (`yolo11s.pt`, `best.pt`), or {path: ..., classes: by_name | keep} where the
    classes differ:
        `by_name` carries rows over by class name, `keep` builds the file's own head.
    box, cls, dfl: gains of the three losses.
    """

    def __init__(
        self,
        names: list[str],
        scale: str | list[float] = "s",
        weights: str | dict[str, str] | None = None,
        box: float = 7.5,
        cls: float = 0.5,
        dfl: float = 1.5,
    ):
        super().__init__()
        if isinstance(scale, str) and scale not in SCALES:
            raise UserError(f"scale {scale!r} is not one of {', '.join(SCALES)}")
        source = {"path": weights} if isinstance(weights, str) else dict(weights or {})
        file = weight_files.read(source["path"]) if source else None
        if file and source.get("classes") == "keep":
            names = file.names
        self.names = list(names)
        self.scale = scale
        self.gains = {"box": box, "cls": cls, "dfl": dfl}
        self.model = build_layers(
            SCALES[scale] if isinstance(scale, str) else scale, len(self.names)
        )
        self.license = file.license if file else ""
        self.sppf_act = file.sppf_act if file else True
        if not self.sppf_act:
            self.get_submodule("model.9.cv1").act = nn.Identity()
        if file:
            self.load_state_dict(
                weight_files.fit(file, self.state_dict(), self.names, scale, source.get("classes"))
            )

    @property
    def card(self) -> dict[str, Any]:
        """What `best.pt` carries beside the tensors. `license` is that of the weights training
        began from.
        """
        return {"scale": self.scale, "sppf_act": self.sppf_act, "license": self.license}

    def forward(self, images: Tensor) -> list[Tensor]:
        """(N, 3, H, W) RGB 0..1, sides divisible by 32 -> three levels of (N, 64 + K, H/8..,
        W/8..).
        """
        return self.model[23](self._pyramid(images))

    def features(self, images: Tensor) -> None:
        """Runs layers 0 to 22, for the hooks on them."""
        self._pyramid(images)

    def _pyramid(self, images: Tensor) -> list[Tensor]:
        """-> the outputs of layers 16, 19 and 22, strides 8, 16 and 32."""
        outputs: list[Tensor] = []
        x: Any = images
        for layer, source in zip(self.model[:23], SOURCES, strict=True):
            x = layer(x if len(source) == 1 else [x, outputs[source[1]]])
            outputs.append(x)
        return [outputs[16], outputs[19], outputs[22]]

    def loss(self, preds: list[Tensor], targets: Targets) -> Losses:
        """-> {"box", "cls", "dfl"}: means over the batch, each times its gain."""
        losses = detection_loss(preds, targets, STRIDES, REG_MAX)
        return {name: self.gains[name] * loss for name, loss in losses.items()}

    @torch.no_grad()
    def decode(
        self, preds: list[Tensor], score: float = 0.001, iou: float = 0.7, max_det: int = 300
    ) -> list[Detections]:
        """Boxes above `score` after class-wise NMS, best first, several classes a box; xyxy in
        input pixels.
        """
        boxes_xyxy, scores = decode_maps(preds)
        return [select(b, s, score, iou, max_det) for b, s in zip(boxes_xyxy, scores, strict=True)]

    def fold(self) -> "YOLO11":
        """Merges each BatchNorm into its convolution, in place; for a frozen copy in eval mode."""
        for module in self.modules():
            if isinstance(module, Conv) and isinstance(module.bn, nn.BatchNorm2d):
                module.conv = fuse_conv_bn_eval(module.conv, module.bn)
                module.bn = nn.Identity()
        return self


# where a layer takes its input from: the layer before it, and for Concat a second one
SOURCES = tuple(
    {12: (-1, 6), 15: (-1, 4), 18: (-1, 13), 21: (-1, 10)}.get(i, (-1,)) for i in range(23)
)


def build_layers(scale: Sequence[float], num_classes: int) -> nn.ModuleList:
    """The 24 layers of the public graph for (depth, width, max channels)."""
    depth, width, max_channels = scale
    wide = width >= 1.0  # m, l and x use C3k in every C3k2

    def ch(channels: int) -> int:
        return math.ceil(min(channels, max_channels) * width / 8) * 8

    def block(c_in: int, c_out: int, c3k: bool = False, expansion: float = 0.5) -> C3k2:
        return C3k2(c_in, ch(c_out), repeats, c3k or wide, expansion)

    repeats = max(round(2 * depth), 1)
    c64, c128, c256, c512, c1024 = (ch(c) for c in (64, 128, 256, 512, 1024))
    return nn.ModuleList(
        [
            Conv(3, c64, 3, 2),
            Conv(c64, c128, 3, 2),
            block(c128, 256, expansion=0.25),
            Conv(c256, c256, 3, 2),
            block(c256, 512, expansion=0.25),
            Conv(c512, c512, 3, 2),
            block(c512, 512, c3k=True),
            Conv(c512, c1024, 3, 2),
            block(c1024, 1024, c3k=True),
            SPPF(c1024),
            C2PSA(c1024, repeats),
            nn.Upsample(scale_factor=2),
            Concat(),
            block(c1024 + c512, 512),
            nn.Upsample(scale_factor=2),
            Concat(),
            block(c512 + c512, 256),
            Conv(c256, c256, 3, 2),
            Concat(),
            block(c256 + c512, 512),
            Conv(c512, c512, 3, 2),
            Concat(),
            block(c512 + c1024, 1024, c3k=True),
            Detect((c256, c512, c1024), num_classes),
        ]
    )


def decode_maps(preds: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Raw maps -> boxes_xyxy (N, A, 4) in input pixels and scores (N, A, K), both float32."""
    points, stride_of = anchor_points([p.shape[2:] for p in preds], STRIDES, preds[0].device)
    flat = torch.cat([p.flatten(2) for p in preds], 2).transpose(1, 2).float()  # (N, A, 64 + K)
    boxes_xyxy = dist_ltrb_to_xyxy(
        expected_dist(flat[..., : 4 * REG_MAX], REG_MAX), points, stride_of
    )
    return boxes_xyxy, flat[..., 4 * REG_MAX :].sigmoid()
