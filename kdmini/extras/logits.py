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
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdmini.contracts import Targets, UserError, View
from kdmini.extras.spatial import wide

EPS = 1e-12  # far below the scores of an untrained head; a teacher that sees nothing at all gives 0, not NaN


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


def softmax_kl(student: Tensor, teacher: Tensor, dim: int, temperature: float) -> Tensor:
    """T^2 * KL(softmax(teacher / T) || softmax(student / T)) along `dim`, which goes."""
    log_q, log_p = ((x / temperature).log_softmax(dim) for x in (student, teacher))
    return temperature**2 * (log_p.exp() * (log_p - log_q)).sum(dim)


def sigmoid_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 * KL of the two Bernoulli distributions, logit by logit."""
    s, t = student / temperature, teacher / temperature
    yes = t.sigmoid() * (F.logsigmoid(t) - F.logsigmoid(s))
    no = (-t).sigmoid() * (F.logsigmoid(-t) - F.logsigmoid(-s))
    return temperature**2 * (yes + no)


def confidence(logits: Tensor) -> Tensor:
    """Class logits (N, K, ...) -> the best score of each cell, (N, ...) in 0..1."""
    return logits.sigmoid().amax(1)


def weighted_mean(values: Tensor, weight: Tensor) -> Tensor:
    return (values * weight).sum() / weight.sum().clamp(min=EPS)


def split(preds: Any, reg_max: int) -> tuple[Tensor, Tensor]:
    """YOLO's raw maps (N, 4R + K, H, W) -> box side logits (N, 4R, A), class logits (N, K, A), in
    float32 at least.
    """
    flat = torch.cat([wide(pred).flatten(2) for pred in check_preds(preds, reg_max)], 2)
    return flat[:, : 4 * reg_max], flat[:, 4 * reg_max :]


def check_preds(preds: Any, reg_max: int) -> Sequence[Tensor]:
    """Raises UserError for what is not a list of maps with more than 4 * reg_max channels."""
    if isinstance(preds, Mapping) and reg_max == 0:
        preds = preds.get("cls")
    if not (
        isinstance(preds, list | tuple)
        and all(isinstance(p, Tensor) and p.ndim == 4 for p in preds)
    ):
        raise UserError(
            f"distill: a term reads preds as a list of maps (N, 4R + K, H, W), and with `reg_max: 0` a "
            f"mapping, whose `cls` is a list of class maps; this is a {type(preds).__name__}"
        )
    channels = min(p.shape[1] for p in preds)
    if not 0 <= 4 * reg_max < channels:
        raise UserError(
            f"distill: reg_max={reg_max} leaves no classes in preds of {channels} channels"
        )
    return preds


def check_temperature(temperature: float) -> float:
    if not 0 < temperature < math.inf:
        raise UserError(f"distill: temperature is {temperature}; it has to be above 0")
    return temperature
