"""One epoch of training and one pass of evaluation, spelt out. Everything arrives as an argument.

Legend: N images, S image size.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from kdmini.contracts import Detections, Detector, Losses, Metric, Target, UserError
from kdmini.optim import EMA, Recipe, apply_setting

READ_EVERY = 10  # steps between two looks at the device's numbers; in between, nothing waits for it
MAX_SKIPPED = 20  # updates in a row without a finite gradient before the run stops

Autocast = Callable[[], AbstractContextManager]


class TrainBatches(Protocol):
    def __len__(self) -> int: ...

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Any]]: ...


class ValBatches(Protocol):
    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[tuple[Tensor, list[Target], Callable[[list[Detections]], list[Detections]]]]: ...


@dataclass
class Progress:
    """Where a run stands; plain numbers, saved with every checkpoint."""

    epoch: int = 0  # epochs done
    best: float = -1.0
    best_epoch: int = 0
    skipped: int = 0  # updates without a finite gradient, in a row until now

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in asdict(self):
            setattr(self, name, state[name])


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one. Raises UserError for a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device: {name!r} is no device of torch; use auto, cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("device: cuda was asked for, but torch finds no CUDA device; use device=auto or device=cpu")
    return device


def precision(amp: bool | str, device: torch.device) -> tuple[Autocast, torch.amp.GradScaler]:
    """`amp` of the recipe -> the autocast context and the scaler, which does nothing except in fp16."""
    if amp is True:
        amp = ("bf16" if torch.cuda.is_bf16_supported() else "fp16") if device.type == "cuda" else False
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, False: torch.bfloat16}[amp]
    scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")
    return lambda: torch.autocast(device.type, dtype, enabled=bool(amp)), scaler


def train_one_epoch(
    student: Detector,
    distillation: Any,  # a distill.step.Distillation
    loader: TrainBatches,
    optimizer: torch.optim.SGD,
    scaler: torch.amp.GradScaler,
    ema: EMA,
    recipe: Recipe,
    progress: Progress,
    autocast: Autocast,
) -> dict[str, float]:
    """Epoch number `progress.epoch` -> means of the named losses, lr, images/s and the number of skipped updates.

    Raises UserError when MAX_SKIPPED updates in a row had a gradient that was not finite.
    """
    student.train()
    distillation.train()
    epoch = progress.epoch
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    lambdas = " ".join(f"{name} {value:.3g}" for name, value in distillation.lambdas(epoch).items())
    tally, images_done, started = Tally(progress), 0, time.perf_counter()
    since_update = 0
    bar = tqdm(loader.epoch(epoch), f"epoch {epoch + 1}/{recipe.epochs}", len(loader), unit="step", dynamic_ncols=True)
    for step, (images, targets) in enumerate(bar):
        setting = recipe.at(epoch * len(loader) + step, len(loader))
        apply_setting(optimizer, setting)

        with autocast():
            preds = student(images)
            task: Losses = student.loss(preds, targets)
            kd: Losses = distillation(images, preds, targets, epoch)
        n = len(images)
        task_scale = n if recipe.loss_scale == "batch" else 1 / setting.accumulate
        kd_scale = n if distillation.kd_scale == "batch" else distillation.kd_scale
        loss: Any = task_scale * sum(task.values()) + kd_scale * sum(kd.values())
        scaler.scale(loss).backward()

        since_update += 1
        skipped = None
        if since_update >= setting.accumulate or step + 1 == len(loader):
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(parameters, recipe.clip, foreach=True)
            skipped = 1 - norm.isfinite().float()
            setattr(optimizer, "found_inf", skipped)  # noqa: B010 - the fused step obeys it on the device
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            ema.update(student, skipped)
            since_update = 0

        tally.add({**task, **kd}, skipped)
        images_done += n
        if (step + 1) % READ_EVERY == 0 or step + 1 == len(loader):
            means = tally.read()
            speed = images_done / (time.perf_counter() - started)
            shown = " ".join(f"{name} {value:.3f}" for name, value in means.items())
            bar.set_postfix_str(f"{shown} | lambda: {lambdas or '-'} | {speed:.0f} img/s")
    return {**tally.read(), "lr": setting.lr, "images/s": speed, "skipped": tally.skipped}


class Tally:
    """Means of the losses of an epoch. Numbers wait on the device until `read` copies them all at once."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.names: list[str] = []
        self.waiting: list[Tensor] = []
        self.sums: dict[str, float] = {}
        self.counts: dict[str, int] = {}
        self.skipped = 0

    def add(self, losses: Losses, skipped: Tensor | None) -> None:
        """losses: name -> scalar; skipped: 1.0 where the update was left out, None where there was none."""
        numbers = {**losses, SKIPPED: skipped} if skipped is not None else losses
        self.names += numbers
        self.waiting += [value.detach().float() for value in numbers.values()]

    def read(self) -> dict[str, float]:
        """-> means so far, of the finite values."""
        values = torch.stack(self.waiting).tolist() if self.waiting else []
        broken = set()
        for name, value in zip(self.names, values, strict=True):
            if name == SKIPPED:
                self.skipped += int(value)
                self.progress.skipped = self.progress.skipped + 1 if value else 0
            elif math.isfinite(value):
                self.sums[name] = self.sums.get(name, 0.0) + value
                self.counts[name] = self.counts.get(name, 0) + 1
            else:
                broken.add(name)
        self.names, self.waiting = [], []
        if self.progress.skipped >= MAX_SKIPPED:
            what = f"{', '.join(sorted(broken))} not finite" if broken else "all losses finite"
            count = self.progress.skipped
            raise UserError(
                f"{count} updates in a row had no finite gradient ({what}): lower train.lr0, or train.amp=false"
            )
        return {name: total / self.counts[name] for name, total in self.sums.items()}


SKIPPED = "skipped"


@torch.no_grad()
def evaluate(model: Detector, loader: ValBatches, metric: Metric, autocast: Autocast) -> dict[str, float]:
    """Every image once, letterboxed; score above 0.001, NMS at IoU 0.7, 300 detections -> metric.compute()."""
    model.eval()
    for images, targets, to_native in tqdm(loader, "evaluate", leave=False, unit="batch", dynamic_ncols=True):
        with autocast():
            preds = model(images)
        detections = model.decode(preds, score=0.001, iou=0.7, max_det=300)
        metric.update(to_native(detections), targets)
    return metric.compute()


@torch.no_grad()
def attention_distances(
    student: Detector, distillation: Any, loader: ValBatches, autocast: Autocast, batches: int = 8
) -> dict[str, float]:
    """Unweighted distances of the attention maps on the first held-out batches, a mean over images, for each tap
    and summed over the taps ("aligned", "raw"); {} without a teacher."""
    student.eval()
    distillation.eval()
    sums: dict[str, Tensor] = {}
    count = 0
    for (images, _, _), _ in zip(loader, range(batches), strict=False):
        with autocast():
            found = distillation.distances(student, images)
        sums = {name: value + sums.get(name, 0) for name, value in found.items()}
        count += len(images)
    means = {f"distance/{name}": value.item() / count for name, value in sums.items()}
    totals = {
        f"distance/{kind}": sum(value for name, value in means.items() if name.startswith(f"distance/{kind}/"))
        for kind in ("aligned", "raw")
    }
    return {**totals, **means} if means else {}
