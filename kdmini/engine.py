"""One epoch of training and one pass of evaluation, spelt out. Everything arrives as an argument.

Legend: N images, S image size.
"""

import math
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from kdmini import distributed
from kdmini.contracts import Detections, Detector, Losses, Metric, Target, UserError
from kdmini.optim import EMA, Recipe, apply_setting
from kdmini.signals import Stop

READ_EVERY = 10  # steps between two looks at the device's numbers; in between, nothing waits for it
MAX_SKIPPED = 20  # updates in a row without a finite gradient before the run stops

Autocast = Callable[[], AbstractContextManager]


class TrainBatches(Protocol):
    def __len__(self) -> int: ...

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Any]]: ...


class ValBatches(Protocol):
    def __len__(self) -> int: ...

    def __iter__(
        self,
    ) -> Iterator[tuple[Tensor, list[Target], Callable[[list[Detections]], list[Detections]]]]: ...


@dataclass
class Progress:
    """Where a run stands; plain numbers, saved with every checkpoint."""

    epoch: int = 0  # epochs done
    step: int = 0  # batches done of the epoch in hand
    best: float = -math.inf
    best_epoch: int = 0
    skipped: int = 0  # updates without a finite gradient, in a row until now
    # of the epoch in hand
    sums: dict[str, float] = field(default_factory=dict)  # of each loss, where finite
    counts: dict[str, int] = field(default_factory=dict)
    left_out: int = 0  # updates without a finite gradient
    seconds: float = 0.0

    def means(self) -> dict[str, float]:
        return {name: total / self.counts[name] for name, total in self.sums.items()}

    def next_epoch(self) -> None:
        self.epoch, self.step, self.sums, self.counts, self.left_out, self.seconds = (
            self.epoch + 1,
            0,
            {},
            {},
            0,
            0.0,
        )

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one. Raises UserError for a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:1?\d)?", name):
        raise UserError(f"device: {name!r} is none to run on; use auto, cpu, cuda or cuda:1")
    device = torch.device(name)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        raise UserError(
            f"device: {name} was asked for, but torch finds {count} CUDA devices; use auto or cpu"
        )
    return device


def choose_algorithms(deterministic: bool) -> None:
    """On CUDA: the fastest convolutions, tried out at the first step, or those that repeat bit for
    bit.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = not deterministic


def precision(amp: bool | str, device: torch.device) -> tuple[Autocast, torch.amp.GradScaler]:
    """`amp` of the recipe -> the autocast context and the scaler, which does nothing except in
    fp16.
    """
    if amp is True:
        amp = (
            ("bf16" if torch.cuda.is_bf16_supported() else "fp16")
            if device.type == "cuda"
            else False
        )
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, False: torch.bfloat16}[amp]
    scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")
    return lambda: torch.autocast(device.type, dtype, enabled=bool(amp)), scaler


def train_one_epoch(
    student: Detector,
    replica: Any,  # the student, or DistributedDataParallel around it
    distillation: Any,  # a distill.step.Distillation
    loader: TrainBatches,
    optimizer: torch.optim.SGD,
    scaler: torch.amp.GradScaler,
    ema: EMA,
    recipe: Recipe,
    progress: Progress,
    autocast: Autocast,
    stop: Stop,
) -> None:
    """From where `progress` stands to the end of the epoch; left sooner, after an update, when a
    save is due or a signal came.

    Raises UserError when MAX_SKIPPED updates in a row had a gradient that was not finite, or when
    fp16 cannot go on."""
    student.train()
    distillation.train()
    epoch, steps = progress.epoch, len(loader)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    lambdas = " ".join(f"{name} {value:.3g}" for name, value in distillation.lambdas(epoch).items())
    tally, leaving, since_update = Tally(progress), False, 0
    batches, title = loader.epoch(epoch, progress.step), f"epoch {epoch + 1}/{recipe.epochs}"
    bar = tqdm(
        batches, title, steps, initial=progress.step, unit="step", dynamic_ncols=True, disable=None
    )
    for step, (images, targets) in enumerate(bar, progress.step):
        setting = recipe.at(epoch * steps + step, steps)
        apply_setting(optimizer, setting)
        since_update += 1
        update = since_update >= setting.accumulate or step + 1 == steps

        with distributed.averaging(replica, update):
            with autocast():
                preds = replica(images)
                task: Losses = student.loss(preds, targets)
                kd: Losses = distillation(images, preds, targets, epoch)
            n = len(images) * distributed.world()  # of all ranks, whose gradients will be averaged
            task_scale = n if recipe.loss_scale == "batch" else 1 / setting.accumulate
            kd_scale = n if distillation.kd_scale == "batch" else distillation.kd_scale
            loss: Any = task_scale * sum(task.values()) + kd_scale * sum(kd.values())
            scaler.scale(loss).backward()

        skipped = None
        if update:
            distributed.average_gradients_(distillation.parameters() if kd else ())
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(parameters, recipe.clip, foreach=True)
            skipped = 1 - norm.isfinite().float()
            setattr(optimizer, "found_inf", skipped)  # noqa: B010 - the fused step obeys it on the device
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            ema.update(student, skipped)
            since_update = 0

        tally.add({**task, **kd}, skipped, targets["ids"])
        progress.step = step + 1
        leaving |= recipe.save_every > 0 and progress.step % recipe.save_every == 0
        leaving |= distributed.world() == 1 and stop.signum > 0
        if progress.step % READ_EVERY == 0 or progress.step == steps or (leaving and update):
            shown = tally.read(scaler, stop)
            speed = progress.step * recipe.batch / progress.seconds
            memory = f" {torch.cuda.max_memory_reserved() / 1e9:.1f} GB" if images.is_cuda else ""
            bar.set_postfix_str(
                f"{shown} | lambda {lambdas or '-'} | lr {setting.lr:.2g} | {speed:.0f} img/s{memory}"
            )
            leaving |= stop.agreed > 0  # a signal to any rank: all leave at the same step
        if leaving and update:
            break
    bar.close()


class Tally:
    """Adds the losses to `progress`. Numbers wait on the device until `read` copies them all at
    once.
    """

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.waiting: list[tuple[str, Tensor, list[str]]] = []  # name, scalar, ids of the batch
        self.broken: dict[
            str, list[str]
        ] = {}  # what was not finite since the last good update, ids of the last batch
        self.since = time.perf_counter()

    def add(self, losses: Losses, skipped: Tensor | None, ids: list[str]) -> None:
        """losses: name -> scalar; skipped: 1.0 where the update was left out, None where there was
        none.
        """
        numbers = {**losses, SKIPPED: skipped} if skipped is not None else losses
        self.waiting += [(name, value.detach().float(), ids) for name, value in numbers.items()]

    def read(self, scaler: torch.amp.GradScaler, stop: Stop) -> str:
        """-> means so far, of the finite values and over the ranks, in words. Tells all ranks of a
        stop signal.
        """
        progress = self.progress
        numbers = torch.stack([value for _, value, _ in self.waiting])
        values = (distributed.total(numbers) / distributed.world()).tolist()
        stop.agreed = distributed.largest(stop.signum, numbers.device)
        for (name, _, ids), value in zip(self.waiting, values, strict=True):
            if name == SKIPPED and value:
                progress.left_out, progress.skipped = progress.left_out + 1, progress.skipped + 1
            elif name == SKIPPED:
                progress.skipped, self.broken = 0, {}
            elif math.isfinite(value):
                progress.sums[name] = progress.sums.get(name, 0.0) + value
                progress.counts[name] = progress.counts.get(name, 0) + 1
            else:
                self.broken[name] = ids
        self.waiting = []
        now = time.perf_counter()
        progress.seconds, self.since = progress.seconds + now - self.since, now

        faults = (
            f"{name} not finite, last on {', '.join(ids)}" for name, ids in self.broken.items()
        )
        what = "; ".join(faults) or "all losses finite"
        if progress.skipped >= MAX_SKIPPED:
            remedy = "lower train.lr0, or train.amp=false"
            raise UserError(
                f"{progress.skipped} updates in a row had no finite gradient ({what}): {remedy}"
            )
        if scaler.is_enabled() and scaler.get_scale() < 1:
            raise UserError(
                f"the scale of the fp16 gradients fell below 1 ({what}): use train.amp=bf16 or false"
            )
        shown = " ".join(f"{name} {value:.3f}" for name, value in progress.means().items())
        return f"{shown} | skipped {progress.left_out}" if progress.left_out else shown


SKIPPED = "skipped"


@torch.no_grad()
def evaluate(
    model: Detector, loader: ValBatches, metric: Metric, autocast: Autocast
) -> dict[str, float]:
    """Every image once, letterboxed; score above 0.001, NMS at IoU 0.7, 300 detections ->
    metric.compute().

    Each rank sees its share of the images, and scores those of all.
    """
    model.eval()
    found = []
    for images, targets, to_native in tqdm(
        loader, "evaluate", leave=False, unit="batch", dynamic_ncols=True, disable=None
    ):
        with autocast():
            preds = model(images)
        detections = model.decode(preds, score=0.001, iou=0.7, max_det=300)
        on_cpu = [
            {key: value.cpu() for key, value in image.items()} for image in to_native(detections)
        ]  # type: ignore
        found.append((on_cpu, targets))
    for batch in distributed.deal(found):
        metric.update(*batch)
    return metric.compute()


@torch.no_grad()
def attention_distances(
    student: Detector, distillation: Any, loader: ValBatches, autocast: Autocast, batches: int = 8
) -> dict[str, float]:
    """Unweighted distances of the attention maps on the first held-out batches, a mean over images,
    for each tap and summed over the taps ("aligned", "raw"); {} without a teacher.
    """
    student.eval()
    distillation.eval()
    sums: dict[str, Tensor] = {}
    count = 0
    for (images, _, _), _ in zip(loader, range(batches), strict=False):
        with autocast():
            found = distillation.distances(student, images)
        sums = {name: value + sums.get(name, 0) for name, value in found.items()}
        count += len(images)
    return {f"distance/{name}": value.item() / count for name, value in sums.items()}
