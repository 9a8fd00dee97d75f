"""What an epoch costs beside its bare models: loop, loader, optimiser, evaluation.

python -m bench.full [--imgsz 320] [--batch 4] [--steps 6] [--rounds 9] [--compile]
python -m bench.full --device cuda --imgsz 640 --batch 64 --steps 40 --compile

YOLO11m teaches YOLO11s at random weights on generated noise of the size of VOC's
photographs, held in memory. In turn: an epoch as train.py runs it, from the rendered batch
to the averaged weights; and as many steps of forward, loss, teacher, terms and backward on
one batch that exists. What the first takes more is the loop's. On an H100 or an A100 the
share of the roofline is told: the images/s at which every tensor that cannot be avoided is
moved once.
"""

import argparse
import io
from contextlib import redirect_stderr

import numpy as np
import torch

from bench import measure
from bench.step import TAPS, Ours, Student
from kdmini import engine
from kdmini.bounds import Count, ImageSize
from kdmini.data.loader import Augment, TrainLoader, ValLoader
from kdmini.data.store import Storage, Store
from kdmini.detection.average_precision import DetectionMetric
from kdmini.detection.truth import Boxes, Target
from kdmini.detection.voc import VOC_NAMES
from kdmini.device import choose_algorithms, half_of, pick_device, precision
from kdmini.engine import Training
from kdmini.optim import EMA, Recipe, make_optimizer
from kdmini.progress import Progress
from kdmini.signals import Stop
from kdmini.typed import argument

# images/s at ROOFLINE_SIZE with the teacher folded and without its head, all fused:
# bytes moved per image over peak bandwidth
ROOFLINE = {"H100": 2005, "A100": 870}
ROOFLINE_SIZE = 640

WIDTH = 500  # pixels of a generated picture
HEIGHT = 375


class Noise:
    """A dataset of `count` pictures, each with as many objects, or else with two or three."""

    truth = Boxes

    def __init__(self, count: int, objects: int | None = None):
        self.count = count
        self.objects = objects
        self.names = list(VOC_NAMES)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[np.ndarray, Target]:
        rng = np.random.default_rng(index)
        objects = self.objects or 2 + index % 2
        corners = np.sort(rng.uniform(0, (WIDTH, HEIGHT), (objects, 2, 2)), 1)
        target: Target = {
            "boxes_xyxy": corners.reshape(-1, 4).astype(np.float32),
            "labels": rng.integers(0, len(self.names), objects),
            "difficult": np.zeros(objects, bool),
            "id": str(index),
        }
        return rng.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8), target


class Epoch:
    """An epoch by engine.train_one_epoch, and its bare models."""

    def __init__(
        self,
        imgsz: int,
        batch: int,
        steps: int,
        compiled: bool,
        device: torch.device,
        storage: Storage = "resident",
        amp: bool | str = True,
    ):
        pictures = Noise(batch * steps)
        with redirect_stderr(io.StringIO()):  # a progress bar
            store = Store(pictures, imgsz, device, storage=storage, compiled=compiled)
        recipe = Recipe(epochs=1000, batch=batch, nbs=batch)
        loader = TrainLoader(store, batch, recipe.epochs, Augment(close_mosaic=0))
        images, targets = next(loader.epoch(0))
        # the average is of a student without taps, which a copy would take along
        ema = EMA(Student(images, targets).student, recipe.ema_decay, recipe.ema_tau)
        autocast, scaler = precision(amp, device)
        self.bare = Ours(images, targets, compiled, half_of(autocast, device))
        self.training = Training(
            loader=loader,
            student=self.bare.student,
            distillation=self.bare.distillation,
            optimizer=make_optimizer([self.bare.student, self.bare.distillation], recipe),
            scaler=scaler,
            ema=ema,
            recipe=recipe,
            autocast=autocast,
            progress=Progress(epoch=recipe.warmup(steps)),
        )
        self.val_loader = ValLoader(store, batch)

    def run(self) -> None:
        with redirect_stderr(io.StringIO()):
            engine.train_one_epoch(self.training, Stop())
        self.training.progress.step = 0

    def run_bare(self) -> None:
        for _ in range(len(self.training.loader)):
            self.bare.step()

    def render(self) -> None:
        for _ in self.training.loader.epoch(0):
            pass

    def evaluate(self) -> None:
        metric = DetectionMetric(list(VOC_NAMES))
        average = self.training.ema.average
        with redirect_stderr(io.StringIO()):
            engine.evaluate(average, self.val_loader, metric, self.training.autocast)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--imgsz", type=argument(ImageSize), default=320)
    parser.add_argument("--batch", type=argument(Count), default=4)
    parser.add_argument("--steps", type=argument(Count), default=6)
    parser.add_argument("--rounds", type=argument(Count), default=9)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()

    device = pick_device(args.device)
    choose_algorithms(deterministic=False)
    kind = "compiled" if args.compile else "eager"
    print(
        f"{measure.machine(device.type)}, imgsz {args.imgsz}, batch {args.batch}, "
        f"{args.steps} steps an epoch, {args.rounds} rounds, {kind}, {len(TAPS)} taps\n"
    )
    epoch = Epoch(args.imgsz, args.batch, args.steps, args.compile, device)
    works = {"bare models": epoch.run_bare, "epoch": epoch.run}
    rest = {"batches alone": epoch.render, "evaluation": epoch.evaluate}
    seconds = measure.take_turns(works, args.rounds, device.type)
    seconds_of_rest = measure.take_turns(rest, args.rounds, device.type)

    images = args.batch * args.steps
    print(measure.table(seconds, "bare models", images, "image"))
    for name, values in seconds_of_rest.items():
        print(f"{name}: {1000 * np.median(values) / images:.3g} ms an image")
    added = seconds["epoch"] / seconds["bare models"] - 1
    low, middle, high = np.percentile(added, measure.QUARTILES)
    print(f"the loop adds {middle:.1%} ({low:.1%}, {high:.1%})")
    if device.type == "cuda":
        print_speed(images / np.median(seconds["epoch"]), args.imgsz)


def print_speed(speed: float, imgsz: int) -> None:
    """speed: images/s."""
    print(f"{speed:.0f} images/s; peak memory {torch.cuda.max_memory_allocated() / 1e9:.1f} GB")
    for card, limit in ROOFLINE.items():
        if card in torch.cuda.get_device_name():
            scaled = limit * (ROOFLINE_SIZE / imgsz) ** 2
            print(f"{speed / scaled:.0%} of the roofline of a {card}")


if __name__ == "__main__":
    main()
