"""Checkpoints: runs that are killed while they save, files that are damaged, the best."""

import contextlib
import io
import os
import random
import shutil
import signal
import struct
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kdmini import checkpoint, runlog
from kdmini.progress import Progress
from tests.commands import assert_equal
from tests.conftest import CLASSIFICATION, SEGMENTATION
from tests.faults.children import Child, run
from tests.faults.record import survived
from tests.faults.runs import (
    PLAIN,
    Runs,
    Wholes,
    Work,
    assert_as_never_stopped,
    few,
    nothing,
    readable,
)
from tests.test_checkpoint import strike

DAMAGED = "Saving: the newest checkpoint is damaged"

# --- killed


def killed(
    runs: Runs, moment: float, overrides: tuple[str, ...] = PLAIN, first: Work = nothing
) -> bool:
    """Begins a run and kills it `moment` seconds after its first checkpoint.

    -> whether it was still running.
    """
    work = runs.watched(runs.begin(*overrides, "train.save_every=1"), first=first)
    child = Child(work, runs.folder / "out")
    child.until(runs.saved)
    time.sleep(moment)
    child.send(signal.SIGKILL)
    return child.wait() == 137


MASKED = (*SEGMENTATION, *PLAIN)
LABELLED = (*CLASSIFICATION, *PLAIN)
OF_TASK = {PLAIN: "", MASKED: ", on masks", LABELLED: ", on labels"}


@pytest.mark.parametrize(
    ("tries", "overrides"),
    few([(2, PLAIN), (17, PLAIN), (3, MASKED), (1, LABELLED)], (2, PLAIN)),
)
def test_sigkill_at_a_random_moment_costs_one_save_interval_at_most(
    config: Path, whole: Wholes, tmp_path: Path, tries: int, overrides: tuple[str, ...]
) -> None:
    rng = random.Random(tries)
    for attempt in range(tries):
        runs = Runs(config, tmp_path / f"{attempt}")
        while not killed(runs, rng.uniform(0.02, 0.9), overrides):  # it was done already
            shutil.rmtree(runs.folder)
            runs.folder.mkdir()
        finished = runs.steps()
        saved = runs.newest()
        for path in [*runs.saved(), *runs.run.glob("best.pt")]:
            checkpoint.load(path)

        done = runs.tried(runs.watched(runs.resume()))
        assert done.code == 0, done.text
        assert f"resumed from {runs.run}/ckpt/step_{saved:08d}.pt" in done.text
        assert_as_never_stopped(runs, whole(*overrides), journal=False)
        fault = "Saving: SIGKILL at a random moment, a checkpoint every step" + OF_TASK[overrides]
        survived(fault, finished - saved, most=1, of="step")


def plain_save() -> None:
    """torch.save to the very file; with more to write, so that there is time to be killed."""
    more = torch.zeros(12_000_000)

    def save(content: dict, path: Path) -> None:
        torch.save({**content, "more": more}, path)

    checkpoint.save_atomic = save  # type: ignore


def test_control_a_plain_save_does_leave_damaged_files(config: Path, tmp_path: Path) -> None:
    rng = random.Random(0)
    for attempt in range(20):
        runs = Runs(config, tmp_path / f"{attempt}")
        killed(runs, rng.uniform(0, 0.3), first=plain_save)
        if not all(map(readable, runs.saved())):
            return
        shutil.rmtree(runs.folder)
    raise AssertionError("the test above would not notice")


POINTS = {  # where the process ends -> the step of the checkpoint that is found
    "before": 10,
    "torch.save": 10,
    "os.fsync": 10,
    "verify": 10,
    "os.replace": 10,
    "os.open": 20,
}


@pytest.mark.parametrize("point", POINTS)
def test_a_process_that_ends_at_any_point_of_a_save_leaves_the_old_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    folder = tmp_path / "ckpt"
    parts = {"progress": Progress(epoch=1)}
    checkpoint.save(folder, 10, parts, {})

    def work() -> None:
        strike(monkeypatch, point, lambda: os._exit(137))
        checkpoint.save(folder, 20, parts, {})

    assert run(work, tmp_path / "out").code == 137
    assert checkpoint.newest(folder)[0] == checkpoint.numbered(folder, POINTS[point])
    assert all(map(readable, checkpoint.existing(folder)))
    fault = "Saving: the process ends before, within and after each part of a save"
    survived(fault, of="checkpoints")


def test_what_a_kill_left_half_written_is_removed_and_named(stopped: Runs, tmp_path: Path) -> None:
    runs = stopped.copy(tmp_path / "resumed")
    stale = [
        runs.run / "best.pt.tmp",
        runs.run / "ckpt/step_00000010.pt.tmp",
        runs.run / "metrics.jsonl.tmp",
    ]
    for path in stale:
        path.write_text("half")
    done = runs.tried(runs.resume())
    assert done.code == 0, done.text
    for path in stale:
        assert f"removed {path}" in done.text
    assert not runs.temporary()


def test_what_was_left_of_a_run_that_was_killed_while_it_wrote_its_config(runs: Runs) -> None:
    runs.run.mkdir()
    (runs.run / "config.yaml.tmp").write_text("half")
    done = runs.tried(runs.begin("train.epochs=1"))
    assert done.code == 0, done.text
    assert f"removed {runs.run}/config.yaml.tmp" in done.text
    assert not runs.temporary()


# --- damaged


def flip(whole: bytes, at: int) -> bytes:
    return whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :]


def flip_sixths(sixths: int) -> Callable[[bytes], bytes]:
    """A byte of a tensor or of the pickle; what lies between them, such as padding, nobody
    reads.
    """

    def damage(whole: bytes) -> bytes:
        wanted = len(whole) * sixths // 6
        start = next(start for start, end in contents(whole) if end > wanted)
        return flip(whole, max(start, wanted))

    return damage


def contents(whole: bytes) -> list[tuple[int, int]]:
    """Where the content of each entry of a zip begins and ends."""
    spans = []
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        for info in archive.infolist():
            names = struct.unpack_from("<HH", whole, info.header_offset + 26)  # their lengths
            start = info.header_offset + 30 + sum(names)
            spans.append((start, start + info.compress_size))
    return sorted(spans)


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "flipped at 1/6": flip_sixths(1),
    "flipped at 2/6": flip_sixths(2),
    "flipped at 3/6": flip_sixths(3),
    "flipped at 4/6": flip_sixths(4),
    "flipped at 5/6": flip_sixths(5),
    "cut": lambda whole: whole[: len(whole) // 2],
    "without its end": lambda whole: whole[:-20],
    "zero bytes": lambda whole: b"",
    "full of zeros": lambda whole: bytes(len(whole)),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(
    stopped: Runs, tmp_path: Path, case: str
) -> None:
    """Whole runs for some; the rest by `newest`, which chooses for them."""
    runs = stopped.copy(tmp_path / "copy")
    before, last = runs.saved()
    last.write_bytes(DAMAGE[case](last.read_bytes()))
    if case in ("flipped at 3/6", "zero bytes"):
        done = runs.tried(runs.resume())
        assert done.code == 0, done.text
        assert f"skipped: {last}" in done.text
        assert f"resumed from {before}" in done.text
    else:
        assert checkpoint.newest(last.parent)[0] == before
    survived(DAMAGED, of="damages unnoticed")


def test_every_flipped_byte_is_noticed_though_torch_is_silent(
    stopped: Runs, tmp_path: Path
) -> None:
    rng = random.Random(0)
    last = stopped.saved()[-1]
    whole = last.read_bytes()
    first_tensor = whole.index(b"/data/0")
    directory = whole.rindex(b"PK\x01\x02")
    file = tmp_path / "flipped.pt"
    noticed = 0
    silent = 0  # flips that torch.load lets pass
    while noticed < 20:
        file.write_bytes(flip(whole, rng.randrange(first_tensor, directory)))
        with contextlib.suppress(Exception):
            torch.load(file, weights_only=True)
            silent += 1
        if readable(file):  # of no effect: padding between the tensors
            assert_equal(checkpoint.load(file), checkpoint.load(last))
            continue
        noticed += 1
        survived(DAMAGED, of="damages unnoticed")
    assert silent > 5  # the control


# --- the best

LISTED = """
import numpy as np

SCORES = {scores}


class Listed:
    fitness = "score"

    def __init__(self, names: list[str]):
        self.records = []

    def update(self, detections, targets):
        pass

    def compute(self):
        return {{"score": SCORES.pop(0), "other": np.float32(0.5)}}
"""
BEST = {  # what the metric returns -> the epoch that best.pt is of
    "[float('nan'), 0.25, float('nan'), 0.125]": 2,
    "[np.float32(0.25), np.float64(0.5), np.float32('nan'), np.float16(0.125)]": 2,
    "[float('nan')] * 4": None,
}


@pytest.mark.parametrize("scores", few(BEST, next(iter(BEST))))
def test_nan_is_never_the_best_and_numbers_of_numpy_do_no_harm(runs: Runs, scores: str) -> None:
    (runs.folder / "listed.py").write_text(LISTED.format(scores=scores))
    work = runs.begin(*PLAIN, "metric={build: listed:Listed}")

    def importing() -> None:
        sys.path.insert(0, str(runs.folder))
        work()

    done = runs.tried(importing)
    assert done.code == 0, done.text
    best = runs.run / "best.pt"
    if BEST[scores] is None:
        assert not best.exists()
    else:
        assert checkpoint.load(best)["epoch"] == BEST[scores]
    assert all(map(readable, runs.saved()))
    records = runlog.RunFolder(runs.run, resume=True).records()
    assert [record["score/other"] for record in records] == [0.5] * 4
    survived("Saving: a metric returns NaN, or numbers of numpy", of="best models")
