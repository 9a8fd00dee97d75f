"""What is asked of a device in the process itself: results beside the CPU's, speed, memory,
waits. For bench.first_gpu.
"""

import collections
import gc
import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import measure
from bench.full import Epoch, Noise
from bench.step import Ours, noise
from kdmini.data.loader import Augment, TrainLoader
from kdmini.data.render import render
from kdmini.data.store import Storage, Store
from kdmini.device import half_of, precision

# a pixel further away in the buffer than 32 bits can count
FAR = 4_300_000_000

PICTURES = 4
OF_A_CARD = "of a card alone"
CALLERS = 5  # of an event of the profiler that are named, itself the first

# how far the device may be from the CPU
OF_PICTURES = 1e-4  # of 0..1
OF_LOSSES = 1e-2  # relative


class Card:
    """The questions, each a method that answers in a line.

    batch, steps: of a measured epoch. rounds: how often it is timed.
    """

    def __init__(self, device: torch.device, imgsz: int, batch: int, steps: int, rounds: int):
        self.device = device
        self.imgsz = imgsz
        self.batch = batch
        self.steps = steps
        self.rounds = rounds
        self.cuda = device.type == "cuda"

    # --- results

    def pictures(self) -> str:
        """Rendered batches: the largest difference from the CPU's, in 0..1."""
        expected = self.rendered(torch.device("cpu"), compiled=False, shift=0)
        variants = {"eager": (False, 0)}
        if self.cuda:
            variants["compiled"] = (True, 0)
            variants["eager, far"] = (False, FAR)
            variants["compiled, far"] = (True, FAR)
        apart = {}
        for name, (compiled, shift) in variants.items():
            images = self.rendered(self.device, compiled, shift)
            apart[name] = float((images - expected).abs().max())
        return "largest difference from the CPU's: " + near(apart, OF_PICTURES)

    def rendered(self, device: torch.device, compiled: bool, shift: int) -> torch.Tensor:
        """shift: pixels that lie before the first image in the buffer."""
        with quiet():
            store = Store(
                Noise(PICTURES), self.imgsz, device, storage="resident", compiled=compiled
            )
        if shift:
            count = len(store.pixels)
            buffer = torch.zeros(shift + count, dtype=torch.int32, device=device)
            buffer[shift:] = store.pixels
            store.pixels = buffer
            store.offsets = store.offsets + shift
        loader = TrainLoader(store, PICTURES, 10, Augment())
        layout = loader.layout(0, np.arange(PICTURES))
        return render(store, layout, self.imgsz).cpu()

    def losses(self) -> str:
        """Task and term of one batch in float32, eager and compiled, beside the CPU's."""
        before = torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = False
        try:
            apart = self.losses_apart()
        finally:
            torch.backends.cudnn.allow_tf32 = before
        return "largest relative difference from the CPU's: " + near(apart, OF_LOSSES)

    def losses_apart(self) -> dict[str, float]:
        torch.manual_seed(2)
        images, targets = noise(2, self.imgsz, "cpu")
        expected = losses_of(Ours(images, targets))
        placed: Any = {
            name: value.to(self.device) if isinstance(value, torch.Tensor) else value
            for name, value in targets.items()
        }
        apart = {}
        for name in ("eager", "compiled") if self.cuda else ("eager",):
            ours = Ours(images.to(self.device), placed, compiled=name == "compiled")
            values = losses_of(ours)
            apart[name] = max(abs(values[key] / expected[key] - 1) for key in expected)
        return apart

    def precision_of_true(self) -> str:
        """What `amp: true` means here."""
        autocast, _ = precision(True, self.device)
        dtype = half_of(autocast, self.device) or torch.float32
        return str(dtype).removeprefix("torch.")

    # --- speed, memory, waits

    def epoch(self, amp: str | bool, compiled: bool = False) -> str:
        """Images/s of training, peak memory, and where the host waited for the device."""
        epoch = self.make_epoch(amp, compiled)
        waits = self.waits(epoch.run)
        seconds = self.take_turns({"epoch": epoch.run})["epoch"]
        speed = self.images / np.median(seconds)
        means = epoch.training.progress.means()
        losses = " ".join(f"{name} {value:.3f}" for name, value in means.items())
        return f"{speed:.0f} images/s{self.peak()}, {losses}, waits of {self.steps} steps: {waits}"

    def memory(self, amp: str | bool = "bf16") -> str:
        """MB of an image more in the batch."""
        if not self.cuda:
            return OF_A_CARD
        sizes = [max(self.batch // 2, 1), self.batch]
        peaks = []
        for batch in sizes:
            epoch = self.make_epoch(amp, False, batch=batch)
            epoch.run()
            peaks.append(torch.cuda.max_memory_allocated(self.device) / 1e6)
            del epoch
        slope = (peaks[1] - peaks[0]) / (sizes[1] - sizes[0])
        return f"{slope:.0f} MB an image, {peaks[1] - slope * sizes[1]:.0f} MB beside them"

    def parts_of_a_step(self) -> str:
        """The bare models, and the batches alone, beside the epoch."""
        epoch = self.make_epoch("bf16", False)
        works = {
            "bare models": epoch.run_bare,
            "epoch": epoch.run,
            "batches alone": epoch.render,
        }
        return self.costs(self.take_turns(works))

    def evaluation(self) -> str:
        """A pass over the images, and where the host waited."""
        epoch = self.make_epoch("bf16", False)
        cost = self.costs(self.take_turns({"evaluation": epoch.evaluate}))
        waits = self.waits(epoch.evaluate)
        return f"{cost}, waits of {self.images} images in {self.steps} batches: {waits}"

    def storages(self) -> str:
        """Pixels on the device, beside those in a file."""
        works: dict[str, Callable[[], object]] = {}
        storages: list[Storage] = ["resident", "mapped"]
        for storage in storages:
            epoch = self.make_epoch("bf16", False, storage=storage)
            works[f"{storage}, epoch"] = epoch.run
            works[f"{storage}, batches alone"] = epoch.render
        return self.costs(self.take_turns(works))

    def make_epoch(
        self,
        amp: str | bool,
        compiled: bool,
        batch: int | None = None,
        storage: Storage = "resident",
    ) -> Epoch:
        """One that has run already; the peak of memory counts from here. batch: in place of
        this card's.
        """
        if self.cuda:
            gc.collect()  # hooks and networks of the epoch before hold each other
            torch.cuda.empty_cache()
        size = batch or self.batch
        epoch = Epoch(self.imgsz, size, self.steps, compiled, self.device, storage, amp)
        epoch.run()  # which tries out convolutions, with workspaces of their own
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        return epoch

    @property
    def images(self) -> int:
        """Of an epoch."""
        return self.batch * self.steps

    def take_turns(self, works: dict[str, Callable[[], object]]) -> dict[str, np.ndarray]:
        return measure.take_turns(works, self.rounds, self.device.type)

    def costs(self, seconds: dict[str, np.ndarray]) -> str:
        return ", ".join(
            f"{name} {1000 * np.median(values) / self.images:.2f} ms an image"
            for name, values in seconds.items()
        )

    def peak(self) -> str:
        if not self.cuda:
            return ""
        return f", peak {torch.cuda.max_memory_allocated(self.device) / 1e9:.1f} GB"

    def waits(self, work: Callable[[], object]) -> str:
        """The lines, then the operators of the profiler, at which the host waited."""
        if not self.cuda:
            return "-"
        places: collections.Counter[str] = collections.Counter()
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            work()
        torch.cuda.set_sync_debug_mode("default")
        for warning in caught:
            if "synchroniz" in str(warning.message):
                places[f"{Path(warning.filename).name}:{warning.lineno}"] += 1

        with torch.profiler.profile() as profile:
            work()
        for event in profile.events():
            if "Synchronize" in event.name:
                places[" < ".join(callers(event))] += 1
        return ", ".join(f"{place} x{count}" for place, count in places.items()) or "none"


@contextmanager
def quiet() -> Iterator[None]:
    """Without progress bars."""
    with redirect_stderr(io.StringIO()):
        yield


def losses_of(ours: Ours) -> dict[str, float]:
    """Task and term, in float32."""
    with torch.autocast(ours.images.device.type, enabled=False):
        preds = ours.student(ours.images)
        task = ours.student.loss(preds, ours.targets)
        kd = ours.distillation(ours.images, preds, ours.targets, 0)
    return {name: value.item() for name, value in {**task, **kd}.items()}


def near(apart: dict[str, float], bound: float) -> str:
    """The differences in words. Raises AssertionError where one is beyond the bound."""
    text = ", ".join(f"{name} {value:.1e}" for name, value in apart.items())
    if not all(value <= bound for value in apart.values()):  # NaN too
        raise AssertionError(f"{text}; {bound:g} is the bound")
    return text


def callers(event: Any) -> list[str]:
    """The names of an event of the profiler and of those around it."""
    names: list[str] = []
    while event is not None and len(names) < CALLERS:
        names.append(event.name)
        event = event.cpu_parent
    return names
