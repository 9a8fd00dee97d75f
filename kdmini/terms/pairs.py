"""What the terms share: pairs of maps, divergences, and checks of their settings."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdmini.contracts import UserError, View

EPS = 1e-12  # far below the scores of an untrained head; a teacher that sees nothing at all gives 0, not NaN


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


def aligned(student: View, teacher: View) -> dict[str, tuple[Tensor, Tensor]]:
    """tap -> both maps (N, C, H, W), in float32 at least, the teacher's without gradient.

    Raises UserError where there are none, or where their channels differ.
    """
    if not teacher.feats:
        raise UserError("distill.taps: a term that compares feature maps has none; name some")
    pairs = {
        tap: (wide(student.feats[tap]), wide(feat).detach()) for tap, feat in teacher.feats.items()
    }
    for tap, (s, t) in pairs.items():
        if s.shape != t.shape:
            raise UserError(
                f"distill.align: {tap} has {s.shape[1]} channels, the teacher {t.shape[1]}; use `all`"
            )
    return pairs


def wide(x: Tensor) -> Tensor:
    """Half precision to float32: squares overflow float16 at 256."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
