"""FRSKD: the student is taught by a small network that refines the student's own features. There is
no teacher network.

Source: Ji et al., "Refine Myself by Teaching Myself: Feature Refinement via Self-Knowledge
Distillation", CVPR 2021, section 3; the pyramid is the BiFPN of Tan et al., "EfficientDet", CVPR
2020, equations 1 and 2.
Legend: N images, C channels, H W cells, K classes, R bins (reg_max), l a tap (1, 2, 3 at strides 8,
16, 32), F the student's map, s its class logits; L, P and T the self-teacher's maps, `width` wide,
t the class logits of its head.

    L_l = Conv1x1(F_l)
    P_2 = Fuse(L_2, up(L_3))
    T_1 = Fuse(L_1, up(P_2)),  T_2 = Fuse(L_2, P_2, down(T_1)),  T_3 = Fuse(L_3, down(T_2))
    L   = L_task(Head(T)) + attention * sum_l mean_n ||A(F_l) - A(T_l)||_2 + soft * L_logits(s, t)

A are the maps of distill/attention.py, L_logits is that of terms/logits.py, L_task the detector's
own loss. T and t are targets, so those two terms stop at them: else both networks would agree on
something easy. L_task does not stop at
F: it trains the student's backbone too, as in its authors' code; `attention: 0` with `soft: 0`
leaves that alone.
Simplified: three levels; one 1x1 convolution for each map, where the authors have a second one on
the way down; one width, where theirs is a multiple of the student's; attention without square, so
that its size does not depend on H and W; soft labels of one binary problem a class, weighted by the
self-teacher's confidence, as YOLO's head scores classes.
For YOLO11: head and task loss are its Detect and detection_loss. Nothing of this is in best.pt.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdmini.contracts import Targets, UserError, View
from kdmini.detection.yolo11.loss import detection_loss
from kdmini.detection.yolo11.model import REG_MAX, STRIDES, Conv, Detect
from kdmini.distill.align import Shapes
from kdmini.distill.attention import AttentionTransfer
from kdmini.terms.logits import LogitDistillation
from kdmini.terms.pairs import check_preds

EPS = 1e-4  # EfficientDet's, in the shares of what is fused


class SelfTeacher(nn.Module):
    """width: channels of the self-teacher, fewer than those of the widest tap. attention, soft:
    weights beside its task
    loss. temperature: of the soft labels. box, cls, dfl: gains of its task loss, by default those
    of YOLO11."""

    uses = frozenset({"feats", "preds"})
    needs_teacher = False

    def __init__(
        self,
        shapes: Shapes,
        names: list[str],
        width: int = 64,
        attention: float = 1.0,
        soft: float = 0.1,
        temperature: float = 4.0,
        box: float = 7.5,
        cls: float = 0.5,
        dfl: float = 1.5,
    ):
        super().__init__()
        self.channels = {tap: channels for tap, (channels, *_) in shapes.items()}
        if len(shapes) != len(STRIDES):
            raise UserError(
                f"distill.taps: a self-teacher needs three, strides 8, 16 and 32; these are {len(shapes)}"
            )
        if not 0 < width < max(self.channels.values()):
            raise UserError(
                f"distill: width is {width}; use 1 to {max(self.channels.values()) - 1}, narrower than the widest tap"
            )
        if min(attention, soft) < 0:
            raise UserError(
                f"distill: attention is {attention} and soft {soft}, weights of losses; use 0 or more"
            )
        self.gains = {"box": box, "cls": cls, "dfl": dfl}
        self.weights = attention, soft
        self.refine = BiFPN([*self.channels.values()], width)
        self.head = Detect([width] * len(STRIDES), len(names))
        self.attention = AttentionTransfer("sample")
        self.logits = LogitDistillation("sigmoid", temperature, reg_max=REG_MAX)

    def forward(self, student: View, teacher: View | None, targets: Targets) -> Tensor:
        self.check(student)
        refined = self.refine([student.feats[tap] for tap in self.channels])
        preds = self.head(refined)
        own = View(dict(zip(self.channels, refined, strict=True)), preds, student.images)
        return self.task(preds, targets) + self.imitation(student, own, targets)

    def task(self, preds: list[Tensor], targets: Targets) -> Tensor:
        losses = detection_loss(preds, targets, STRIDES, REG_MAX)
        return torch.stack([self.gains[name] * loss for name, loss in losses.items()]).sum()

    def imitation(self, student: View, own: View, targets: Targets) -> Tensor:
        """What the student is taught; no gradient reaches `own`, the self-teacher's view."""
        fixed = View({tap: feat.detach() for tap, feat in own.feats.items()}, own.preds, own.images)
        attention, soft = self.weights
        return attention * self.attention(student, fixed, targets) + soft * self.logits(
            student, fixed, targets
        )

    def check(self, student: View) -> None:
        """Raises UserError unless the taps are the student's own maps, each as large as a level of
        its preds.
        """
        for (tap, channels), pred in zip(
            self.channels.items(), check_preds(student.preds, REG_MAX), strict=True
        ):
            (_, found, *size), level = student.feats[tap].shape, pred.shape[2:]
            if found != channels:
                raise UserError(
                    f"distill.align: {tap} comes with {found} channels and has {channels}; use `none`"
                )
            if tuple(size) != tuple(level):
                raise UserError(
                    f"distill.taps: {tap} is {size[0]}x{size[1]} and the level of preds {level[0]}x{level[1]}; "
                    "name taps of strides 8, 16 and 32, in this order"
                )


class BiFPN(nn.Module):
    """Three maps (N, C, H, W) with H, W halved from one to the next -> the same sizes, `width`
    channels.

    Both ends of the first, downward way are left out, as in the paper.
    """

    def __init__(self, channels: Sequence[int], width: int):
        super().__init__()
        self.lateral = nn.ModuleList(Conv(c, width) for c in channels)
        self.p2 = Fuse(2, width)
        self.t1, self.t2, self.t3 = Fuse(2, width), Fuse(3, width), Fuse(2, width)

    def forward(self, feats: Sequence[Tensor]) -> list[Tensor]:
        l1, l2, l3 = (lateral(feat) for lateral, feat in zip(self.lateral, feats, strict=True))
        p2 = self.p2(l2, up(l3))
        t1 = self.t1(l1, up(p2))
        t2 = self.t2(l2, p2, down(t1))
        return [t1, t2, self.t3(l3, down(t2))]


class Fuse(nn.Module):
    """Maps of one shape (N, C, H, W), summed by learnt shares, through a depthwise and a pointwise
    convolution.
    """

    def __init__(self, inputs: int, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(inputs))
        self.conv = nn.Sequential(
            Conv(channels, channels, 3, groups=channels), Conv(channels, channels)
        )

    def forward(self, *maps: Tensor) -> Tensor:
        share = self.weight.relu() / (self.weight.relu().sum() + EPS)
        return self.conv(sum(part * x for part, x in zip(share, maps, strict=True)))


def up(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0)  # the nearest cell


def down(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, 2, 1)
