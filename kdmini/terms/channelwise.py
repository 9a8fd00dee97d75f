"""Channel-wise distillation (CWD): each channel spreads over the map as the teacher's.

Source: Shu et al., "Channel-wise Knowledge Distillation for Dense Prediction", ICCV
2021.
Legend: N images, C channels, H W cells, l a tap, n an image, c a channel, S and T the
aligned maps of student and teacher, tau the temperature.

    L = sum_l mean over n, c of tau^2 * KL(softmax(T_lnc / tau) || softmax(S_lnc / tau))

The softmax is over the H * W cells of a channel.
Simplified: nothing of the loss; `align` brings the channels together, where the paper
has a bare 1x1 convolution.
"""

import torch
from torch import Tensor, nn

from kdmini.bounds import Temperature
from kdmini.contracts import Targets, View
from kdmini.terms.pairs import aligned, softmax_kl


class ChannelWise(nn.Module):
    """The divergence of the spread of each channel, summed over the taps.

    temperature: tau; the larger, the more the weak cells of a channel count.
    """

    uses = frozenset({"feats"})

    def __init__(self, temperature: Temperature = 1.0):
        super().__init__()
        self.temperature = temperature

    def forward(self, student: View, teacher: View, targets: Targets) -> Tensor:
        each = []
        for s, t in aligned(student, teacher).values():
            divergence = softmax_kl(s.flatten(2), t.flatten(2), 2, self.temperature)  # (N, C)
            each.append(divergence.mean())
        return torch.stack(each).sum()
