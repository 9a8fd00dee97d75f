"""What the terms share: pairs of maps, the layout of preds, divergences, means.

A term receives what two networks make of the same images, of any dtype, the teacher's
perhaps with a graph. The functions here turn that into tensors it can subtract: float32
at least, checked, the teacher's detached where they come as a pair.

Legend: N images, C channels, H W cells of a map, A cells of all levels, K classes, R
bins of a box side (`reg_max`), tau the temperature.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kdmini.contracts import UserError, View

# far below the scores of an untrained head; a teacher that sees nothing gives 0, no NaN
EPS = 1e-12

# What weights or statistics of a term are taken over: all images that a process renders for a
# step, or each image, and then the mean of the images. Only the second is the same however an
# update is split into batches.
Reduction = Literal["batch", "sample"]

# --- feature maps


def wide(x: Tensor) -> Tensor:
    """Half precision to float32: squares overflow float16 at 256."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def require_maps(teacher: View) -> None:
    """Raises UserError where no tap is named."""
    if not teacher.feats:
        raise UserError("distill.taps: a term that compares feature maps has none; name some")


def aligned(student: View, teacher: View) -> dict[str, tuple[Tensor, Tensor]]:
    """tap -> (student's map, teacher's map), both (N, C, H, W) in float32 at least.

    The teacher's comes without gradient. Raises UserError where there are no maps, or
    where their channels differ.
    """
    require_maps(teacher)
    pairs = {}
    for tap, feat in teacher.feats.items():
        pairs[tap] = (wide(student.feats[tap]), wide(feat).detach())

    for tap, (s, t) in pairs.items():
        if s.shape != t.shape:
            raise UserError(
                f"distill.align: {tap} has {s.shape[1]} channels, "
                f"the teacher {t.shape[1]}; use `all`"
            )
    return pairs


# --- class logits, whatever the layout of preds


def class_logits(view: View) -> Tensor:
    """The model's class maps, all levels in a row, (N, K, A), in float32 at least."""
    return torch.cat([wide(level).flatten(2) for level in class_levels(view)], 2)


def class_levels(view: View) -> Sequence[Tensor]:
    """(N, K, H, W) of each level. Raises UserError where there are none."""
    if not view.classes:
        raise UserError("distill: a term that reads class maps has none; see View in contracts.py")
    return view.classes


# --- preds in YOLO's layout


class Logits(NamedTuple):
    """The raw outputs of a detector, all levels in a row."""

    sides: Tensor  # (N, 4R, A), the R logits of each side in a row
    classes: Tensor  # (N, K, A)


def split(preds: Any, reg_max: int) -> Logits:
    """Maps (N, 4R + K, H, W), one a level -> their logits, in float32 at least."""
    levels = [wide(pred).flatten(2) for pred in check_preds(preds, reg_max)]
    flat = torch.cat(levels, 2)  # (N, 4R + K, A)
    return Logits(flat[:, : 4 * reg_max], flat[:, 4 * reg_max :])


def check_preds(preds: Any, reg_max: int) -> Sequence[Tensor]:
    """Raises UserError for all but a list of maps (N, 4R + K, H, W) with a class at least."""
    is_list = isinstance(preds, list | tuple)
    if not is_list or not all(isinstance(x, Tensor) and x.ndim == 4 for x in preds):
        raise UserError(
            "distill: a term reads preds as a list of maps (N, 4R + K, H, W); this is a "
            f"{type(preds).__name__}"
        )

    channels = min(x.shape[1] for x in preds)
    if not 0 <= 4 * reg_max < channels:
        raise UserError(
            f"distill: reg_max={reg_max} leaves no classes in preds of {channels} channels"
        )
    return preds


# --- divergences and means


def softmax_kl(student: Tensor, teacher: Tensor, dim: int, temperature: float) -> Tensor:
    """tau^2 * KL(softmax(teacher / tau) || softmax(student / tau)) over `dim`, which goes."""
    log_q = (student / temperature).log_softmax(dim)
    log_p = (teacher / temperature).log_softmax(dim)
    return temperature**2 * (log_p.exp() * (log_p - log_q)).sum(dim)


def sigmoid_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """tau^2 * KL of two Bernoulli distributions, logit by logit: the shape stays."""
    s = student / temperature
    t = teacher / temperature
    yes = t.sigmoid() * (F.logsigmoid(t) - F.logsigmoid(s))
    no = (-t).sigmoid() * (F.logsigmoid(-t) - F.logsigmoid(-s))
    return temperature**2 * (yes + no)


def confidence(logits: Tensor) -> Tensor:
    """Class logits (N, K, ...) -> the best score of each cell, (N, ...) in 0..1."""
    return logits.sigmoid().amax(1)


def weighted_mean(values: Tensor, weight: Tensor, reduction: Reduction) -> Tensor:
    """sum(weight * values) / sum(weight), both (N, ...) -> scalar; 0 without any weight."""
    if reduction == "batch":
        return (values * weight).sum() / weight.sum().clamp(min=EPS)
    total = (values * weight).flatten(1).sum(1)  # (N,)
    whole = weight.flatten(1).sum(1)
    return (total / whole.clamp(min=EPS)).mean()
