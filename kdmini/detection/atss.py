"""ATSS: ResNet and FPN, and a head with one square anchor a cell.

Sources: as in atss_loss.py, and Lin et al., "Feature Pyramid Networks", CVPR 2017.
Simplified: the backbone's BatchNorm learns, where the paper freezes it; a score is
class times centerness, where the authors take the root of that.

Legend: N images, K classes, H W cells.
"""

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torchvision.models import resnet
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from kdmini.bounds import Gain, Range
from kdmini.contracts import Losses
from kdmini.detection.atss_loss import LEVELS, anchors_of, deltas_to_xyxy, detection_loss
from kdmini.detection.boxes import flatten_levels, select
from kdmini.detection.truth import Detections, Targets
from kdmini.weightfile import fill, read, trained_tensors

# of red, green and blue; what torchvision's weights were trained with
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

FIRST_SCORE = 0.01  # of every class and anchor, before training


class ATSS(nn.Module):
    """The detector; its taps are p3 to p7, and body.layer1 to body.layer4.

    `preds`: {"cls": class logits (N, K, H, W), "box": deltas (N, 4, H, W),
    "centerness": logits (N, 1, H, W)}, each a list of five levels.
    backbone: a ResNet of torchvision's.
    backbone_weights: a file of torchvision's for this backbone; it is not read where
        `weights` are given.
    weights: a best.pt of this detector.
    width: channels of FPN and head, in the groups of 8 that GroupNorm takes.
    box, cls, centerness: gains of the three losses.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        names: list[str],
        backbone: Literal["resnet18", "resnet34", "resnet50", "resnet101"] = "resnet50",
        backbone_weights: str | None = None,
        weights: str | None = None,
        width: Annotated[int, Range(8, 4096, step=8)] = 256,
        box: Gain = 2.0,
        cls: Gain = 1.0,
        centerness: Gain = 1.0,
    ):
        super().__init__()
        self.names = list(names)
        self.gains = {"box": box, "cls": cls, "centerness": centerness}
        self.card: dict[str, Any] = {"detector": "ATSS", "backbone": backbone, "width": width}

        self.body = getattr(resnet, backbone)()
        channels = self.body.fc.in_features  # of layer4
        del self.body.avgpool
        del self.body.fc
        self.fpn = FeaturePyramidNetwork(
            [channels // 4, channels // 2, channels], width, LastLevelP6P7(width, width)
        )
        for level in LEVELS:
            self.add_module(level, nn.Identity())  # a place for a tap
        self.head = Head(width, len(self.names))
        # not in the state_dict, as nothing learns them
        mean = torch.tensor(MEAN).view(1, 3, 1, 1)
        std = torch.tensor(STD).view(1, 3, 1, 1)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)

        if weights:
            tensors = trained_tensors(weights, self.names, self.card)
            fill(self, tensors, weights)
        elif backbone_weights:
            content = read(backbone_weights)
            tensors = {key: content[key] for key in content if not key.startswith("fc.")}
            fill(self.body, tensors, backbone_weights)

    def forward(self, images: Tensor) -> dict[str, list[Tensor]]:
        """(N, 3, H, W) RGB 0..1, sides divisible by 32 -> preds."""
        return self.head(self._pyramid(images))

    def features(self, images: Tensor) -> None:
        """Runs backbone and FPN, for the hooks on them."""
        self._pyramid(images)

    def _pyramid(self, images: Tensor) -> list[Tensor]:
        """-> the maps of LEVELS."""
        outputs = {}
        x = (images - self.mean) / self.std
        for name, layer in self.body.named_children():  # conv1, ..., layer1, ..., layer4
            x = layer(x)
            outputs[name] = x

        stages = OrderedDict(
            p3=outputs["layer2"],
            p4=outputs["layer3"],
            p5=outputs["layer4"],
        )
        feats = self.fpn(stages)
        return [self.get_submodule(level)(feats[level]) for level in LEVELS]

    def loss(self, preds: Mapping[str, Sequence[Tensor]], targets: Targets) -> Losses:
        """-> {"box", "cls", "centerness"}, each times its gain."""
        losses = detection_loss(preds, targets)
        return {name: self.gains[name] * loss for name, loss in losses.items()}

    def class_maps(self, preds: Mapping[str, Sequence[Tensor]]) -> list[Tensor]:
        """-> class logits of each level, (N, K, H, W)."""
        return [*preds["cls"]]

    @torch.no_grad()
    def decode(
        self,
        preds: Mapping[str, Sequence[Tensor]],
        score: float = 0.001,
        iou: float = 0.7,
        max_det: int = 300,
    ) -> list[Detections]:
        """Boxes whose class score times centerness is above `score`, best first.

        After class-wise NMS, in pixels of the input. The defaults are those of
        evaluation.
        """
        deltas = flatten_levels(preds["box"])  # (N, A, 4)
        boxes_xyxy = deltas_to_xyxy(deltas, anchors_of(preds["cls"]))
        class_scores = flatten_levels(preds["cls"]).sigmoid()  # (N, A, K)
        centerness = flatten_levels(preds["centerness"]).sigmoid()  # (N, A, 1)
        scores = class_scores * centerness
        return [select(b, s, score, iou, max_det) for b, s in zip(boxes_xyxy, scores, strict=True)]


class Head(nn.Module):
    """Two towers, shared by the levels; the scale of the deltas is each level's own."""

    def __init__(self, width: int, num_classes: int):
        super().__init__()
        self.cls_tower = tower(width)
        self.box_tower = tower(width)
        self.cls = nn.Conv2d(width, num_classes, 3, padding=1)
        self.box = nn.Conv2d(width, 4, 3, padding=1)
        self.centerness = nn.Conv2d(width, 1, 3, padding=1)
        self.scales = nn.Parameter(torch.ones(len(LEVELS)))
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.ndim == 4:
                nn.init.normal_(parameter, std=0.01)
        first_logit = math.log(FIRST_SCORE / (1 - FIRST_SCORE))
        nn.init.constant_(self.get_parameter("cls.bias"), first_logit)

    def forward(self, feats: Sequence[Tensor]) -> dict[str, list[Tensor]]:
        """(N, width, H, W) of five levels -> the preds of ATSS."""
        cls = [self.cls(self.cls_tower(feat)) for feat in feats]
        boxes = [self.box_tower(feat) for feat in feats]
        deltas = [self.box(feat) * scale for feat, scale in zip(boxes, self.scales, strict=True)]
        centerness = [self.centerness(feat) for feat in boxes]
        return {"cls": cls, "box": deltas, "centerness": centerness}


def tower(width: int) -> nn.Sequential:
    """Four 3x3 convolutions with GroupNorm, in groups of 8 channels."""
    layers: list[nn.Module] = []
    for _ in range(4):
        layers += [
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.GroupNorm(width // 8, width),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers)
