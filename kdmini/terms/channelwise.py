"""Channel-wise distillation (CWD): in each channel, the student spreads its activation as the
teacher does.

Source: Shu et al., "Channel-wise Knowledge Distillation for Dense Prediction", ICCV 2021.
Legend: N images, C channels, H W cells, l a tap, S and T aligned student and teacher.

    P(F_nc) = softmax over the H * W cells of F_nc / temperature
    L       = sum_l mean over N, C of temperature^2 * KL(P(T_nc) || P(S_nc))

Simplified: nothing of the loss; `align` brings the channels together, where the paper has a bare
1x1 convolution."""

import torch
from torch import Tensor, nn

from kdmini.contracts import Targets, View
from kdmini.terms.pairs import aligned, check_temperature, softmax_kl


class ChannelWise(nn.Module):
    uses = frozenset({"feats"})

    def __init__(self, temperature: float = 1.0):
        super().__init__()
        self.temperature = check_temperature(temperature)

    def forward(self, student: View, teacher: View, targets: Targets) -> Tensor:
        pairs = aligned(student, teacher).values()
        each = [
            softmax_kl(s.flatten(2), t.flatten(2), 2, self.temperature).mean() for s, t in pairs
        ]
        return torch.stack(each).sum()
