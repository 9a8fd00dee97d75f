"""What is asked of the programs on a device, each in a process of its own: a small run on
generated shapes, all that starts from it, and the evidence. For bench.first_gpu.
"""

import csv
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch

from bench.card import OF_A_CARD

ROOT = Path(__file__).parents[1]
GRACE_S = 30  # for a program that is told to stop: a run saves itself

EPOCHS = 8  # of the teacher, until it detects something

# so small that a CPU has all of it in seconds, and a teacher that detects nothing
SCENES = ("--train", 8, "--val", 4, "--size", 64)
SCALE = "scale=[0.5, 0.0625, 1024]"
SMALL = ("data.imgsz=64", "train.batch=4", "train.nbs=4", "data.workers=2", f"student.{SCALE}")
ALL_BUT_THE_TEACHER = "error: --check: teacher, held-out images failed, see above"


class Programs:
    """The questions, each a method that answers in a line, and raises where the answer is
    that it does not work.

    scratch: a folder. ends: when a program is stopped, by time.monotonic().
    """

    def __init__(self, device: torch.device, scratch: Path, ends: float):
        self.device = device
        self.scratch = scratch
        self.ends = ends
        self.cuda = device.type == "cuda"
        self.weights = scratch / "teacher/best.pt"  # of the teacher

    def teacher(self) -> str:
        """The shapes, and what the other runs start from."""
        scenes = () if self.cuda else SCENES
        self.command("-m", "examples.shapes", "--root", self.scratch / "shapes", *scenes)
        size = ["student.scale=s", f"train.epochs={EPOCHS}"] if self.cuda else ["train.epochs=1"]
        said = self.train("teacher", "teacher=null", "distill=null", *size, compiled=False)
        return next(line for line in said if line.startswith("finished"))

    def check(self) -> str:
        if self.cuda:
            return self.distil("check", "--check", compiled=True)[-1]
        said = self.distil("check", "--check", expected=1)
        if said[-1] != ALL_BUT_THE_TEACHER:
            raise AssertionError(said[-1])
        return "as it should be of a teacher that has learned for seconds"

    def repeats(self) -> str:
        """Two runs that must end alike to the bit."""
        ends = []
        for run in ("first", "second"):
            self.distil(run, "train.epochs=2", "deterministic=true")
            records = (self.scratch / run / "metrics.jsonl").read_text()
            ends.append(without_speed(records))
        if ends[0] != ends[1]:
            raise AssertionError(f"not equal: {ends[0]} {ends[1]}")
        return "equal to the bit"

    def ranks(self) -> str:
        said = self.distil("ranks", "train.epochs=1", torchrun=True)
        return next(line for line in said if line.startswith("epoch 1:"))

    def out_of_memory(self) -> str:
        if not self.cuda:
            return OF_A_CARD
        arguments = ("student.scale=x", "train.batch=128", "data.imgsz=2560", "train.epochs=1")
        said = self.distil("large", *arguments, expected=1)
        if "Traceback" in "".join(said) or "out of memory on the device" not in said[-1]:
            raise AssertionError(said[-1])
        return said[-1]

    def evaluated(self) -> str:
        self.require_teacher()
        config = self.weights.with_name("config.yaml")
        said = self.command("eval.py", "--config", config, "--weights", self.weights)
        return "; ".join(line for line in said if line.startswith(("all classes", "student:")))

    def step(self, imgsz: int, batch: int, rounds: int) -> str:
        """The rows of bench.step: ms an image, and how many times faster than the first."""
        said = self.command(
            *("-m", "bench.step", "--eager", "--device", self.device),
            *("--imgsz", imgsz, "--batch", batch, "--rounds", rounds),
        )
        cells = [line.strip("|").split("|") for line in said if line.startswith("| ")]
        rows = [[cell.strip() for cell in row] for row in cells]
        measured = [f"{name} {cost} ms, {faster}" for name, cost, faster in rows if name]
        if not any(line.startswith("ultralytics") for line in measured):
            measured.append("no ultralytics here")
        return "; ".join(measured)

    def evidence(self, data: Path, runs: Path) -> str:
        """As many rows as there is time for. A run that is stopped goes on the next time.

        data: folder of the photographs. runs: of the run folders.
        """
        folders = ["--runs", runs, "--root", data]
        with suppress(subprocess.TimeoutExpired):
            self.command("-m", "bench.evidence", "gpu", "--seeds", 0, *folders)
        rows = [f"{run} {score}" for run, score in scores_of(runs)]
        return f"{', '.join(rows) or 'no run has a score yet'}; to go on: --runs {runs}"

    # --- processes

    def require_teacher(self) -> None:
        if not self.weights.exists():
            self.teacher()

    def distil(
        self,
        run: str,
        *arguments: str,
        compiled: bool = False,
        torchrun: bool = False,
        expected: int = 0,
    ) -> list[str]:
        """A run from the teacher."""
        self.require_teacher()
        weights = [f"teacher.weights={self.weights}"]
        if not self.cuda:
            weights.append(f"teacher.{SCALE}")
        return self.train(
            run, *weights, *arguments, compiled=compiled, torchrun=torchrun, expected=expected
        )

    def train(
        self,
        run: str,
        *arguments: str,
        compiled: bool,
        torchrun: bool = False,
        expected: int = 0,
    ) -> list[str]:
        start = ["-m", "torch.distributed.run", "--nproc-per-node", 1] if torchrun else []
        return self.command(
            *(*start, "train.py", "--config", "configs/demo.yaml"),
            f"data.root={self.scratch / 'shapes'}",
            f"run={self.scratch / run}",
            f"device={self.device}",
            f"compile={str(compiled).lower()}",
            *(() if self.cuda else SMALL),
            *arguments,
            expected=expected,
        )

    def command(self, *arguments: object, expected: int = 0) -> list[str]:
        """The lines that a command printed, stderr's last.

        Raises RuntimeError where its exit code is not the expected one, and
        subprocess.TimeoutExpired where it had to be stopped.
        """
        process = subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            output, errors = process.communicate(timeout=max(self.ends - time.monotonic(), 1))
        except subprocess.TimeoutExpired:
            stop(process)
            raise
        if process.returncode != expected:
            last = (output + errors).strip().splitlines()[-1:]
            raise RuntimeError(f"exit code {process.returncode}: {''.join(last)}")
        return (output + (errors if expected else "")).strip().splitlines()


def stop(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.communicate(timeout=GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()


def without_speed(records: str) -> str:
    return "\n".join(line.split(', "images/s"')[0] for line in records.splitlines())


def scores_of(runs: Path) -> Iterator[tuple[str, str]]:
    """Name of a run and its last score AP50-95, of those that have one."""
    for path in sorted(runs.glob("*/results.csv")):
        with path.open() as file:
            scores = [row.get("score/AP50-95") for row in csv.DictReader(file)]
        known = [score for score in scores if score]
        if known:
            yield path.parent.name, f"{float(known[-1]):.3f}"
