"""YOLO11, n to x, with the public layer numbers (model.0 to model.23) and keys.

Layers, widths and depths are those of the published architecture.

Legend: N images, H W pixels, A anchor points, K classes.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from kdmini.bounds import Gain
from kdmini.classes import source_rows
from kdmini.contracts import Losses, UserError
from kdmini.detection.boxes import anchor_points, dist_ltrb_to_xyxy, flatten_levels, select
from kdmini.detection.truth import Detections, Targets
from kdmini.detection.yolo11 import weights as weight_files
from kdmini.detection.yolo11.class_rows import CLASS_ROWS
from kdmini.detection.yolo11.layers import (
    BOX_CHANNELS,
    C2PSA,
    REG_MAX,
    SPPF,
    STRIDES,
    C3k2,
    Concat,
    Conv,
    Detect,
    Upsample,
)
from kdmini.detection.yolo11.loss import detection_loss, expected_dist
from kdmini.detection.yolo11.sizes import SCALES, Scale, Sizes, sizes_of
from kdmini.weights.state import source_of

HEAD = 23  # the last layer
HEAD_INPUTS = (16, 19, 22)  # layers of strides 8, 16 and 32
# every other layer reads the one before it; a Concat reads this one too
CONCAT_WITH = {12: 6, 15: 4, 18: 13, 21: 10}
READ_LATER = {*HEAD_INPUTS, *CONCAT_WITH.values()}


class YOLO11(nn.Module):
    """The detector.

    `preds` are the raw maps of the three levels, (N, 64 + K, H / stride, W / stride),
    in training and evaluation alike.
    scale: n, s, m, l, x, or [depth, width, max channels] for one of your own.
    weights: a file (`yolo11s.pt`, `best.pt`), or {path: ..., classes: by_name | keep}
        where the classes differ: `by_name` carries rows over by class name, `keep`
        builds the file's own head. A bare state_dict needs {path: ..., names: [...]},
        and `sppf_act: false` where it was trained without the SiLU there. The class
        branch is as wide as the file's.
    box, cls, dfl: gains of the three losses.
    """

    def __init__(
        self,
        names: list[str],
        scale: Scale = "s",
        weights: str | dict[str, Any] | None = None,
        box: Gain = 7.5,
        cls: Gain = 0.5,
        dfl: Gain = 1.5,
    ):
        super().__init__()
        if isinstance(scale, str) and scale not in SCALES:
            raise UserError(f"scale {scale!r} is not one of {', '.join(SCALES)}")
        file = None
        classes = None
        if weights:
            source = source_of(weights, weight_files.Source)
            classes = source.classes
            file = weight_files.read(source.path, source.names, source.sppf_act)
            # before anything of the size that a file or a config claims is built
            weight_files.check_scale(file, scale)
            if classes == "keep":
                names = file.names

        self.names = list(names)
        self.unread: list[str] = []  # classes of which the file has no row
        self.scale = scale if isinstance(scale, str) else list(scale)
        self.gains = {"box": box, "cls": cls, "dfl": dfl}
        self.license = file.license if file else ""
        self.sppf_act = file.sppf_act if file else True
        cls_width = file.cls_width if file else None
        self.model = build_layers(sizes_of(scale), len(self.names), cls_width)
        if not self.sppf_act:
            self.get_submodule("model.9.cv1").act = nn.Identity()
        if file:
            state = weight_files.fit(file, self.state_dict(), self.names, scale, classes)
            self.load_state_dict(state)
            known = source_rows(file.names, self.names)
            self.unread = [name for row, name in enumerate(self.names) if row not in known]

    @property
    def card(self) -> dict[str, Any]:
        """What `best.pt` carries beside the tensors.

        `license` is that of the weights training began from, cls_width the channels of
        the class branch.
        """
        return {
            "scale": self.scale,
            "cls_width": self.get_parameter(CLASS_ROWS[0]).shape[1],
            "sppf_act": self.sppf_act,
            "license": self.license,
        }

    def forward(self, images: Tensor) -> list[Tensor]:
        """(N, 3, H, W) RGB 0..1, sides divisible by 32 -> preds."""
        return self.model[HEAD](self._pyramid(images))

    def features(self, images: Tensor) -> None:
        """Runs all layers but the head, for the hooks on them."""
        self._pyramid(images)

    def _pyramid(self, images: Tensor) -> list[Tensor]:
        """-> the maps that the head reads."""
        outputs: dict[int, Tensor] = {}
        x: Any = images
        for number, layer in enumerate(self.model[:HEAD]):
            if number in CONCAT_WITH:  # it takes two maps
                x = [x, outputs[CONCAT_WITH[number]]]
            x = layer(x)
            # no other is kept: without a backward pass its memory is free again
            if number in READ_LATER:
                outputs[number] = x
        return [outputs[number] for number in HEAD_INPUTS]

    def make_head(self, channels: Sequence[int]) -> Detect:
        """A fresh head for maps of these channels, at strides 8, 16 and 32."""
        if len(channels) != len(STRIDES):
            raise UserError(
                "a head of YOLO11 reads three maps, of strides 8, 16 and 32; these are "
                f"{len(channels)}"
            )
        return Detect(channels, len(self.names))

    def class_maps(self, preds: list[Tensor]) -> list[Tensor]:
        """-> class logits of each level, (N, K, H, W)."""
        return [level[:, BOX_CHANNELS:] for level in preds]

    def loss(self, preds: list[Tensor], targets: Targets) -> Losses:
        """-> {"box", "cls", "dfl"}: means over the batch, each times its gain."""
        losses = detection_loss(preds, targets, STRIDES, REG_MAX)
        return {name: self.gains[name] * loss for name, loss in losses.items()}

    @torch.no_grad()
    def decode(
        self,
        preds: list[Tensor],
        score: float = 0.001,
        iou: float = 0.7,
        max_det: int = 300,
    ) -> list[Detections]:
        """Boxes above `score` after class-wise NMS, best first, several classes a box.

        In pixels of the input. The defaults are those of evaluation.
        """
        boxes_xyxy, scores = decode_maps(preds)
        return [select(b, s, score, iou, max_det) for b, s in zip(boxes_xyxy, scores, strict=True)]

    def fold(self) -> "YOLO11":
        """Merges each BatchNorm into its convolution, in place.

        For a frozen copy in eval mode. Its SiLU overwrites what the convolution returned:
        there is no autograd to read it again.
        """
        for module in self.modules():
            if isinstance(module, Conv) and isinstance(module.bn, nn.BatchNorm2d):
                module.conv = fuse_conv_bn_eval(module.conv, module.bn)
                module.bn = nn.Identity()
            if isinstance(module, nn.SiLU):
                module.inplace = True
        return self

    def hold_in(self, dtype: torch.dtype) -> None:
        """Keeps the weights of convolutions in the type in which autocast computes them, in
        place.

        For a frozen copy: of weights that do not learn, autocast makes a copy at every step.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                module.to(dtype)


def build_layers(sizes: Sizes, num_classes: int, cls_width: int | None) -> nn.ModuleList:
    """The 24 layers of the public graph. cls_width: see Detect."""
    c64, c128, c256, c512, c1024, repeats, wide = sizes

    def block(c_in: int, c_out: int, use_c3k: bool = False, expansion: float = 0.5) -> C3k2:
        return C3k2(c_in, c_out, repeats, use_c3k or wide, expansion)

    layers = [
        # backbone
        Conv(3, c64, 3, 2),
        Conv(c64, c128, 3, 2),
        block(c128, c256, expansion=0.25),
        Conv(c256, c256, 3, 2),
        block(c256, c512, expansion=0.25),
        Conv(c512, c512, 3, 2),
        block(c512, c512, use_c3k=True),
        Conv(c512, c1024, 3, 2),
        block(c1024, c1024, use_c3k=True),
        SPPF(c1024),
        C2PSA(c1024, repeats),
        # neck, down to stride 8
        Upsample(),
        Concat(),
        block(c1024 + c512, c512),
        Upsample(),
        Concat(),
        block(c512 + c512, c256),
        # and up again to stride 32
        Conv(c256, c256, 3, 2),
        Concat(),
        block(c256 + c512, c512),
        Conv(c512, c512, 3, 2),
        Concat(),
        block(c512 + c1024, c1024, use_c3k=True),
        Detect((c256, c512, c1024), num_classes, cls_width),
    ]
    return nn.ModuleList(layers)


def decode_maps(preds: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Raw maps -> boxes_xyxy (N, A, 4) in input pixels, scores (N, A, K); float32."""
    sizes = [level.shape[2:] for level in preds]
    points, stride_of = anchor_points(sizes, STRIDES, preds[0].device)
    outputs = flatten_levels(preds)  # (N, A, 64 + K)
    dist_ltrb = expected_dist(outputs[..., :BOX_CHANNELS], REG_MAX)
    boxes_xyxy = dist_ltrb_to_xyxy(dist_ltrb, points, stride_of)
    return boxes_xyxy, outputs[..., BOX_CHANNELS:].sigmoid()
