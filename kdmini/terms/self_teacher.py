"""FRSKD: a small network refines the student's own maps and teaches the student.

There is no teacher network.

Source: Ji et al., "Refine Myself by Teaching Myself: Feature Refinement via
Self-Knowledge Distillation", CVPR 2021, section 3; the pyramid is the BiFPN of Tan et
al., "EfficientDet", CVPR 2020, equations 1 and 2.
Legend: N images (n one of them), C channels, H W cells, K classes, l a tap (1, 2, 3 at
strides 8, 16, 32), S the student's own maps, s its class logits; X, Y and T the self-teacher's
maps, `width` wide, t the class logits of its head; att(F) is the attention map of
kdmini/distill/attention.py.

    X_l = Conv1x1(S_l)
    Y_2 = Fuse(X_2, up(X_3))
    T_1 = Fuse(X_1, up(Y_2))
    T_2 = Fuse(X_2, Y_2, down(T_1))
    T_3 = Fuse(X_3, down(T_2))
    L   = L_task(Head(T)) + attention * sum_l mean_n ||att(S_l) - att(T_l)||_2
                          + soft * L_logits(s, t)

L_logits is that of terms/logits.py; Head is a fresh head of the student's kind, L_task
the student's own loss. T and t are targets, so the last two parts stop at them: else
both networks would agree on something easy. L_task does not stop at S: it trains the
student's backbone too, as in its authors' code; `attention: 0` with `soft: 0` leaves
that alone.

Simplified: three levels; one 1x1 convolution for each map, where the authors have a
second one on the way down; one width, where theirs is a multiple of the student's;
attention without square, so that its size does not depend on H and W; soft labels of
one binary problem a class, weighted by the self-teacher's confidence, as YOLO's head
scores classes.

For models that offer `make_head(channels)` and `class_maps(preds)`, as YOLO11 does. Nothing
of this is in best.pt.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdmini.bounds import Gain, Range, Temperature
from kdmini.contracts import Targets, UserError, View
from kdmini.distill.align import Shapes
from kdmini.distill.attention import AttentionTransfer
from kdmini.terms.logits import LogitDistillation
from kdmini.terms.pairs import Reduction, class_levels

LEVELS = 3  # of the pyramid, at strides 8, 16 and 32
EPS = 1e-4  # EfficientDet's, in the shares of what is fused
BN_EPS = 1e-3  # this and the next are YOLO11's
BN_MOMENTUM = 0.03


class SelfTeacher(nn.Module):
    """A pyramid and a head on the student's maps: their task loss and two imitations.

    width: channels of the self-teacher, fewer than those of the widest tap.
    attention: weight of the imitation of its attention maps, beside 1 of its task loss.
    soft: weight of the imitation of its class scores.
    temperature: tau, which both networks' class logits are divided by.
    reduction: of the imitation of class scores; see LogitDistillation.
    box, cls, dfl: gain of that loss in its task loss; the student's by default.
    """

    uses = frozenset({"feats", "classes"})
    needs_teacher = False

    def __init__(  # noqa: PLR0913 - the schema of a section
        self,
        shapes: Shapes,
        student: Any,
        width: Annotated[int, Range(1, 4096)] = 64,
        attention: Gain = 1.0,
        soft: Gain = 0.1,
        temperature: Temperature = 4.0,
        reduction: Reduction = "batch",
        box: Gain | None = None,
        cls: Gain | None = None,
        dfl: Gain | None = None,
    ):
        super().__init__()
        self.channels = {tap: channels for tap, (channels, *_) in shapes.items()}
        if len(shapes) != LEVELS:
            raise UserError(
                "distill.taps: a self-teacher needs three, strides 8, 16 and 32; "
                f"these are {len(shapes)}"
            )
        widest = max(self.channels.values())
        if width >= widest:
            raise UserError(
                f"distill: width is {width}; use 1 to {widest - 1}, narrower than the widest tap"
            )
        for method in ("make_head(channels)", "class_maps(preds)"):
            if not hasattr(student, method.partition("(")[0]):
                raise UserError(
                    f"distill: a self-teacher needs a student with a method {method}; "
                    f"{type(student).__name__} has none"
                )

        self.reduction = reduction
        self.attention_weight = attention
        self.soft_weight = soft
        # the method alone: the student, as a submodule, would be optimised and saved twice
        self.task_loss = student.loss
        self.class_maps = student.class_maps
        self.rescale = gain_ratios(student, {"box": box, "cls": cls, "dfl": dfl})
        self.refine = BiFPN(list(self.channels.values()), width)
        self.head = student.make_head([width] * LEVELS)
        self.attention = AttentionTransfer("sample")
        self.logits = LogitDistillation("sigmoid", temperature, reduction=reduction)

    def forward(self, student: View, teacher: View | None, targets: Targets) -> Tensor:
        self.check(student)
        refined = self.refine([student.feats[tap] for tap in self.channels])
        preds = self.head(refined)
        feats = dict(zip(self.channels, refined, strict=True))
        own = View(feats, preds, student.images, self.class_maps(preds))
        return self.task(preds, targets) + self.imitation(student, own, targets)

    def task(self, preds: list[Tensor], targets: Targets) -> Tensor:
        """The student's loss for the self-teacher's preds, its gains perhaps replaced."""
        losses = self.task_loss(preds, targets)
        parts = [self.rescale.get(name, 1.0) * loss for name, loss in losses.items()]
        return torch.stack(parts).sum()

    def imitation(self, student: View, own: View, targets: Targets) -> Tensor:
        """What the student is taught, by the self-teacher's view `own`.

        No gradient reaches it: the logits' term detaches preds itself.
        """
        feats = {tap: feat.detach() for tap, feat in own.feats.items()}
        fixed = own._replace(feats=feats)
        attention = self.attention_weight * self.attention(student, fixed, targets)
        soft = self.soft_weight * self.logits(student, fixed, targets)
        return attention + soft

    def check(self, student: View) -> None:
        """Raises UserError unless the taps are the student's own maps, a class map each."""
        levels = class_levels(student)
        for (tap, channels), level in zip(self.channels.items(), levels, strict=True):
            _, tapped, height, width = student.feats[tap].shape
            if tapped != channels:
                raise UserError(
                    f"distill.align: {tap} comes with {tapped} channels and has {channels}; "
                    "use `none`"
                )
            level_height, level_width = level.shape[2:]
            if (height, width) != (level_height, level_width):
                raise UserError(
                    f"distill.taps: {tap} is {height}x{width} and the class map "
                    f"{level_height}x{level_width}; name taps of strides 8, 16 and 32, "
                    "in this order"
                )


def gain_ratios(student: Any, gains: Mapping[str, float | None]) -> dict[str, float]:
    """{loss: its gain / the student's gain} for the gains that are given.

    Raises UserError for a loss that the student does not have, or has at gain 0.
    """
    student_gains = getattr(student, "gains", {})
    ratios = {}
    for name, gain in gains.items():
        if gain is None:
            continue
        if not student_gains.get(name):
            raise UserError(
                f"distill: {name} is {gain}, and {type(student).__name__} has no gain {name} "
                "above 0 that it could replace; leave it out"
            )
        ratios[name] = gain / student_gains[name]
    return ratios


class BiFPN(nn.Module):
    """Three maps (N, C, H, W) -> the same sizes, `width` channels.

    H and W are halved from one map to the next. Both ends of the first, downward way
    are left out, as in the paper.
    """

    def __init__(self, channels: Sequence[int], width: int):
        super().__init__()
        self.lateral = nn.ModuleList(conv_block(c, width) for c in channels)
        self.p2 = Fuse(2, width)
        self.t1 = Fuse(2, width)
        self.t2 = Fuse(3, width)
        self.t3 = Fuse(2, width)

    def forward(self, feats: Sequence[Tensor]) -> list[Tensor]:
        pairs = zip(self.lateral, feats, strict=True)
        x1, x2, x3 = (lateral(feat) for lateral, feat in pairs)
        y2 = self.p2(x2, up(x3))
        t1 = self.t1(x1, up(y2))
        t2 = self.t2(x2, y2, down(t1))
        t3 = self.t3(x3, down(t2))
        return [t1, t2, t3]


class Fuse(nn.Module):
    """Maps of one shape (N, C, H, W), summed by learnt shares and convolved.

    A depthwise convolution, then a pointwise one.
    """

    def __init__(self, inputs: int, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(inputs))
        self.conv = nn.Sequential(
            conv_block(channels, channels, kernel=3, groups=channels),
            conv_block(channels, channels),
        )

    def forward(self, *maps: Tensor) -> Tensor:
        positive = self.weight.relu()
        shares = positive / (positive.sum() + EPS)
        mixed = sum(share * x for share, x in zip(shares, maps, strict=True))
        return self.conv(mixed)


def conv_block(c_in: int, c_out: int, kernel: int = 1, groups: int = 1) -> nn.Module:
    """Convolution, BatchNorm, SiLU; the size of the map stays."""
    conv = nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, groups=groups, bias=False)
    bn = nn.BatchNorm2d(c_out, eps=BN_EPS, momentum=BN_MOMENTUM)
    return nn.Sequential(OrderedDict(conv=conv, bn=bn, act=nn.SiLU()))


def up(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, C, 2H, 2W): the nearest cell."""
    # autocast would make float32 of the map, and of what is added to it
    with torch.autocast(x.device.type, enabled=False):
        return F.interpolate(x, scale_factor=2.0)


def down(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, C, H/2, W/2): the largest of 3x3 around every second cell."""
    return F.max_pool2d(x, 3, stride=2, padding=1)
