"""What only a real card can answer, in order of worth: one command of at most ten minutes.

python -m bench.first_gpu [--minutes 10] [--record FILE] [--only NAME ...]
python -m bench.first_gpu --device cpu --imgsz 64 --batch 2 --steps 2 --minutes 3

The second form asks a CPU the same, without what takes minutes to compile there. A question
that fails says so in its line and the next is asked; one for which no time is left says
that. With `PYTHONPATH=.oracle/newest`, where `make parity` installs it, ultralytics' own
distillation takes its turns in the step.
"""

import argparse
import collections
import io
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import measure
from bench.full import Epoch, Noise
from bench.step import Ours, noise
from kdmini.data.layout import Layout
from kdmini.data.loader import Augment, TrainLoader
from kdmini.data.render import render
from kdmini.data.store import Store
from kdmini.device import choose_algorithms, pick_device, precision

ROOT = Path(__file__).parents[1]

# a pixel further away in the buffer than 32 bits can count
FAR = 4_300_000_000

PICTURES = 4
MEMORY_STEP = 2  # the second batch size of the memory an image, in parts of the first
LONGEST = 300  # characters of an error in a line


class Questions:
    """The questions, each a method of no arguments that answers in a line."""

    def __init__(self, device: torch.device, imgsz: int, batch: int, steps: int, scratch: Path):
        self.device = device
        self.imgsz = imgsz
        self.batch = batch
        self.steps = steps
        self.scratch = scratch
        self.cuda = device.type == "cuda"

    def pictures(self) -> str:
        """Rendered batches: the largest difference from the CPU's, in 0..1."""
        expected = self.rendered(torch.device("cpu"), compiled=False, shift=0)
        variants = {"eager": (False, 0)}
        if self.cuda:
            variants["compiled"] = (True, 0)
            variants["eager, far"] = (False, FAR)
            variants["compiled, far"] = (True, FAR)
        answers = []
        for name, (compiled, shift) in variants.items():
            images = self.rendered(self.device, compiled, shift)
            answers.append(f"{name} {float((images - expected).abs().max()):.1e}")
        return ", ".join(answers)

    def rendered(self, device: torch.device, compiled: bool, shift: int) -> torch.Tensor:
        """shift: pixels that lie before the first image in the buffer."""
        with redirect_stderr(io.StringIO()):
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
        layout: Layout = loader.layout(0, np.arange(PICTURES))
        return render(store, layout, self.imgsz).cpu()

    def losses(self) -> str:
        """Task and term of one batch in float32, eager and compiled, beside the CPU's."""
        torch.backends.cudnn.allow_tf32 = False
        try:
            return "largest relative difference from the CPU's: " + self.compared_losses()
        finally:
            torch.backends.cudnn.allow_tf32 = True

    def compared_losses(self) -> str:
        torch.manual_seed(2)
        images, targets = noise(2, self.imgsz, "cpu")
        answers = []
        expected = None
        names = ("cpu", "eager", "compiled") if self.cuda else ("cpu", "eager")
        for name in names:
            device = torch.device("cpu") if name == "cpu" else self.device
            placed = {
                key: value.to(device) if isinstance(value, torch.Tensor) else value
                for key, value in targets.items()
            }
            ours = Ours(images.to(device), placed, compiled=name == "compiled")
            with torch.autocast(device.type, enabled=False):
                preds = ours.student(ours.images)
                task = ours.student.loss(preds, ours.targets)
                kd = ours.distillation(ours.images, preds, ours.targets, 0)
            values = {key: value.item() for key, value in {**task, **kd}.items()}
            if expected is None:
                expected = values
                continue
            apart = max(abs(values[key] / expected[key] - 1) for key in expected)
            answers.append(f"{name} {apart:.1e}")
        return ", ".join(answers)

    def epoch(self, amp: str | bool, compiled: bool = False) -> str:
        """Images/s of training, peak memory, and where the host waited for the device."""
        epoch = self.make_epoch(amp, compiled, self.batch)
        waits = self.waits(epoch.run)
        seconds = measure.take_turns({"epoch": epoch.run}, 3, self.device.type)["epoch"]
        speed = self.batch * self.steps / np.median(seconds)
        means = epoch.training.progress.means()
        losses = " ".join(f"{name} {value:.3f}" for name, value in means.items())
        return f"{speed:.0f} images/s{self.peak()}, {losses}, waits: {waits}"

    def memory(self, amp: str | bool = "bf16") -> str:
        """MB of an image more in the batch."""
        if not self.cuda:
            return "of a card alone"
        peaks = []
        sizes = [self.batch // MEMORY_STEP, self.batch]
        for batch in sizes:
            epoch = self.make_epoch(amp, False, batch)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            epoch.run()
            peaks.append(torch.cuda.max_memory_allocated() / 1e6)
            del epoch
        slope = (peaks[1] - peaks[0]) / (sizes[1] - sizes[0])
        return f"{slope:.0f} MB an image, {peaks[1] - slope * sizes[1]:.0f} MB beside them"

    def parts_of_a_step(self) -> str:
        """The bare models, the batches alone and the evaluation."""
        epoch = self.make_epoch("bf16", False, self.batch)
        works = {
            "bare models": epoch.run_bare,
            "epoch": epoch.run,
            "batches alone": epoch.render,
            "evaluation": epoch.evaluate,
        }
        seconds = measure.take_turns(works, 3, self.device.type)
        images = self.batch * self.steps
        return ", ".join(
            f"{name} {1000 * np.median(values) / images:.2f} ms an image"
            for name, values in seconds.items()
        )

    def make_epoch(self, amp: str | bool, compiled: bool, batch: int) -> Epoch:
        if self.cuda:
            torch.cuda.empty_cache()
        epoch = Epoch(self.imgsz, batch, self.steps, compiled, self.device)
        autocast, scaler = precision(amp, self.device)
        epoch.training.autocast = autocast
        epoch.training.scaler = scaler
        epoch.run()
        return epoch

    def waits(self, work: Callable[[], object]) -> str:
        """The operators, or else the lines, at which the host waited for the device."""
        if not self.cuda:
            return "-"
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.set_sync_debug_mode("warn")
        places: collections.Counter[str] = collections.Counter()
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

    def peak(self) -> str:
        if not self.cuda:
            return ""
        return f", peak {torch.cuda.max_memory_allocated() / 1e9:.1f} GB"

    def precision_of_true(self) -> str:
        """What `amp: true` means here."""
        autocast, _ = precision(True, self.device)
        with autocast():
            return str(torch.get_autocast_dtype(self.device.type))

    def step(self) -> str:
        """bench.step, whose own table it prints."""
        return self.command(
            "-m",
            "bench.step",
            "--imgsz",
            self.imgsz,
            "--batch",
            self.batch // 2,
            "--rounds",
            5,
            "--eager",
            "--device",
            self.device,
            lines=40,
        )

    def runs(self) -> str:
        """The demo's teacher, then everything that starts from it."""
        shapes = self.scratch / "shapes"
        self.command("-m", "examples.shapes", "--root", shapes)
        return self.train(
            "teacher",
            "student.scale=s",
            "teacher=null",
            "distill=null",
            "train.epochs=8",
            "compile=false",
            config_of_teacher=True,
            lines=4,
        )

    def check(self) -> str:
        return self.train("check", "--check", f"compile={str(self.cuda).lower()}", lines=20)

    def repeats(self) -> str:
        """Two runs that must end alike to the bit."""
        ends = []
        for name in ("first", "second"):
            self.train(name, "train.epochs=2", "deterministic=true", "compile=false")
            ends.append((self.scratch / name / "metrics.jsonl").read_text())
        first, second = (without_speed(text) for text in ends)
        return "equal" if first == second else f"NOT equal: {first} {second}"

    def ranks(self) -> str:
        return self.train("ranks", "train.epochs=1", "compile=false", torchrun=True)

    def out_of_memory(self) -> str:
        if not self.cuda:
            return "of a card alone"
        return self.train(
            "large",
            "student.scale=x",
            "train.batch=128",
            "data.imgsz=2560",
            "compile=false",
            "train.epochs=1",
        )

    def evaluated(self) -> str:
        weights = self.scratch / "teacher/best.pt"
        return self.command(
            "eval.py",
            "--config",
            self.scratch / "teacher/config.yaml",
            "--weights",
            weights,
            lines=4,
        )

    def train(
        self,
        run: str,
        *arguments: str,
        lines: int = 1,
        torchrun: bool = False,
        config_of_teacher: bool = False,
    ) -> str:
        start = ["-m", "torch.distributed.run", "--nproc-per-node", 1] if torchrun else []
        overrides = [
            f"data.root={self.scratch / 'shapes'}",
            f"device={self.device.type}",
            f"run={self.scratch / run}",
        ]
        if not config_of_teacher:
            overrides.append(f"teacher.weights={self.scratch / 'teacher/best.pt'}")
        return self.command(
            *start, "train.py", "--config", "configs/demo.yaml", *overrides, *arguments, lines=lines
        )

    def command(self, *arguments: object, lines: int = 1) -> str:
        """The last lines that a command printed, and its exit code where that is not 0."""
        done = subprocess.run(
            [sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True
        )
        said = done.stdout if done.returncode == 0 else done.stdout + done.stderr
        last = "\n".join(said.strip().splitlines()[-lines:])
        return last if done.returncode == 0 else f"exit code {done.returncode}: {last}"


def callers(event: Any) -> list[str]:
    """The names of an event of the profiler and of the four around it."""
    names: list[str] = []
    while event is not None and len(names) < 5:
        names.append(event.name)
        event = event.cpu_parent
    return names


def without_speed(text: str) -> str:
    return "\n".join(line.split(', "images/s"')[0] for line in text.splitlines())


def questions_of(ask: Questions) -> dict[str, Callable[[], str]]:
    """By name, in order of worth."""
    listed: dict[str, Callable[[], str]] = {
        "pictures": ask.pictures,
        "losses": ask.losses,
        "`amp: true` is": ask.precision_of_true,
        "epoch, bf16": lambda: ask.epoch("bf16"),
        "compiled epoch, bf16": lambda: ask.epoch("bf16", compiled=ask.cuda),
        "epoch, fp16": lambda: ask.epoch("fp16"),
        "epoch, fp32": lambda: ask.epoch(False),
        "memory": ask.memory,
        "parts, bf16": ask.parts_of_a_step,
        "bench.step": ask.step,
        "teacher of the demo": ask.runs,
        "check": ask.check,
        "deterministic, twice": ask.repeats,
        "torchrun, one rank": ask.ranks,
        "out of memory": ask.out_of_memory,
        "eval.py": ask.evaluated,
    }
    return listed


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--imgsz", type=int, default=640)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--record", type=Path)
    parser.add_argument("--only", nargs="+", help="names of questions, or how they begin")
    args = parser.parse_args()

    device = pick_device(args.device)
    choose_algorithms(deterministic=False)
    text = (
        f"{measure.machine(device.type)}, imgsz {args.imgsz}, batch {args.batch}, "
        f"{args.steps} steps an epoch\n"
    )
    print(text)
    ends = time.monotonic() + 60 * args.minutes
    with tempfile.TemporaryDirectory() as scratch:
        ask = Questions(device, args.imgsz, args.batch, args.steps, Path(scratch))
        for name, question in questions_of(ask).items():
            if args.only and not name.startswith(tuple(args.only)):
                continue
            line = f"{name}: {answer(question, ends)}"
            print(line, flush=True)
            text += line + "\n"
            if args.record:
                args.record.write_text(text)


def answer(question: Callable[[], str], ends: float) -> str:
    started = time.monotonic()
    if started > ends:
        return "no time was left"
    try:
        said = question()
    except Exception as error:  # whatever it is, the next question is asked
        said = f"FAILED, {type(error).__name__}: {str(error)[:LONGEST]}"
    return f"{said} [{time.monotonic() - started:.0f} s]"


if __name__ == "__main__":
    main()
