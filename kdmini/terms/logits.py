"""Logit distillation: the student's class scores follow the teacher's, both softened by a
temperature.

Sources: Hinton et al., "Distilling the Knowledge in a Neural Network", 2015, section 2, for the
softmax and T^2; Yang et al., "Bridging Cross-task Protocol Inconsistency for Distillation in Dense
Object Detection", ICCV 2023, for one binary problem a class, as YOLO's head has it.
Legend: N images, A cells of all levels, K classes, R bins (reg_max), H W cells of a level, s and t
class logits.

    w_a = max_k sigmoid(t_ak)^gamma
    L   = T^2 * sum_a w_a * KL(P(t_a / T) || P(s_a / T)) / sum_a w_a         sums over all images and cells
    P   = softmax over the classes, or one sigmoid a class, and KL then their sum

Simplified: w is the teacher's confidence, where Yang et al. weigh by the difference of the scores.
`form: softmax` with `gamma: 0` is the loss of the research notes: `batchmean` over rows of classes.
Reads YOLO's layout: `preds` is a list of maps (N, 4R + K, H, W), box sides first. `reg_max: 0`:
classes alone, or a mapping whose `cls` is the list of class maps, as of ATSS."""

import math
from typing import Literal

from torch import Tensor, nn

from kdmini.contracts import Targets, UserError, View
from kdmini.terms.pairs import (
    check_temperature,
    confidence,
    sigmoid_kl,
    softmax_kl,
    split,
    weighted_mean,
)


class LogitDistillation(nn.Module):
    """form: `sigmoid` for heads that score each class by itself, `softmax` for one distribution
    over the classes.
    """

    uses = frozenset({"preds"})

    def __init__(
        self,
        form: Literal["sigmoid", "softmax"] = "sigmoid",
        temperature: float = 4.0,
        gamma: float = 1.0,
        reg_max: int = 16,
    ):
        super().__init__()
        self.form, self.temperature = form, check_temperature(temperature)
        if not 0 <= gamma < math.inf:
            raise UserError(
                f"distill: gamma is {gamma}, the power of the teacher's confidence; use 0 or more"
            )
        self.gamma, self.reg_max = gamma, reg_max

    def forward(self, student: View, teacher: View, targets: Targets) -> Tensor:
        _, s = split(student.preds, self.reg_max)
        _, t = split(teacher.preds, self.reg_max)
        t = t.detach()  # (N, K, A)
        if self.form == "softmax":
            divergence = softmax_kl(s, t, 1, self.temperature)
        else:
            divergence = sigmoid_kl(s, t, self.temperature).sum(1)
        return weighted_mean(divergence, confidence(t) ** self.gamma)
