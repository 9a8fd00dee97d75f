"""Localisation distillation (LD): box sides are distributed as the teacher's are.

Source: Zheng et al., "Localization Distillation for Dense Object Detection", CVPR 2022.
Legend: N images, A cells of all levels (a one of them), R bins (`reg_max`), K classes
(k one of them), e one of the four sides, s_ae and t_ae its R logits, tau the
temperature.

    w_a = max_k sigmoid(class logit k of the teacher)
    L   = tau^2 * sum_a w_a * mean_e KL(softmax(t_ae / tau) || softmax(s_ae / tau))
                / sum_a w_a

Both sums go over all images and cells; with `reduction: sample` over the cells of an
image, and L is the mean over the images.
Simplified: the teacher's confidence weighs the cells, where the paper takes the
assigned cells and a "valuable region" around them. Only cells near an object can tell
where its sides are.
Reads YOLO's layout: `preds` is a list of maps (N, 4R + K, H, W), the R logits of each
side in a row, then classes.
"""

from typing import Annotated

from torch import Tensor, nn

from kdmini.bounds import Range, Temperature
from kdmini.contracts import Targets, View
from kdmini.terms.pairs import (
    Reduction,
    confidence,
    softmax_kl,
    split,
    weighted_mean,
)


class LocalisationDistillation(nn.Module):
    """The divergence of the box sides, a mean weighted by the teacher's confidence.

    temperature: tau, which both softmaxes divide by.
    reg_max: R, the bins of a side in the preds of both networks.
    reduction: `batch`, one mean over the cells of all images of a batch; `sample`, a mean
        for each image, which accumulation does not change.
    """

    uses = frozenset({"preds"})

    def __init__(
        self,
        temperature: Temperature = 10.0,
        reg_max: Annotated[int, Range(2, 256)] = 16,
        reduction: Reduction = "batch",
    ):
        super().__init__()
        self.temperature = temperature
        self.reg_max = reg_max
        self.reduction = reduction

    def forward(self, student: View, teacher: View, targets: Targets) -> Tensor:
        shape = (4, self.reg_max)
        s = split(student.preds, self.reg_max).sides.unflatten(1, shape)  # (N, 4, R, A)
        logits = split(teacher.preds, self.reg_max)
        t = logits.sides.detach().unflatten(1, shape)

        divergence = softmax_kl(s, t, 2, self.temperature).mean(1)  # (N, A)
        weight = confidence(logits.classes.detach())
        return weighted_mean(divergence, weight, self.reduction)
