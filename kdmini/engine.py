"""One epoch of training and one pass of evaluation, spelt out. Everything arrives as an argument.

Legend: N images, S image size.
"""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from kdmini import distributed
from kdmini.contracts import Detections, Detector, Losses, Metric, Target
from kdmini.device import Autocast
from kdmini.optim import EMA, Recipe, apply_setting
from kdmini.progress import READ_EVERY, Progress, Tally
from kdmini.signals import Stop


class TrainBatches(Protocol):
    def __len__(self) -> int: ...

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Any]]: ...


class ValBatches(Protocol):
    def __len__(self) -> int: ...

    def __iter__(
        self,
    ) -> Iterator[tuple[Tensor, list[Target], Callable[[list[Detections]], list[Detections]]]]: ...


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
