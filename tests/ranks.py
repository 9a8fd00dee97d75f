"""What each of two ranks does, and leaves for tests/test_distributed.py to look at.

torchrun --standalone --nproc-per-node 2 tests/ranks.py DATA FOLDER
"""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kdmini import distributed, engine
from kdmini.classification.wide_resnet import WideResNet
from kdmini.contracts import UserError
from kdmini.data.loader import Augment, TrainLoader, ValLoader
from kdmini.data.store import Store
from kdmini.detection import voc as boxes
from kdmini.detection.average_precision import DetectionMetric
from kdmini.detection.yolo11.model import YOLO11
from kdmini.device import precision
from kdmini.distill.attention import AttentionTransfer
from kdmini.distill.step import Distillation, Weighted, tap_shapes
from kdmini.engine import Training
from kdmini.inputs import Inputs
from kdmini.optim import EMA, Recipe, make_optimizer
from kdmini.progress import Progress
from kdmini.segmentation import voc as masks
from kdmini.segmentation.mean_iou import MeanIoU
from kdmini.signals import Stop
from tests import precise, splits
from tests.classification.first_shape import FirstShape

CPU = torch.device("cpu")
NAMES = ["circle", "square", "triangle", "star", "ring", "cross"]
LABELS = ["ground", *NAMES]
SCALE = [0.5, 0.0625, 1024]  # a YOLO11 of 0.2 M parameters
IMGSZ = 64

BATCH = 4  # of both ranks
EPOCHS = 2
STEPS = 10  # an epoch of the 24 images has six
LR = 1e-3  # at ten times as much, every step multiplies a difference by fifty
CLIP = 5.0
WEIGHT = 75.0
SIGTERM = 15


class Task(NamedTuple):
    """What is learned."""

    data: Any
    names: list[str]
    network: Callable[[], nn.Module]
    taps: list[str]
    augment: Augment = Augment()


def detector() -> nn.Module:
    return YOLO11(NAMES, SCALE)


def labeller() -> nn.Module:
    return splits.Labeller(LABELS)


def classifier() -> nn.Module:
    return WideResNet(NAMES, depth=10)


DETECTION = Task(boxes.VOC, NAMES, detector, ["model.6", "model.13", "model.22"])
REGIONS = DETECTION._replace(data=partial(boxes.VOC, difficult="ignore"))
SEGMENTATION = Task(masks.VOC, LABELS, labeller, ["steps.0", "steps.1"])
MIXED = Augment(cutmix=0.5, mixup=0.5)
CLASSIFICATION = Task(FirstShape, NAMES, classifier, ["group2", "group3"], MIXED)


class Case(NamedTuple):
    reduction: Any
    accumulate: int = 1
    kd_scale: Any = 1.0
    schedule: Any = ((0, 2.0, 2, 1.0),)
    task: Task = DETECTION


CASES = {
    "notes": Case("notes"),
    "notes, accumulated": Case("notes", accumulate=2),
    "sample": Case("sample", kd_scale="batch"),
    "ignored regions, accumulated": Case("notes", accumulate=2, task=REGIONS),
    "mean_square, accumulated, lambda 0 in the second epoch": Case(
        "mean_square", accumulate=2, kd_scale=100.0, schedule=((0, 2.0, 1, 2.0),)
    ),
    "masks": Case("notes", task=SEGMENTATION),
    "masks, accumulated": Case("sample", accumulate=2, kd_scale="batch", task=SEGMENTATION),
    "labels, accumulated": Case("mean_square", accumulate=2, task=CLASSIFICATION),
}

# --- what all ranks build alike, and the process that stands for them


class DoubleLoader(TrainLoader):
    """In float64, as all else here.

    After ten steps, float32's rounding alone would be worth more than 1e-5.
    """

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Any]]:
        for images, targets in super().epoch(epoch, start):
            yield images.double(), targets


def store_of(root: Path, split: str, task: Task = DETECTION) -> Store:
    """Decoded by one rank for both."""
    dataset = task.data(str(root), [split], task.names)
    once = distributed.once_a_machine if distributed.ranks_here() > 1 else None
    settings: dict[str, Any] = {"workers": 0, "storage": "resident", "once": once}
    return Store(dataset, IMGSZ, name=split, training=split == "train", **settings)


def make_training(case: Case, loader: Any) -> Training:
    torch.manual_seed(5)
    student: Any = case.task.network()
    teacher = case.task.network()
    taps = {tap: tap for tap in case.task.taps}
    shapes = tap_shapes(student, teacher, taps, IMGSZ)
    student.double()
    teacher.double()
    ema = EMA(student, 0.9, 5.0)
    term = Weighted(AttentionTransfer(case.reduction), WEIGHT, case.schedule)
    distillation = Distillation(
        student, teacher, {"attention": term}, taps, shapes, kd_scale=case.kd_scale
    )
    distillation.double()
    recipe = Recipe(
        EPOCHS,
        BATCH,
        nbs=BATCH * case.accumulate,
        lr0=LR,
        warmup_bias_lr=2 * LR,
        warmup_epochs=0.5,
        warmup_steps=3,
        clip=CLIP,
        save_every=1,
    )
    autocast, scaler = precision(False, CPU)
    return Training(
        loader=loader,
        student=student.train(),
        distillation=distillation.train(),
        optimizer=make_optimizer([student, distillation], recipe),
        scaler=scaler,
        ema=ema,
        recipe=recipe,
        autocast=autocast,
        progress=Progress(),
    )


def parameters(training: Training) -> list[nn.Parameter]:
    return [*training.student.parameters(), *training.distillation.parameters()]


def weights(training: Training) -> dict[str, Tensor]:
    """All that a run learns, and BatchNorm's statistics."""
    parts = {
        "student": training.student,
        "distillation": training.distillation,
        "ema": training.ema.average,
    }
    copied = {}
    for part, module in parts.items():
        for name, value in module.state_dict().items():
            copied[f"{part} {name}"] = value.clone()
    return copied


# --- what a rank does


def train(case: Case, data: Store) -> list[dict[str, Any]]:
    """-> after each update: steps done, sums of the losses, weights."""
    share = {"rank": distributed.rank(), "world": distributed.world()}
    loader = DoubleLoader(data, BATCH, EPOCHS, case.task.augment, seed=1, **share)
    training = make_training(case, loader)
    training.replica = distributed.replicate(training.student)
    progress = training.progress
    states: list[dict[str, Any]] = []
    done = 0
    while done < STEPS:
        engine.train_one_epoch(training, Stop())
        done = progress.epoch * len(loader) + progress.step
        states.append({"done": done, "sums": dict(progress.sums), "weights": weights(training)})
        if progress.step == len(loader):
            progress.next_epoch()
    return states


def stopped(data: Store) -> list[int]:
    """A signal to rank 1 alone, in step 3.

    -> step at which this rank left, and the signal it knows of.
    """
    stop = Stop()

    class Signalled(DoubleLoader):
        def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Any]]:
            for step, batch in enumerate(super().epoch(epoch, start)):
                if step == 2 and distributed.rank() == 1:
                    stop.signum = SIGTERM
                yield batch

    share = {"rank": distributed.rank(), "world": distributed.world()}
    training = make_training(Case("notes"), Signalled(data, 2, 1, Augment(), seed=0, **share))
    training.recipe = Recipe(1, 2, nbs=2)
    training.replica = distributed.replicate(training.student)
    engine.train_one_epoch(training, stop)
    return [training.progress.step, stop.agreed]


def updates_of(metric: DetectionMetric) -> list[tuple[str, dict[str, Tensor]]]:
    """Name and detections of each image, in the order in which they are scored."""
    updates = []
    for batch in metric.records:
        for number, name in enumerate(batch.ids):
            rows = batch.detections[batch.detections["image"] == number]
            columns = ("scores", "labels", "boxes_xyxy")
            detected = {key: torch.from_numpy(rows[key].copy()) for key in columns}
            updates.append((name, detected))
    return updates


def evaluate(data: Store, batch: int) -> dict[str, Any]:
    metric = DetectionMetric(NAMES)
    evaluated = evaluated_by(metric, DETECTION, data, batch)
    return {**evaluated, "updates": updates_of(metric)}


def evaluate_masks(data: Store, batch: int) -> dict[str, Any]:
    metric = MeanIoU(LABELS)
    evaluated = evaluated_by(metric, SEGMENTATION, data, batch)
    records = [torch.from_numpy(record) for record in metric.records]
    return {**evaluated, "counted": torch.stack(records).sum(0)}


def evaluated_by(metric: Any, task: Task, data: Store, batch: int) -> dict[str, Any]:
    torch.manual_seed(2)
    loader = ValLoader(data, batch, distributed.rank(), distributed.world())
    autocast, _ = precision(False, CPU)
    scores = engine.evaluate(task.network(), loader, metric, autocast)
    return {"scores": scores, "batches": len(loader)}


def read(data: Store, limit: int) -> str:
    """What is said where rank 1 has read only so many of the images."""
    inputs = Inputs()
    inputs.add_set("data.train", data)
    if distributed.rank() == 1:
        inputs = Inputs([*inputs.items()][: len(NAMES) + limit])
    try:
        inputs.check_ranks()
    except UserError as error:
        return str(error)
    return ""


def uneven() -> dict[str, Any]:
    """Gradients of parameters that some ranks lack, and lists of unequal length."""
    rank = distributed.rank()
    both, one, none, fixed = (nn.Parameter(torch.zeros(2)) for _ in range(4))
    fixed.requires_grad_(False)
    both.grad = torch.tensor([1.0, 2.0]) * (rank + 1)
    if rank == 1:
        one.grad = torch.tensor([3.0, 5.0])
    distributed.average_gradients_([both, one, none, fixed])
    broadcast = torch.tensor([rank + 7])
    distributed.broadcast_([broadcast])
    return {
        "gradients": [p.grad for p in (both, one, none, fixed)],
        "dealt": distributed.deal([[0, 2, 4], [1]][rank]),
        "largest": distributed.largest([3, 9][rank], CPU),
        "broadcast": broadcast,
    }


def work(root: Path, out: Path) -> None:
    torch.set_num_threads(1)
    distributed.start(CPU, 1.0)
    data = store_of(root, "train")
    masked = store_of(root, "train", SEGMENTATION)
    held_out = store_of(root, "val")
    held_out_masks = store_of(root, "val", SEGMENTATION)
    results: dict[str, Any] = {
        "evaluate": {batch: evaluate(held_out, batch) for batch in (6, 4, 16)},
        "evaluate masks": {batch: evaluate_masks(held_out_masks, batch) for batch in (6, 4, 16)},
        "uneven": uneven(),
        "read": {limit: read(data, limit) for limit in (24, 23, 20)},
    }
    Tensor.float = precise.float_or_double  # type: ignore[method-assign]
    labelled = store_of(root, "train", CLASSIFICATION)
    sets = {DETECTION.data: data, SEGMENTATION.data: masked, CLASSIFICATION.data: labelled}
    sets[REGIONS.data] = store_of(root, "train", REGIONS)
    results["train"] = {name: train(case, sets[case.task.data]) for name, case in CASES.items()}
    results["stopped"] = stopped(data)
    torch.rand_like = splits.same_mask
    results["splits"] = splits.among_ranks()
    print(f"only rank {distributed.rank()} speaks")
    torch.save(results, out / f"{distributed.rank()}.pt")
    distributed.finish()


if __name__ == "__main__":
    work(*map(Path, sys.argv[1:]))
