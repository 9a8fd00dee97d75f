"""The optimiser's side of a run: the recipe, parameter groups, schedules as pure functions of the
step, EMA.

Legend: a step is one batch; an update is one step of the optimiser, after one or more batches.
"""

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Recipe:
    """How a run is trained. Names and defaults are those of the public YOLO11 recipe with SGD and a
    cosine.

    nbs: nominal batch size, reached by accumulation where batch is smaller; weight decay is stated
    for it.
    lrf: last learning rate as a share of lr0. warmup_steps: the least length of the warm-up.
    amp: false, bf16, fp16, or true for the better of the two on CUDA and float32 on the CPU.
    loss_scale: `batch` multiplies the detection loss by the batch size, `none` leaves the mean.
    clip: largest norm of the gradient. patience: epochs without a better model before stopping.
    val_every: epochs between validations. save_every: steps between checkpoints, beside the one
    after every epoch."""

    epochs: int
    batch: int
    nbs: int = 64
    lr0: float = 0.01
    lrf: float = 0.01
    momentum: float = 0.937
    weight_decay: float = 5e-4
    warmup_epochs: float = 3.0
    warmup_steps: int = 100
    warmup_bias_lr: float = 0.1
    warmup_momentum: float = 0.8
    clip: float = 10.0
    ema_decay: float = 0.9999
    ema_tau: float = 2000.0
    loss_scale: Literal["batch", "none"] = "batch"
    amp: bool | Literal["bf16", "fp16"] = True
    patience: int = 100
    val_every: int = 1
    save_every: int = 0

    @property
    def accumulate(self) -> int:
        """Batches of an update after the warm-up."""
        return max(round(self.nbs / self.batch), 1)

    def warmup(self, steps_per_epoch: int) -> int:
        """Length of the warm-up in steps."""
        return (
            max(round(self.warmup_epochs * steps_per_epoch), self.warmup_steps)
            if self.warmup_epochs > 0
            else 0
        )

    def at(self, step: int, steps_per_epoch: int) -> "Setting":
        """What holds at a step, counted from the start of the run: warm-up, then a cosine that
        falls epoch by epoch.
        """
        turn = math.cos(math.pi * (step // steps_per_epoch) / self.epochs)
        lr = self.lr0 * (self.lrf + (1 - self.lrf) * (1 + turn) / 2)
        length = self.warmup(steps_per_epoch)
        if step > length or not length:
            return Setting(lr, lr, self.momentum, self.accumulate)
        share = step / length
        bias_lr = self.warmup_bias_lr + share * (lr - self.warmup_bias_lr)
        momentum = self.warmup_momentum + share * (self.momentum - self.warmup_momentum)
        return Setting(
            share * lr, bias_lr, momentum, max(round(1 + share * (self.nbs / self.batch - 1)), 1)
        )


@dataclass(frozen=True)
class Setting:
    lr: float
    bias_lr: float
    momentum: float
    accumulate: int


def make_sgd(modules: Iterable[nn.Module], recipe: Recipe) -> torch.optim.SGD:
    """Nesterov SGD over three groups, "weights", "norms" and "biases"; weight decay on the first
    alone.

    Fused, so that a step whose gradient is not finite is skipped on the device. Momentum starts as
    zeros, for torch would leave it uninitialised if that happened to the very first step."""
    groups: dict[str, list[nn.Parameter]] = {"weights": [], "norms": [], "biases": []}
    for module in modules:
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                kind = (
                    "biases"
                    if name.endswith("bias")
                    else "norms"
                    if parameter.ndim <= 1
                    else "weights"
                )
                groups[kind].append(parameter)
    decay = recipe.weight_decay * recipe.batch * recipe.accumulate / recipe.nbs
    settings: list[Any] = [
        {"params": parameters, "name": kind, "weight_decay": decay if kind == "weights" else 0.0}
        for kind, parameters in groups.items()
    ]
    optimizer = torch.optim.SGD(settings, recipe.lr0, recipe.momentum, nesterov=True, fused=True)
    for parameter in (p for group in groups.values() for p in group):
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def apply_setting(optimizer: torch.optim.SGD, setting: Setting) -> None:
    for group in optimizer.param_groups:
        group["lr"] = setting.bias_lr if group["name"] == "biases" else setting.lr
        group["momentum"] = setting.momentum


class EMA:
    """Exponential moving average of a model's weights and BatchNorm statistics, kept as a model,
    `average`.

    decay * (1 - exp(-updates / tau)): young averages forget faster. Build it before taps are
    attached."""

    def __init__(self, model: nn.Module, decay: float, tau: float):
        self.average: Any = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay, self.tau, self.updates = decay, tau, 0

    def state_dict(self) -> dict[str, Any]:
        return {"average": self.average.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.average.load_state_dict(state["average"])
        self.updates = state["updates"]

    @torch.no_grad()
    def update(self, model: Any, skipped: Tensor | None = None) -> None:
        """Moves the average towards the model. skipped: scalar, 1.0 where the update did not
        happen.

        Only the weights are safe from a step that was skipped: where a forward pass has left
        BatchNorm statistics that are not finite, the model gets those of the average back.
        """
        self.updates += 1
        weight: float | Tensor = 1 - self.decay * (1 - math.exp(-self.updates / self.tau))
        if skipped is not None:
            weight = weight * (1 - skipped)
            self._mend(list(model.buffers()), list(self.average.buffers()))
        ours, theirs = self.average.state_dict(), model.state_dict()
        floating = [name for name, value in theirs.items() if value.is_floating_point()]
        mine = [ours[name] for name in floating]
        difference = torch._foreach_sub([theirs[name] for name in floating], mine)
        torch._foreach_mul_(difference, weight)
        torch._foreach_add_(mine, difference)
        for name, value in theirs.items():
            if not value.is_floating_point():
                ours[name].copy_(value)

    @staticmethod
    def _mend(buffers: list[Tensor], spare: list[Tensor]) -> None:
        """Puts `spare` in the place of numbers that are not finite; for all buffers at once, and
        without waiting.
        """
        pairs = [(b, s) for b, s in zip(buffers, spare, strict=True) if b.is_floating_point()]
        if pairs:
            flat, other = (
                torch.cat([tensor.reshape(-1) for tensor in side])
                for side in zip(*pairs, strict=True)
            )
            parts = torch.where(flat.isfinite(), flat, other).split([b.numel() for b, _ in pairs])
            torch._foreach_copy_(
                [b for b, _ in pairs],
                [p.view_as(b) for p, (b, _) in zip(parts, pairs, strict=True)],
            )
