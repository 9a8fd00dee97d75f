"""One epoch of training and one pass of evaluation, spelt out. Everything arrives as an
argument: nothing here imports a model, a data set or a term.

Legend: N images, S image size.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from tqdm import tqdm

from kdmini import distributed
from kdmini.contracts import Metric, Model, Prediction, Target, Targets
from kdmini.device import Autocast
from kdmini.optim import EMA, Recipe, apply_setting, hold_frozen
from kdmini.progress import READ_EVERY, Progress, Tally
from kdmini.signals import Stop

ToFile = Callable[[list[Prediction]], list[Prediction]]

# batches done of all, time that is left, numbers; a bar where there is still room
BAR = "{desc} {n_fmt}/{total_fmt} {remaining}{postfix} {bar}"


class TrainBatches(Protocol):
    """kdmini.data.loader.TrainLoader, as the loop sees it. All batches are of one size."""

    def __len__(self) -> int: ...

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Targets]]: ...


class ValBatches(Protocol):
    """kdmini.data.loader.ValLoader, as the loop sees it."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[tuple[Tensor, list[Target], ToFile]]: ...


@dataclass
class Training:
    """What a step of training touches. The teacher is inside `distillation`, frozen: in no
    optimiser, no average and no checkpoint.
    """

    loader: TrainBatches
    student: Any  # a Model that is an nn.Module
    distillation: Any  # a kdmini.distill.step.Distillation
    optimizer: torch.optim.Optimizer
    scaler: GradScaler
    ema: EMA
    recipe: Recipe
    autocast: Autocast
    progress: Progress
    # the student, or DistributedDataParallel around it
    replica: Any = None

    def __post_init__(self) -> None:
        if self.replica is None:
            self.replica = self.student

    def begin(self) -> None:
        """What learns goes into the mode of training, what is frozen does not."""
        self.student.train()
        self.distillation.train()
        hold_frozen(self.student, self.recipe)

    def parts(self) -> dict[str, Any]:
        """What a checkpoint saves, by name."""
        names = ("student", "ema", "distillation", "optimizer", "scaler", "progress")
        return {name: getattr(self, name) for name in names}

    def scales(self, labelled: int, images: int) -> tuple[float, float]:
        """What the means over the images of an update, of all micro-batches and ranks, are
        multiplied by: the task's, whose mean is over the labelled ones, and the distillation's.
        """
        kd_scale = self.distillation.kd_scale
        task_scale = labelled if self.recipe.loss_scale == "batch" else 1
        return task_scale, images if kd_scale == "batch" else kd_scale


def train_one_epoch(training: Training, stop: Stop) -> None:
    """From where `progress` stands to the end of the epoch; left sooner, after an update,
    when a save is due or a signal came. Raises UserError as Tally.read does.
    """
    recipe = training.recipe
    progress = training.progress
    student = training.student
    distillation = training.distillation
    optimizer = training.optimizer
    scaler = training.scaler
    training.begin()
    epoch = progress.epoch
    steps = len(training.loader)
    tally = Tally(progress)
    leaving = False
    update = True  # progress stands after one
    bar = progress_bar(training)
    for step, (images, targets) in enumerate(bar, progress.step):
        setting = recipe.at(epoch * steps + step, steps)
        apply_setting(optimizer, setting)
        if update:  # the next one begins
            micro_batches = recipe.micro_batches(epoch * steps + step, steps)
            last = step + micro_batches - 1
        update = step == last

        with distributed.averaging(training.replica, update):
            with training.autocast():
                preds = training.replica(images)
                task = student.loss(labelled(preds, images, targets), targets)
                kd = distillation(images, preds, targets, epoch)
            # gradients are averaged over the ranks and added up over the micro-batches
            parts = distributed.world() * micro_batches  # of an update
            task_scale, kd_scale = training.scales(len(targets["ids"]) * parts, len(images) * parts)
            loss: Any = task_scale * sum(task.values()) + kd_scale * sum(kd.values())
            scaler.scale(loss / micro_batches).backward()

        skipped = None
        if update:
            # DistributedDataParallel averages the student's; align modules and terms are ours
            distributed.average_gradients_(distillation.parameters() if kd else ())
            # true gradients before the clip, for their norm is what is bounded
            scaler.unscale_(optimizer)
            skipped = clip_gradients(optimizer, recipe.clip)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            training.ema.update(student, skipped)

        tally.add({**task, **kd}, skipped, targets["ids"])
        progress.step = step + 1
        leaving = leaving or leave_is_due(training, stop)
        stop.tell()  # after that, so that none who leaves for a signal has not said so
        if progress.step % READ_EVERY == 0 or progress.step == steps or (leaving and update):
            losses = tally.read(scaler, stop)
            bar.set_postfix_str(status(losses, training, setting.lr))
            leaving = leaving or stop.agreed > 0
        if leaving and update:
            break
    bar.close()


def labelled(preds: Any, images: Tensor, targets: Targets) -> Any:
    """Those of the images with ground truth, which come first: most often all."""
    count = len(targets["ids"])
    return preds if count == len(images) else first(preds, count)


def first(preds: Any, count: int) -> Any:
    """What a model returned, of the first images alone."""
    if isinstance(preds, Tensor):
        return preds[:count]
    if isinstance(preds, Mapping):
        return {key: first(part, count) for key, part in preds.items()}
    return [first(part, count) for part in preds]


def leave_is_due(training: Training, stop: Stop) -> bool:
    """Whether a checkpoint is due, or a signal came. Of several ranks none leaves alone: all
    do at the same step, once the signal is agreed on.
    """
    every = training.recipe.save_every
    if every > 0 and training.progress.step % every == 0:
        return True
    return distributed.world() == 1 and stop.signum > 0


def clip_gradients(optimizer: torch.optim.Optimizer, largest: float) -> Tensor:
    """Bounds the norm of all gradients -> 1.0 where it is not finite, else 0.0, on the device.

    A fused step of the optimiser leaves itself out where the attribute `found_inf` is 1, and
    the host need not wait to know. In fp16 the GradScaler puts an answer of its own there.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, largest, foreach=True)
    skipped = 1 - norm.isfinite().float()
    setattr(optimizer, "found_inf", skipped)  # noqa: B010 - no attribute that mypy knows
    return skipped


def progress_bar(training: Training) -> tqdm:
    """The batches that are left of the epoch, with a bar where there is a terminal."""
    progress = training.progress
    return tqdm(
        training.loader.epoch(progress.epoch, progress.step),
        f"epoch {progress.epoch + 1}/{training.recipe.epochs}",
        len(training.loader),
        initial=progress.step,
        bar_format=BAR,
        dynamic_ncols=True,
        disable=None,
    )


def status(losses: str, training: Training, lr: float) -> str:
    """What stands in the bar: of what does not fit into the terminal, the end is left out."""
    progress = training.progress
    lambdas = training.distillation.lambdas(progress.epoch)
    schedule = " ".join(f"{value:.3g}" for value in lambdas.values())  # in the order of the terms
    speed = progress.step * training.recipe.batch / progress.seconds
    text = f"lambda {schedule or '-'} | {losses} | lr {lr:.2g} | {speed:.0f} img/s"
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        text += f" {torch.cuda.max_memory_reserved() / 1e9:.1f} GB"
    return text


@torch.no_grad()
def evaluate(
    model: Model, loader: ValBatches, metric: Metric, autocast: Autocast
) -> dict[str, float]:
    """Every image once, letterboxed, decoded with the model's own settings of evaluation
    -> metric.compute().

    Each rank sees its share of the images, and scores those of all.
    """
    model.eval()
    bar = tqdm(loader, "evaluate", leave=False, unit="batch", dynamic_ncols=True, disable=None)
    for images, targets, to_file in bar:
        with autocast():
            preds = model(images)
        metric.update(to_file(on_cpu(model.decode(preds))), targets)
    metric.records = distributed.deal(metric.records)
    return metric.compute()


def on_cpu(predictions: list[Prediction]) -> list[Prediction]:
    """The predictions of a batch, on the CPU. All tensors of one type come in one copy, for
    the host waits at each.
    """
    moved: list[dict[str, Tensor]] = [dict(prediction) for prediction in predictions]
    places: dict[torch.dtype, list[tuple[int, str]]] = {}
    for n, prediction in enumerate(moved):
        for name, value in prediction.items():
            if not value.is_cpu:
                places.setdefault(value.dtype, []).append((n, name))

    for of_type in places.values():
        values = [moved[n][name] for n, name in of_type]
        flat = torch.cat([value.reshape(-1) for value in values]).cpu()
        parts = flat.split([value.numel() for value in values])
        for (n, name), value, part in zip(of_type, values, parts, strict=True):
            # a copy, or each would keep and send to other ranks the whole batch
            moved[n][name] = part.view(value.shape).clone()
    return [*moved]


@torch.no_grad()
def attention_distances(
    student: Model, distillation: Any, loader: ValBatches, autocast: Autocast, batches: int = 8
) -> dict[str, float]:
    """Unweighted distances of the attention maps on the first held-out batches, a mean over
    images, for each tap and summed over the taps ("aligned", "raw", "rolled", "constant"); {}
    without a teacher.
    """
    student.eval()
    distillation.eval()
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}  # of the images that have it
    for images, _, _ in islice(loader, batches):
        with autocast():
            distances = distillation.distances(student, images)
        for name, value in distances.items():
            sums[name] = value + sums.get(name, 0)
            counts[name] = len(images) + counts.get(name, 0)
    if not sums:
        return {}
    totals = torch.stack([*sums.values()]).tolist()
    return {
        f"distance/{name}": total / counts[name] for name, total in zip(sums, totals, strict=True)
    }
