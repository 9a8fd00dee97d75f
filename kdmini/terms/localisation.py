"""Localisation distillation (LD): the student's distributions of the box sides follow the
teacher's.

Source: Zheng et al., "Localization Distillation for Dense Object Detection", CVPR 2022.
Legend: N images, A cells of all levels, R bins (reg_max), K classes, e one of the four sides, s and
t its R logits.

    w_a = max_k sigmoid(class logit of the teacher)
    L   = T^2 * sum_a w_a * mean_e KL(softmax(t_ae / T) || softmax(s_ae / T)) / sum_a w_a

Simplified: the teacher's confidence weighs the cells, where the paper takes the assigned cells and
a "valuable region" around them. Only cells near an object can tell where its sides are.
Reads YOLO's layout: `preds` is a list of maps (N, 4R + K, H, W), the R logits of each side in a
row, then classes."""

from torch import Tensor, nn

from kdmini.contracts import Targets, UserError, View
from kdmini.terms.pairs import check_temperature, confidence, softmax_kl, split, weighted_mean


class LocalisationDistillation(nn.Module):
    uses = frozenset({"preds"})

    def __init__(self, temperature: float = 10.0, reg_max: int = 16):
        super().__init__()
        self.temperature, self.reg_max = check_temperature(temperature), reg_max
        if reg_max < 2:
            raise UserError(
                f"distill: reg_max is {reg_max}; a distribution of distances has at least 2 bins"
            )

    def forward(self, student: View, teacher: View, targets: Targets) -> Tensor:
        s, _ = split(student.preds, self.reg_max)
        t, classes = (x.detach() for x in split(teacher.preds, self.reg_max))
        s, t = (x.unflatten(1, (4, self.reg_max)) for x in (s, t))  # (N, 4, R, A)
        return weighted_mean(softmax_kl(s, t, 2, self.temperature).mean(1), confidence(classes))
