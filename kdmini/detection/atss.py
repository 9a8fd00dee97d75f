"""ATSS: ResNet and FPN, one square anchor a cell, and samples picked by the statistics of each
object's overlaps.

Source: Zhang et al., "Bridging the Gap Between Anchor-based and Anchor-free Detection via Adaptive
Training Sample Selection", CVPR 2020, algorithm 1; Lin et al., "Focal Loss", ICCV 2017; Rezatofighi
et al., "GIoU", CVPR 2019; Tian et al., "FCOS", ICCV 2019, equation 3 (centerness).
Simplified: the backbone's BatchNorm learns, where the paper freezes it; focal and centerness loss
are divided by the positives of one rank, not of all; a score is class times centerness, where the
authors take the root of that.
Legend: N images, A anchors of all levels, G objects (padded), C candidates, K classes, H W cells.
"""

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet
from torchvision.ops import FeaturePyramidNetwork, box_iou, sigmoid_focal_loss
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from kdmini.contracts import Detections, Losses, Targets, UserError
from kdmini.detection.boxes import (
    anchor_points,
    box_area,
    centre_inside,
    intersection,
    select,
    xyxy_to_dist_ltrb,
)
from kdmini.weightfile import fill, read, trained_tensors

LEVELS = {"p3": 8, "p4": 16, "p5": 32, "p6": 64, "p7": 128}  # name of the tap -> stride
SIDE = 8  # of an anchor, in strides
CANDIDATES = 9  # an object's closest anchors on each level
OFFSET, SCALE = 0.1, 0.2  # of an anchor's side and of its logarithm, for a prediction of 1
LARGEST = math.log(1000 / 16)  # bounds exp: a box is at most 62 anchors wide
EPS = 1e-7


class Assignment(NamedTuple):
    boxes_xyxy: Tensor  # (N, A, 4) the object's box, pixels; meaningless on background
    labels: Tensor  # (N, A) int64, -1 on background


@torch.no_grad()
def assign(points: Tensor, sides: Tensor, counts: Sequence[int], targets: Targets) -> Assignment:
    """points (A, 2) and sides (A, 1) of the anchors in pixels, anchors on each level -> Assignment.

    An object's positives are those of its candidates, CANDIDATES of each level by distance of the
    centres, that have their centre in its box and an IoU of at least mean + standard deviation of
    its candidates' IoU. What several objects claim goes to the one with the highest IoU. All shapes
    are fixed, so nothing waits for the device."""
    objects_xyxy = F.pad(
        targets["boxes_xyxy"], (0, 0, 0, 1)
    )  # (N, G, 4), one more that is padding: G is never 0
    labels = F.pad(targets["labels"], (0, 1), value=-1)  # (N, G)
    anchors_xyxy = torch.cat([points - sides / 2, points + sides / 2], 1)
    iou = box_iou(objects_xyxy.flatten(0, 1), anchors_xyxy).unflatten(0, labels.shape)  # (N, G, A)
    centres = (objects_xyxy[..., :2] + objects_xyxy[..., 2:]) / 2
    distances = torch.linalg.vector_norm(centres.unsqueeze(2) - points, dim=-1).split(
        list(counts), 2
    )
    starts = [sum(counts[:level]) for level in range(len(counts))]
    closest = [d.topk(min(CANDIDATES, d.shape[2]), largest=False).indices for d in distances]
    candidates = torch.cat(
        [index + start for index, start in zip(closest, starts, strict=True)], 2
    )  # (N, G, C)

    overlap = iou.gather(2, candidates)  # (N, G, C)
    threshold = overlap.mean(2, keepdim=True) + overlap.std(2, keepdim=True)
    claimed = torch.zeros_like(iou, dtype=torch.bool).scatter_(2, candidates, True) & (
        iou >= threshold
    )
    claimed &= centre_inside(points, objects_xyxy) & (labels >= 0).unsqueeze(2)  # (N, G, A)
    best, owner = iou.masked_fill(~claimed, -1).max(1)  # (N, A)
    boxes_xyxy = objects_xyxy.gather(1, owner.unsqueeze(2).expand(-1, -1, 4))
    return Assignment(boxes_xyxy, labels.gather(1, owner).masked_fill(best < 0, -1))


def deltas_to_xyxy(deltas: Tensor, points: Tensor, sides: Tensor) -> Tensor:
    """Offsets of the centre and logarithms of the sides (N, A, 4), (A, 2) and (A, 1) pixels -> (N,
    A, 4) pixels.
    """
    centres = points + OFFSET * deltas[..., :2] * sides
    half = sides * (SCALE * deltas[..., 2:]).clamp(max=LARGEST).exp() / 2
    return torch.cat([centres - half, centres + half], -1)


def giou(a_xyxy: Tensor, b_xyxy: Tensor) -> Tensor:
    """Generalised IoU of boxes that broadcast, (..., 4), (..., 4) -> (...), in -1..1. Torchvision's
    picks boxes by a mask, and so waits for the device.
    """
    inter = intersection(a_xyxy, b_xyxy)
    union = box_area(a_xyxy) + box_area(b_xyxy) - inter
    sides = torch.maximum(a_xyxy[..., 2:], b_xyxy[..., 2:]) - torch.minimum(
        a_xyxy[..., :2], b_xyxy[..., :2]
    )
    enclosing = sides.prod(-1)
    return inter / (union + EPS) - (enclosing - union) / (enclosing + EPS)


def centerness_of(boxes_xyxy: Tensor, points: Tensor) -> Tensor:
    """(N, A, 4), (A, 2) -> (N, A): 1 where the point is the box's centre, falling to 0 at its
    sides.
    """
    ltrb = xyxy_to_dist_ltrb(boxes_xyxy, points, torch.ones_like(points[:, :1])).clamp(min=EPS)
    across, down = ltrb[..., 0::2], ltrb[..., 1::2]
    return (across.amin(-1) / across.amax(-1) * down.amin(-1) / down.amax(-1)).sqrt()


def tower(width: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(4):
        layers += [
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.GroupNorm(width // 8, width),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers)


class Head(nn.Module):
    """Two towers, shared by the levels; only the scale of the box deltas is each level's own."""

    def __init__(self, width: int, num_classes: int):
        super().__init__()
        self.cls_tower, self.box_tower = tower(width), tower(width)
        self.cls, self.box, self.centerness = (
            nn.Conv2d(width, k, 3, padding=1) for k in (num_classes, 4, 1)
        )
        self.scales = nn.Parameter(torch.ones(len(LEVELS)))
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.ndim == 4:
                nn.init.normal_(parameter, std=0.01)
        nn.init.constant_(self.cls.bias, -math.log(99))  # type: ignore[arg-type]  # a score of 0.01 to begin with

    def forward(self, feats: Sequence[Tensor]) -> dict[str, list[Tensor]]:
        cls = [self.cls(self.cls_tower(feat)) for feat in feats]
        boxes = [self.box_tower(feat) for feat in feats]
        deltas = [self.box(feat) * scale for feat, scale in zip(boxes, self.scales, strict=True)]
        return {"cls": cls, "box": deltas, "centerness": [self.centerness(feat) for feat in boxes]}


class ATSS(nn.Module):
    """The detector. Its taps are p3 to p7, and the modules of the backbone: body.layer1 to
    body.layer4.

    `preds`: {"cls": class logits (N, K, H, W), "box": deltas (N, 4, H, W), "centerness": logits (N,
    1, H, W)}, each a list of five levels.
    backbone_weights: a file of torchvision's for this backbone; it is not read where `weights` are
    given.
    weights: a best.pt of this detector. width: channels of FPN and head.
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
        width: int = 256,
        box: float = 2.0,
        cls: float = 1.0,
        centerness: float = 1.0,
    ):
        super().__init__()
        if width < 8 or width % 8:
            raise UserError(
                f"width is {width}; GroupNorm takes groups of 8 channels, so use a multiple of 8"
            )
        self.names, self.gains = list(names), {"box": box, "cls": cls, "centerness": centerness}
        self.card: dict[str, Any] = {"detector": "ATSS", "backbone": backbone, "width": width}
        self.body = getattr(resnet, backbone)()
        channels = self.body.fc.in_features
        del self.body.avgpool, self.body.fc
        self.fpn = FeaturePyramidNetwork(
            [channels // 4, channels // 2, channels], width, LastLevelP6P7(width, width)
        )
        for level in LEVELS:
            self.add_module(level, nn.Identity())
        self.head = Head(width, len(self.names))
        # what torchvision's weights were trained with; not in the state_dict, as nothing learns it
        for name, values in {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}.items():
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)
        if weights:
            fill(self, trained_tensors(weights, self.names, self.card), weights)
        elif backbone_weights:
            tensors = {
                key: value
                for key, value in read(backbone_weights).items()
                if not key.startswith("fc.")
            }
            fill(self.body, tensors, backbone_weights)

    def forward(self, images: Tensor) -> dict[str, list[Tensor]]:
        """(N, 3, H, W) RGB 0..1, sides divisible by 32 -> preds."""
        return self.head(self._pyramid(images))

    def features(self, images: Tensor) -> None:
        """Runs backbone and FPN, for the hooks on them."""
        self._pyramid(images)

    def _pyramid(self, images: Tensor) -> list[Tensor]:
        x, outputs = (images - self.mean) / self.std, {}
        for (
            name,
            layer,
        ) in self.body.named_children():  # conv1, bn1, relu, maxpool, layer1 to layer4
            x = outputs[name] = layer(x)
        feats = self.fpn(OrderedDict((f"p{i + 1}", outputs[f"layer{i}"]) for i in (2, 3, 4)))
        return [self.get_submodule(level)(feats[level]) for level in LEVELS]

    def loss(self, preds: Mapping[str, Sequence[Tensor]], targets: Targets) -> Losses:
        """-> {"box", "cls", "centerness"}, each times its gain. GIoU is weighted by the true
        centerness, and divided by its sum; the other two by the number of positives; both sums are
        taken as 1 at least.
        """
        points, sides, counts = anchors(preds["cls"])
        logits, deltas, centred = (
            flat(preds[key]) for key in ("cls", "box", "centerness")
        )  # (N, A, K), 4, 1
        assigned = assign(points, sides, counts, targets)
        positive = (assigned.labels >= 0).float()  # (N, A)
        total = positive.sum().clamp(min=1)

        # scatter, as one_hot would look at its input's values and so wait for the device
        true = torch.zeros_like(logits).scatter_(
            2, assigned.labels.clamp(min=0).unsqueeze(2), positive.unsqueeze(2)
        )
        cls = sigmoid_focal_loss(logits, true, alpha=0.25, gamma=2.0).sum() / total
        true_centred = centerness_of(assigned.boxes_xyxy, points)
        bce = F.binary_cross_entropy_with_logits(
            centred.squeeze(2), true_centred, positive, reduction="sum"
        )
        weight = true_centred * positive
        distance = 1 - giou(deltas_to_xyxy(deltas, points, sides), assigned.boxes_xyxy)
        box = (distance * weight).sum() / weight.sum().clamp(min=1)
        losses = {"box": box, "cls": cls, "centerness": bce / total}
        return {name: self.gains[name] * loss for name, loss in losses.items()}

    @torch.no_grad()
    def decode(
        self,
        preds: Mapping[str, Sequence[Tensor]],
        score: float = 0.001,
        iou: float = 0.7,
        max_det: int = 300,
    ) -> list[Detections]:
        """Boxes whose class score times centerness is above `score`, after class-wise NMS, best
        first.
        """
        points, sides, _ = anchors(preds["cls"])
        logits, deltas, centred = (flat(preds[key]) for key in ("cls", "box", "centerness"))
        boxes_xyxy, scores = (
            deltas_to_xyxy(deltas, points, sides),
            logits.sigmoid() * centred.sigmoid(),
        )
        return [select(b, s, score, iou, max_det) for b, s in zip(boxes_xyxy, scores, strict=True)]


def anchors(maps: Sequence[Tensor]) -> tuple[Tensor, Tensor, list[int]]:
    """Maps of the five levels -> centres (A, 2) and sides (A, 1) of the anchors in pixels, anchors
    on each level.
    """
    points, stride_of = anchor_points(
        [m.shape[2:] for m in maps], [*LEVELS.values()], maps[0].device
    )
    return points, SIDE * stride_of, [m.shape[2] * m.shape[3] for m in maps]


def flat(maps: Sequence[Tensor]) -> Tensor:
    """(N, C, H, W) of each level -> (N, A, C) float32."""
    return torch.cat([m.flatten(2) for m in maps], 2).transpose(1, 2).float()
