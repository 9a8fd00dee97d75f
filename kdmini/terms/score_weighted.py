"""Score-weighted imitation: features follow the teacher's where the teacher is sure that there is
something.

Source: the form of the distillation built into the `ultralytics` package (8.4.77 and later), from
its description: one loss, the squared distance of the features of layers 16, 19 and 22, weighted by
the teacher's scores. No code of it was read, so the normalisation is ours and the weights of the
two are not to be compared.
Legend: N images, C channels, H W cells, K classes, R bins (reg_max), l a tap, S and T aligned
student and teacher.

    w_nhw = max_k sigmoid(class logit of the teacher), of the level that is as large as the tap
    L     = sum_l [ sum_nhw w * mean_c (S_l - T_l)^2 / sum_nhw w ]

Reads YOLO's layout: `preds` is a list of maps (N, 4R + K, H, W), box sides first. `reg_max: 0`:
classes alone."""

import torch
from torch import Tensor, nn

from kdmini.contracts import Targets, UserError, View
from kdmini.terms.pairs import aligned, check_preds, confidence, weighted_mean, wide


class ScoreWeighted(nn.Module):
    uses = frozenset({"feats", "preds"})

    def __init__(self, reg_max: int = 16):
        super().__init__()
        self.reg_max = reg_max

    def forward(self, student: View, teacher: View, targets: Targets) -> Tensor:
        maps = [
            wide(pred[:, 4 * self.reg_max :]).detach()
            for pred in check_preds(teacher.preds, self.reg_max)
        ]
        scores = {
            tuple(logits.shape[2:]): confidence(logits) for logits in maps
        }  # (H, W) -> (N, H, W)
        each = []
        for tap, (s, t) in aligned(student, teacher).items():
            size = tuple(s.shape[2:])
            if size not in scores:
                raise UserError(
                    f"distill.taps: {tap} is {size[0]}x{size[1]}, no level of the preds; leave it out"
                )
            each.append(weighted_mean((s - t).square().mean(1), scores[size]))
        return torch.stack(each).sum()
