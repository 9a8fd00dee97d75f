"""4,000 mutants of each kind of file that is read: each loads or is refused in one line, in a
process that may not take more memory than a good file needs many times over.
"""

import os
import resource
import signal
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from kdmini import checkpoint
from kdmini.contracts import UserError
from kdmini.defaults import defaults, filled
from kdmini.detection.yolo11 import weights
from kdmini.detection.yolo11.model import YOLO11
from kdmini.optim import EMA, Recipe, apply_setting, make_optimizer
from kdmini.progress import Progress
from kdmini.resume import check_inputs, check_resumable, with_processes
from kdmini.tools.load import load_detector
from tests.detection.yolo11.weight_files import public_classes, public_file, public_model
from tests.faults.children import Child
from tests.faults.mutants import mutants
from tests.faults.record import survived

MUTANTS = 4000  # of a kind
CHILDREN = 2  # that share them
LIMIT_S = 10  # of one file, by the processor's clock
BUDGET_S = 900  # of a kind; it takes 60 where nothing else runs
MEMORY = 2**30  # bytes that a child may take beside what it began with


class Kind(NamedTuple):
    """A kind of file."""

    write: Callable[[Path], object]
    read: Callable[[Path], object]  # raises UserError for what it refuses


# --- best.pt

NAMES = ["cup", "dog"]
SMALL = [0.25, 0.01, 64]  # a YOLO11 of the narrowest layers


def write_best(path: Path) -> None:
    detector = YOLO11(names=NAMES, scale=SMALL)
    checkpoint.save_best(path, detector, imgsz=64, epoch=3, fitness=0.5)


def read_best(path: Path) -> None:
    """All are read; of those that load every fifth becomes a detector, which takes longer."""
    weights.read(path)
    if zlib.crc32(path.read_bytes()) % 5:
        return
    load_detector(path)


# --- a file of ultralytics


def write_public(path: Path) -> None:
    """As of a YOLO11n from mid-training, by the width of its first layer and by its modules;
    all else is narrow, for the size of a file is the time that a mutant takes.
    """
    detector = YOLO11(names=NAMES, scale=SMALL)
    detector.model[0].conv = nn.Conv2d(3, 16, 3, bias=False)
    optimizer = {"state": {0: {"momentum_buffer": torch.rand(3)}}, "param_groups": [{}]}
    with public_classes() as classes:
        whole = public_model(classes, detector)
        public_file(path, None, ema=whole, optimizer=optimizer, train_args={"imgsz": 64})


# --- a checkpoint

WRITTEN = {"run": "runs/a", "data": {"imgsz": 64, "limit": None}}
SETTINGS = filled(WRITTEN, defaults(WRITTEN))
INPUTS = {"train: images": "24", "teacher": "sha256 0123456789abcdef"}
RECIPE = Recipe(epochs=4, batch=8)


def parts_of_a_run() -> dict[str, Any]:
    torch.manual_seed(0)
    student = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2))
    distillation = nn.ModuleDict({"align": nn.Conv2d(2, 3, 1)})
    return {
        "student": student,
        "ema": EMA(student, RECIPE.ema_decay, RECIPE.ema_tau),
        "distillation": distillation,
        "optimizer": make_optimizer([student, distillation], RECIPE),
        "scaler": torch.amp.GradScaler("cpu"),
        "progress": Progress(2, 3, 0.5, 1, 0, {"box": 1.5}, {"box": 3}, 0, 2.0),
    }


def write_checkpoint(path: Path) -> None:
    checkpoint.save(path.parent / "ckpt", 11, parts_of_a_run(), with_processes(SETTINGS))
    content = checkpoint.load(checkpoint.numbered(path.parent / "ckpt", 11))
    checkpoint.save_atomic({**content, "inputs": INPUTS}, path)


def read_checkpoint(path: Path) -> None:
    """As a resumed run does, and one step from there."""
    content = checkpoint.load(path)
    check_resumable(path, content, SETTINGS)
    check_inputs(path, content, INPUTS, allowed=False)
    parts = parts_of_a_run()
    checkpoint.restore(content, parts, path)

    student = parts["student"]
    optimizer = parts["optimizer"]
    apply_setting(optimizer, RECIPE.at(11, 4))
    loss = student(torch.rand(2, 3, 2, 2)).sum()
    parts["scaler"].scale(loss).backward()
    optimizer.step()
    parts["ema"].update(student)
    parts["progress"].means()


KINDS = {
    "best.pt": Kind(write_best, read_best),
    "public file": Kind(write_public, weights.read),
    "checkpoint": Kind(write_checkpoint, read_checkpoint),
}


# --- what comes of them


class Hanging(BaseException):
    """No Exception, so that nothing catches it."""


def hang(*_: object) -> None:
    raise Hanging


def try_all(kind: Kind, folder: Path, count: int, seed: int) -> None:
    """Writes a line for each file: what came of it.

    What is neither refused in a line nor loaded is kept in the folder.
    """
    whole = (folder.parent / "whole.pt").read_bytes()
    signal.signal(signal.SIGPROF, hang)
    limit = bytes_of_addresses() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    path = folder / "mutant.pt"
    with (folder / "came").open("w", buffering=1) as came:
        for number, content in enumerate(mutants(whole, count, seed)):
            path.write_bytes(content)
            signal.setitimer(signal.ITIMER_PROF, LIMIT_S)
            outcome = outcome_of(kind, path)
            signal.setitimer(signal.ITIMER_PROF, 0)
            if outcome not in ("loaded", "refused"):
                path.rename(folder / f"{number}.pt")
            came.write(f"{outcome}\n")


def outcome_of(kind: Kind, path: Path) -> str:
    try:
        kind.read(path)
    except UserError as error:
        message = str(error)
        one_line = "\n" not in message and message.isprintable() and len(message) < 1000
        return "refused" if one_line and str(path) in message else f"told badly: {message!r}"
    except BaseException as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return "loaded"


def bytes_of_addresses() -> int:
    """Of this process, in use or not."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc and RLIMIT_AS")
@pytest.mark.parametrize("name", KINDS)
def test_every_mutant_loads_or_is_refused_in_one_line(tmp_path, name):
    kind = KINDS[name]
    kind.write(tmp_path / "whole.pt")
    kind.read(tmp_path / "whole.pt")  # the file itself is good

    children = []
    for seed in range(CHILDREN):
        folder = tmp_path / str(seed)
        folder.mkdir()

        def work(folder: Path = folder, seed: int = seed) -> None:
            try_all(kind, folder, MUTANTS // CHILDREN, seed)

        children.append(Child(work, folder / "out"))
    codes = [child.wait(BUDGET_S) for child in children]

    files = [tmp_path / str(seed) / "came" for seed in range(CHILDREN)]
    came = [line for file in files for line in file.read_text().splitlines()]
    wrong = {line for line in came if line not in ("loaded", "refused")}
    assert not wrong, wrong
    assert codes == [0] * CHILDREN, [child.text() for child in children]
    assert len(came) == MUTANTS
    assert came.count("loaded") > MUTANTS / 100  # not all fail at the door
    survived(f"Weights: mutants of a {name}", tried=MUTANTS)
