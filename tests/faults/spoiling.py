"""What train.py puts together, in this process, with a fault in a place of its choice."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from kdmini.data.loader import Augment, TrainLoader
from kdmini.data.store import Store
from kdmini.detection.voc import VOC
from kdmini.detection.yolo11.model import YOLO11
from kdmini.device import precision
from kdmini.distill.attention import AttentionTransfer
from kdmini.distill.step import Distillation, Weighted, tap_shapes
from kdmini.engine import Training, train_one_epoch
from kdmini.optim import EMA, Recipe, make_optimizer
from kdmini.progress import Progress
from kdmini.signals import Stop

NAMES = ["circle", "square", "triangle", "star", "ring", "cross"]
TAPS = ["model.6", "model.8", "model.13", "model.16", "model.19", "model.22"]
SCALE = [0.5, 0.0625, 1024]  # a YOLO11 of 0.2 M parameters
CPU = torch.device("cpu")
BAD = [math.nan, math.inf]
TERMS = ["box", "cls", "dfl", "attention"]
PLACES = [*TERMS, "activation", "image"]


class Fault(NamedTuple):
    place: str  # one of PLACES
    value: float  # one number in that place is multiplied by it


class Bench:
    """Real batches, detectors, taps and optimiser. While there is a `fault`, every forward
    pass is spoilt by it.
    """

    def __init__(
        self, shapes: Path, amp: bool | str = False, batch: int = 4, fold: bool = True, **settings
    ):
        torch.manual_seed(0)
        usual = {"epochs": 1000, "batch": batch, "amp": amp, "nbs": batch, "warmup_epochs": 0}
        self.recipe = Recipe(**{**usual, **settings})
        dataset = VOC(str(shapes), ["train"], names=NAMES)
        store = Store(dataset, 64, workers=1, storage="resident")
        self.loader = TrainLoader(store, batch, 1000, Augment())
        self.student = YOLO11(NAMES, SCALE)
        self.teacher = YOLO11(NAMES, SCALE)
        if not fold:
            self.teacher.fold = None  # its BatchNorm statistics stay
        self.ema = EMA(self.student, 0.99, 10.0)
        taps = {tap: tap for tap in TAPS}
        term = AttentionTransfer()
        terms = {"attention": Weighted(term, 0.75)}
        sizes = tap_shapes(self.student, self.teacher, taps, 64)
        self.distillation = Distillation(self.student, self.teacher, terms, taps, sizes)
        self.optimizer = make_optimizer([self.student, self.distillation], self.recipe)
        autocast, self.scaler = precision(amp, CPU)
        self.progress = Progress()
        self.training = Training(
            loader=self,
            student=self.student,
            distillation=self.distillation,
            optimizer=self.optimizer,
            scaler=self.scaler,
            ema=self.ema,
            recipe=self.recipe,
            autocast=autocast,
            progress=self.progress,
        )

        self.fault: Fault | None = None
        self.hits = 0  # spoilt so far
        self._watch(term)

    def _watch(self, term: AttentionTransfer) -> None:
        """Puts `spoil` in the way of the losses, the term and one activation."""
        loss = self.student.loss
        attention = term.forward

        def spoilt_loss(preds, targets):
            losses = loss(preds, targets)
            return {name: self.spoil(name, value) for name, value in losses.items()}

        def spoilt_attention(*views):
            return self.spoil("attention", attention(*views))

        def spoilt_activation(module, args, output):
            return self.spoil("activation", output)

        self.student.loss = spoilt_loss
        term.forward = spoilt_attention
        self.student.model[3].register_forward_hook(spoilt_activation)

    def spoil(self, place: str, value: Tensor) -> Tensor:
        if not self.fault or self.fault.place != place:
            return value
        self.hits += 1
        spoilt = value.clone()
        spoilt.view(-1)[0] *= self.fault.value
        return spoilt

    # --- the loader, as train_one_epoch sees it

    def __len__(self) -> int:
        return len(self.loader)

    def epoch(self, epoch: int, start: int = 0) -> Iterator:
        for images, targets in self.loader.epoch(epoch, start):
            yield self.spoil("image", images), targets

    # --- training

    def train(self, stop: Stop) -> None:
        train_one_epoch(self.training, stop)
        if self.progress.step == len(self):
            self.progress.next_epoch()

    def update(self, place: str = "", value: float = math.nan) -> None:
        """One update, spoilt where a place is given, as a run makes it that was asked to stop."""
        self.fault = Fault(place, value) if place else None
        stop = Stop()
        stop.signum = 15
        self.train(stop)
        self.fault = None

    def steps(self) -> int:
        """Batches done since the beginning."""
        return self.progress.epoch * len(self) + self.progress.step

    # --- what came of it

    def state(self) -> dict[str, Tensor]:
        """Copies of all that a skipped update must not change; counters are left out."""
        learned: dict[str, Tensor] = {}
        for part, module in (("student", self.student), ("align", self.distillation)):
            for name, parameter in module.named_parameters():
                if parameter.requires_grad:
                    learned[f"{part} {name}"] = parameter
        tensors = dict(learned)
        for name, parameter in learned.items():
            tensors[f"momentum {name}"] = self.optimizer.state[parameter]["momentum_buffer"]
        for name, value in self.ema.average.state_dict().items():
            if value.is_floating_point():
                tensors[f"ema {name}"] = value
        return {name: value.detach().clone() for name, value in tensors.items()}

    def statistics(self) -> dict[str, Tensor]:
        """Of the BatchNorm of the student."""
        return dict(self.student.named_buffers())


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    return [name for name in before if not torch.equal(before[name], after[name])]


def broken(tensors: dict[str, Tensor]) -> list[str]:
    """The names of those that hold NaN or infinity."""
    return [name for name, value in tensors.items() if not value.isfinite().all()]
