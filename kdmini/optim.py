"""The optimiser's side of a run: the recipe, parameter groups, schedules as pure functions
of the step, EMA.

Legend: a step is one batch; an update is one step of the optimiser, after one or more
batches, its micro-batches.
"""

import copy
import difflib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kdmini.bounds import Count, Epochs, Natural, Range, Share, ShareBelowOne
from kdmini.contracts import UserError

BETA2 = 0.999  # of AdamW


@dataclass(frozen=True)
class Recipe:
    """How a run is trained. Names and defaults are those of the public YOLO11 recipe with SGD
    and a cosine.

    optimizer: sgd, with Nesterov's momentum; adamw; or `{build: ...}`, which gets `groups` and
        `recipe`.
    schedule: how the learning rate falls to lrf: cosine or linear, epoch by epoch; poly, step
        by step; constant.
    power: of poly.
    freeze: submodules of the student that stay as they are, with the statistics of their
        BatchNorm, as [model.0, model.1].
    freeze_statistics: the student's BatchNorm keeps the statistics that came with its weights,
        and normalises by them; what is not frozen still learns.
    epochs: passes over the training set.
    batch: images of a step, of all ranks together.
    nbs: nominal batch size, reached by accumulation where `batch` is smaller; weight decay is
        stated for it.
    lr0: learning rate after the warm-up.
    lrf: last learning rate as a share of lr0.
    momentum: of SGD after the warm-up, or the first beta of AdamW.
    weight_decay: of convolution and linear weights; norms and biases have none.
    warmup_epochs: length of the warm-up.
    warmup_steps: the least length of the warm-up.
    warmup_bias_lr: learning rate of the biases in the first step; 0 suits AdamW.
    warmup_momentum: momentum in the first step.
    clip: largest norm of the gradient; .inf for no bound.
    ema_decay: of the averaged weights, which are the ones evaluated and kept.
    ema_tau: updates until the average is about as slow as ema_decay says.
    loss_scale: `batch` multiplies the task's loss, a mean over the images of an update, by
        their number; `none` leaves the mean.
    amp: false, bf16, fp16, or true for the better of the two on CUDA and float32 on the CPU.
    patience: epochs without a better model before stopping; 0 for no early stopping.
    val_every: epochs between validations.
    save_every: steps between checkpoints, beside the one after every epoch; 0 for no others.
    """

    epochs: Epochs
    batch: Count
    nbs: Count = 64
    lr0: Annotated[float, Range(1e-9, 100)] = 0.01
    lrf: Share = 0.01
    momentum: ShareBelowOne = 0.937
    weight_decay: Share = 5e-4
    warmup_epochs: Annotated[float, Range(0, 100_000)] = 3.0
    warmup_steps: Natural = 100
    warmup_bias_lr: Annotated[float, Range(0, 100)] = 0.1
    warmup_momentum: ShareBelowOne = 0.8
    clip: Annotated[float, Range(1e-6, math.inf)] = 10.0
    ema_decay: ShareBelowOne = 0.9999
    ema_tau: Annotated[float, Range(0.001, 10**9)] = 2000.0
    loss_scale: Literal["batch", "none"] = "batch"
    amp: bool | Literal["bf16", "fp16"] = True
    optimizer: Literal["sgd", "adamw"] | dict[str, Any] = "sgd"
    schedule: Literal["cosine", "linear", "poly", "constant"] = "cosine"
    power: Annotated[float, Range(0.01, 100)] = 0.9
    freeze: tuple[str, ...] = ()
    freeze_statistics: bool = False
    patience: Natural = 100
    val_every: Count = 1
    save_every: Natural = 0

    @property
    def accumulate(self) -> int:
        """Batches of an update after the warm-up."""
        return max(round(self.nbs / self.batch), 1)

    def micro_batches(self, step: int, steps_per_epoch: int) -> int:
        """Batches of the update that begins at a step, counted as in `at`.

        Their number grows in the warm-up. An epoch ends with an update, which may be shorter,
        so that its end is a point from which a run resumes.
        """
        left = steps_per_epoch - step % steps_per_epoch
        for count in range(1, left):
            if count >= self.at(step + count - 1, steps_per_epoch).accumulate:
                return count
        return left

    def warmup(self, steps_per_epoch: int) -> int:
        """Length of the warm-up in steps."""
        if self.warmup_epochs <= 0:
            return 0
        return max(round(self.warmup_epochs * steps_per_epoch), self.warmup_steps)

    def at(self, step: int, steps_per_epoch: int) -> "Setting":
        """What holds at a step, counted from the start of the run: warm-up, then the schedule."""
        lr = self.lr0 * (self.lrf + (1 - self.lrf) * self.height(step, steps_per_epoch))
        length = self.warmup(steps_per_epoch)
        if step > length or not length:
            return Setting(lr, lr, self.momentum, self.accumulate)

        share = step / length
        return Setting(
            lr=share * lr,
            # biases start high: the first thing to learn is how rare objects are
            bias_lr=self.warmup_bias_lr + share * (lr - self.warmup_bias_lr),
            momentum=self.warmup_momentum + share * (self.momentum - self.warmup_momentum),
            accumulate=max(round(1 + share * (self.nbs / self.batch - 1)), 1),
        )

    def height(self, step: int, steps_per_epoch: int) -> float:
        """Where the schedule stands between its beginning, 1, and its end, 0."""
        done = step // steps_per_epoch / self.epochs
        if self.schedule == "cosine":
            return (1 + math.cos(math.pi * done)) / 2
        if self.schedule == "linear":
            return 1 - done
        if self.schedule == "poly":
            return (1 - step / (self.epochs * steps_per_epoch)) ** self.power
        return 1.0


@dataclass(frozen=True)
class Setting:
    """What holds at one step."""

    lr: float
    bias_lr: float
    momentum: float
    accumulate: int  # batches of an update


def freeze_parts(student: nn.Module, names: Sequence[str]) -> None:
    """Takes these submodules out of what is learned, and says how much that is; `hold_frozen`
    keeps their statistics. Raises UserError for a name that does not exist, or where nothing is
    left.
    """
    if not names:
        return
    modules = dict(student.named_modules())
    del modules[""]
    before = learning(student)
    for name in names:
        if name not in modules:
            near = difflib.get_close_matches(name, modules, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            network = type(student).__name__
            raise UserError(f"train.freeze: {network} has no submodule {name!r}{hint}")
        modules[name].requires_grad_(False)
    after = learning(student)
    if not after:
        raise UserError("train.freeze: nothing of the student is left to learn; name less")
    print(f"frozen: {before - after:,} of the student's {before:,} parameters")


def hold_frozen(student: nn.Module, recipe: Recipe) -> None:
    """Puts what is frozen into the mode of evaluation: the statistics of its BatchNorm would go
    on moving. Call it after `student.train()`.
    """
    for name in recipe.freeze:
        student.get_submodule(name).eval()
    if recipe.freeze_statistics:
        for module in student.modules():
            if isinstance(module, _BatchNorm):
                module.eval()


def learning(module: nn.Module) -> int:
    """How many numbers of it are learned."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def make_optimizer(modules: Iterable[nn.Module], recipe: Recipe) -> torch.optim.Optimizer:
    """SGD or AdamW, fused, so that a step whose gradient is not finite is skipped on the
    device.
    """
    groups = grouped(modules, recipe)
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, recipe.lr0, (recipe.momentum, BETA2), fused=True)

    for group in groups:
        # here and not in the call, which refuses Nesterov's form of a momentum of 0
        group["nesterov"] = True
    optimizer = torch.optim.SGD(groups, recipe.lr0, recipe.momentum, fused=True)
    for group in groups:
        for parameter in group["params"]:
            # torch would leave it uninitialised if the very first step were skipped
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def grouped(modules: Iterable[nn.Module], recipe: Recipe) -> list[dict[str, Any]]:
    """Three groups, "weights", "norms" and "biases", of what learns; weight decay on the first
    alone.
    """
    groups: dict[str, list[nn.Parameter]] = {"weights": [], "norms": [], "biases": []}
    for module in modules:
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                groups[kind_of(name, parameter)].append(parameter)

    # stated for nbs images; an update that sees more of them decays more
    decay = recipe.weight_decay * recipe.batch * recipe.accumulate / recipe.nbs
    settings: list[dict[str, Any]] = []
    for kind, parameters in groups.items():
        weight_decay = decay if kind == "weights" else 0.0
        settings.append({"params": parameters, "name": kind, "weight_decay": weight_decay})
    return settings


def kind_of(name: str, parameter: nn.Parameter) -> str:
    """The group of a parameter."""
    if name.endswith("bias"):
        return "biases"
    return "norms" if parameter.ndim <= 1 else "weights"


def apply_setting(optimizer: torch.optim.Optimizer, setting: Setting) -> None:
    for group in optimizer.param_groups:
        group["lr"] = setting.bias_lr if group["name"] == "biases" else setting.lr
        if "betas" in group:
            group["betas"] = (setting.momentum, *group["betas"][1:])
        elif "momentum" in group:
            group["momentum"] = setting.momentum


class EMA:
    """Exponential moving average of a model's weights and BatchNorm statistics, kept as a
    model, `average`.

    decay * (1 - exp(-updates / tau)): young averages forget faster. Build it before taps are
    attached: a copy would take the hooks along.
    """

    def __init__(self, model: nn.Module, decay: float, tau: float):
        self.average: Any = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.tau = tau
        self.updates = 0

    def state_dict(self) -> dict[str, Any]:
        return {"average": self.average.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["updates"] < 0:
            raise ValueError(f"an average of {state['updates']} updates")
        self.average.load_state_dict(state["average"])
        self.updates = state["updates"]

    @torch.no_grad()
    def update(self, model: Any, skipped: Tensor | None = None) -> None:
        """Moves the average towards the model. skipped: scalar, 1.0 where the update did not
        happen.

        A step that was skipped has not touched the weights, but its forward pass may have left
        BatchNorm statistics that are not finite: the model gets those of the average back.
        """
        self.updates += 1
        decay = self.decay * (1 - math.exp(-self.updates / self.tau))
        share: float | Tensor = 1 - decay  # of the way to the model
        if skipped is not None:
            share = share * (1 - skipped)
            mend(list(model.buffers()), list(self.average.buffers()))

        average = self.average.state_dict()
        state = model.state_dict()
        floating = [name for name, value in state.items() if value.is_floating_point()]
        averages = [average[name] for name in floating]
        difference = torch._foreach_sub([state[name] for name in floating], averages)
        torch._foreach_mul_(difference, share)
        torch._foreach_add_(averages, difference)
        counts = [name for name, value in state.items() if not value.is_floating_point()]
        if counts:
            torch._foreach_copy_(
                [average[name] for name in counts], [state[name] for name in counts]
            )


def mend(buffers: list[Tensor], spare: list[Tensor]) -> None:
    """Puts `spare` in the place of numbers that are not finite; for all buffers at once, and
    without waiting for the device.
    """
    pairs = [(b, s) for b, s in zip(buffers, spare, strict=True) if b.is_floating_point()]
    if not pairs:
        return
    ours = [buffer for buffer, _ in pairs]
    flat = torch.cat([buffer.reshape(-1) for buffer in ours])
    other = torch.cat([value.reshape(-1) for _, value in pairs])
    mended = torch.where(flat.isfinite(), flat, other)
    parts = mended.split([buffer.numel() for buffer in ours])
    shaped = [part.view_as(buffer) for part, buffer in zip(parts, ours, strict=True)]
    torch._foreach_copy_(ours, shaped)
