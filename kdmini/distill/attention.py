"""Attention transfer: the student learns where the teacher looks.

Source: Zagoruyko & Komodakis, "Paying More Attention to Attention", ICLR 2017, section 3.1.
Legend: N images, C channels, H W cells.
"""

from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from kdmini import distributed
from kdmini.bounds import Range
from kdmini.contracts import Targets, View

EPS = 1e-8  # of the research notes; it dims the map of features whose energy is as small


def attention_map(feat: Tensor, p: float = 2.0) -> Tensor:
    """att(F) = sum_c |F_c|^p / (||sum_c |F_c|^p||_2 + eps), of norm 1: where F fires.

    (N, C, H, W) -> (N, H, W).

    In float32 at least: eps is 0 in float16, and the sum over 512 channels overflows it at
    activations of 12.
    """
    feat = feat.to(torch.promote_types(feat.dtype, torch.float32))
    powers = feat.square() if p == 2 else feat.abs().pow(p)
    energy = powers.sum(1)  # (N, H, W)
    # vector_norm has gradient 0 at 0; a hand-written square root would give NaN there
    norm = torch.linalg.vector_norm(energy, dim=(1, 2), keepdim=True)
    return energy / (norm + EPS)


def to_largest(feat: Tensor) -> Tensor:
    """(N, C, H, W) -> the same, divided by the largest activation of each image.

    The norm of the energy is then 1 at least, and eps a part in 10^8 of it. Maps to look at
    and to measure are made of these: in evaluation an untrained network fires so weakly that
    eps would dim its maps to nothing, which is at 1 from any teacher. Zeros stay zeros.
    """
    feat = feat.to(torch.promote_types(feat.dtype, torch.float32))
    largest = feat.abs().amax((1, 2, 3), keepdim=True)
    return feat / largest.clamp(min=torch.finfo(feat.dtype).tiny)


def map_distance(student: Tensor, teacher: Tensor, p: float = 2.0) -> Tensor:
    """L2 distance of the two attention maps, image by image.

    (N, C, H, W), (N, C', H, W) -> (N,), in 0..sqrt(2).
    """
    difference = attention_map(student, p) - attention_map(teacher, p)  # (N, H, W)
    return torch.linalg.vector_norm(difference, dim=(1, 2))


class AttentionTransfer(nn.Module):
    """Sum over the taps of the distance between the attention maps of student and teacher.

    reduction: with D_n the difference of the two maps of image n,
        `notes` is sqrt(sum_n ||D_n||^2) / N: it falls as 1 / sqrt(N), so the weight belongs
            to a batch size; the batch is that of all ranks;
        `sample` is mean_n ||D_n||: the same at every batch size;
        `mean_square` is the mean of D^2 over images and cells: the code of the paper's
            authors.
    p: power of the activations in the attention map.
    """

    uses = frozenset({"feats"})

    def __init__(
        self,
        reduction: Literal["notes", "sample", "mean_square"] = "notes",
        p: Annotated[float, Range(1, 8)] = 2.0,
    ):
        super().__init__()
        self.reduction = reduction
        self.p = p

    def forward(self, student: View, teacher: View, targets: Targets) -> Tensor:
        distances = [self.distance(student.feats[tap], teacher.feats[tap]) for tap in teacher.feats]
        return torch.stack(distances).sum()

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        """(N, C, H, W), (N, C', H, W) -> scalar."""
        if self.reduction == "sample":
            return map_distance(student, teacher, self.p).mean()
        difference = attention_map(student, self.p) - attention_map(teacher, self.p)  # (N, H, W)
        if self.reduction == "mean_square":
            return difference.square().mean()
        if distributed.world() == 1:
            return torch.linalg.vector_norm(difference) / len(difference)
        n = len(difference) * distributed.world()
        square = distributed.total(difference.square().sum())
        # this eps is far below any sum that is not 0; at 0 a bare root has a gradient of NaN
        return (square + EPS**2).sqrt() / n
