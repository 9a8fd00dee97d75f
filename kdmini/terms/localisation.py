"""Localisation distillation (LD): box sides are distributed as the teacher's are.

Source: Zheng et al., "Localization Distillation for Dense Object Detection", CVPR 2022.
Legend: N images, A cells of all levels (a one of them), R bins (`reg_max`), K classes
(k one of them), e one of the four sides, s_ae and t_ae its R logits, tau the
temperature.

    w_a = max_k sigmoid(class logit k of the teacher)
    L   = tau^2 * sum_a w_a * mean_e KL(softmax(t_ae / tau) || softmax(s_ae / tau))
                / sum_a w_a

Simplified: the teacher's confidence weighs the cells, where the paper takes the
assigned cells and a "valuable region" around them. Only cells near an object can tell
where its sides are.
Reads YOLO's layout: `preds` is a list of maps (N, 4R + K, H, W), the R logits of each
side in a row, then classes.
"""

from torch import Tensor, nn

from kdmini.contracts import Targets, UserError, View
from kdmini.terms.pairs import check_temperature, confidence, softmax_kl, split, weighted_mean


class LocalisationDistillation(nn.Module):
    """The divergence of the box sides, a mean weighted by the teacher's confidence.

    temperature: tau, which both softmaxes divide by.
    reg_max: R, the bins of a side in the preds of both networks.
    """

    uses = frozenset({"preds"})

    def __init__(self, temperature: float = 10.0, reg_max: int = 16):
        super().__init__()
        self.temperature = check_temperature(temperature)
        if reg_max < 2:
            raise UserError(
                f"distill: reg_max is {reg_max}; a distribution of distances has at least 2 bins"
            )
        self.reg_max = reg_max

    def forward(self, student: View, teacher: View, targets: Targets) -> Tensor:
        shape = (4, self.reg_max)
        s = split(student.preds, self.reg_max).sides.unflatten(1, shape)  # (N, 4, R, A)
        logits = split(teacher.preds, self.reg_max)
        t = logits.sides.detach().unflatten(1, shape)

        divergence = softmax_kl(s, t, 2, self.temperature).mean(1)  # (N, A)
        return weighted_mean(divergence, confidence(logits.classes.detach()))
