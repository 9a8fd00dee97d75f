"""Score-weighted imitation: features follow the teacher's where it is sure of something.

Source: the distillation built into the `ultralytics` package (8.4.77 and later), from
its description, not from its code: one loss, the squared distance of the features of
layers 16, 19 and 22, weighted by the teacher's scores. The formula is the same, so the
weights are comparable too: `weight: 6` with `kd_scale: batch` is its default, `dis=6`.
Its projector, which takes the place of `align`, has two convolutions and no norm.
Legend: N images, C channels, H W cells, K classes (k one of them), l a tap, n an image, h w a
cell, c a channel, S and T the aligned maps of student and teacher.

    w_nhw = max_k sigmoid(class logit k of the teacher), of the level as large as l
    L     = sum_l [ sum_nhw w_nhw * mean_c (S_l - T_l)^2 / sum_nhw w_nhw ]

With `reduction: sample` the sums go over h and w, and L is the mean over the images.
Reads the class maps that the teacher offers, `class_maps(preds)`.
"""

import torch
from torch import Tensor, nn

from kdmini.contracts import Targets, UserError, View
from kdmini.terms.pairs import Reduction, aligned, class_levels, confidence, weighted_mean, wide


class ScoreWeighted(nn.Module):
    """The squared difference of the maps, weighted by the teacher's scores.

    reduction: `batch`, one mean over the cells of all images of a batch; `sample`, a mean
        for each image, which accumulation does not change.
    """

    uses = frozenset({"feats", "classes"})

    def __init__(self, reduction: Reduction = "batch"):
        super().__init__()
        self.reduction = reduction

    def forward(self, student: View, teacher: View, targets: Targets) -> Tensor:
        scores = {}  # (H, W) -> (N, H, W)
        for level in class_levels(teacher):
            logits = wide(level).detach()  # (N, K, H, W)
            scores[tuple(logits.shape[2:])] = confidence(logits)

        each = []
        for tap, (s, t) in aligned(student, teacher).items():
            size = tuple(s.shape[2:])
            if size not in scores:
                raise UserError(
                    f"distill.taps: {tap} is {size[0]}x{size[1]}, "
                    "no level of the class maps; leave it out"
                )
            distance = (s - t).square().mean(1)  # (N, H, W)
            each.append(weighted_mean(distance, scores[size], self.reduction))
        return torch.stack(each).sum()
