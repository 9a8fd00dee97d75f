"""Signals: a run that is told to stop loses nothing, and goes on as if it never had been."""

import contextlib
import signal
import time
from typing import Any, NamedTuple

import pytest

from kdmini import engine, signals
from tests.conftest import CLASSIFICATION, SEGMENTATION
from tests.faults.children import Child
from tests.faults.record import survived
from tests.faults.runs import (
    STEPS,
    Runs,
    Wholes,
    Work,
    assert_as_never_stopped,
    few,
    high_scale,
    nothing,
    result,
    stop_at,
)

# --- by a signal


def slow_evaluation() -> None:
    def evaluate(*args: Any) -> None:
        print("evaluating")
        time.sleep(30)

    engine.evaluate = evaluate  # type: ignore


class Moment(NamedTuple):
    """When the signal is sent."""

    ready: int | str  # steps done, or a word printed before
    overrides: tuple[str, ...] = ()
    first: Work = nothing


MOMENTS = {
    "warm-up": Moment(1),
    "training": Moment(8),
    "accumulation": Moment(7, ("train.nbs=16",)),
    "evaluation": Moment("evaluating", first=slow_evaluation),
}
MASKED = {
    "training on masks": Moment(8, SEGMENTATION),
    "evaluation on masks": Moment("evaluating", SEGMENTATION, slow_evaluation),
}
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.mark.parametrize(
    ("moment", "signum"),
    few(
        [
            *[(moment, signum) for moment in MOMENTS for signum in SIGNALS],
            *[(moment, signal.SIGTERM) for moment in MASKED],
        ],
        ("training", signal.SIGINT),
        ("accumulation", signal.SIGHUP),
        ("evaluation", signal.SIGTERM),
        ("training on masks", signal.SIGTERM),
    ),
)
def test_a_signal_to_the_group_loses_no_step(
    runs: Runs, whole: Wholes, moment: str, signum: signal.Signals
) -> None:
    ready, overrides, first = {**MOMENTS, **MASKED}[moment]
    child = Child(runs.watched(runs.begin(*overrides), first=first), runs.folder / "out")
    if isinstance(ready, str):
        child.until(lambda: ready in child.text())
    else:
        child.until(lambda: runs.steps() >= ready)
    child.send(signum)
    assert child.wait() == 128 + signum, child.text()
    lost = runs.steps() - runs.newest()
    if first is nothing:
        assert f"{signum.name}: finishing the step" in child.text()

    done = runs.tried(runs.watched(runs.resume()))
    assert done.code == 0, done.text
    assert_as_never_stopped(runs, whole(*overrides))
    fault = "Saving: SIGINT, SIGTERM, SIGHUP in training and in evaluation"
    if moment in MASKED:
        fault = "Saving: SIGTERM in training and in evaluation, on masks"
    survived(fault, lost, of="steps")


def test_a_signal_as_the_step_ends_is_told(runs: Runs) -> None:
    def just_before() -> None:
        due = engine.leave_is_due

        def signalled(*args: Any) -> bool:
            signal.raise_signal(signal.SIGTERM)
            return due(*args)

        engine.leave_is_due = signalled

    done = runs.tried(runs.watched(runs.begin(), first=just_before))
    assert done.code == 143
    assert done.text.count("SIGTERM: finishing the step") == 1


def test_control_signals_that_nothing_delays_do_lose_steps(runs: Runs) -> None:
    def at_once() -> None:
        signals.delayed = lambda **_: contextlib.nullcontext(signals.Stop())  # type: ignore

    assert runs.tried(runs.watched(runs.begin(), stop_at(8), at_once)).code == 143
    assert runs.steps() == 8
    assert runs.newest() == STEPS


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (signal.SIGHUP, signal.SIGHUP),  # bash and the system, when a terminal closes
        (signal.SIGTERM, signal.SIGTERM),  # `timeout`, to its child and then to its group
        (signal.SIGINT, signal.SIGINT),  # the terminal and a launcher
        (signal.SIGINT, signal.SIGTERM),
    ],
)
def test_a_signal_that_comes_twice_loses_no_step(
    runs: Runs, whole: Wholes, first: signal.Signals, second: signal.Signals
) -> None:
    def twice(done: int) -> None:
        if done == 8:
            signal.raise_signal(first)
            signal.raise_signal(second)

    done = runs.tried(runs.watched(runs.begin(), twice))
    assert done.code == 128 + first, done.text
    lost = runs.steps() - runs.newest()
    done = runs.tried(runs.watched(runs.resume()))
    assert done.code == 0, done.text
    assert_as_never_stopped(runs, whole())
    survived("Saving: the same stop told twice", lost, of="steps")


def test_a_second_ctrl_c_leaves_at_once_with_the_old_checkpoint(runs: Runs) -> None:
    def hang(done: int) -> None:
        if done == STEPS + 1:
            print("within a step that takes long")
            time.sleep(30)

    child = Child(runs.watched(runs.begin(), hang), runs.folder / "out")
    child.until(lambda: "takes long" in child.text())
    before = runs.files()
    begun = time.monotonic()
    child.send(signal.SIGINT)
    time.sleep(signals.ECHO_S + 0.1)
    assert child.running()
    child.send(signal.SIGINT)
    assert child.wait() == 130, child.text()
    assert time.monotonic() - begun < 5
    assert runs.files() == before
    assert runs.newest() == STEPS
    survived("Saving: a second SIGINT while the first is being obeyed", of="checkpoints")


def test_a_hangup_that_nohup_ignores_stays_ignored(runs: Runs) -> None:
    def nohup() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    done = runs.tried(runs.watched(runs.begin(), stop_at(2, signal.SIGHUP), nohup))
    assert done.code == 0, done.text
    assert runs.steps() == runs.newest() == 2 * STEPS


# --- and resumed


class Exact(NamedTuple):
    """A run that is stopped and resumed, perhaps several times."""

    stops: tuple[int, ...]  # steps that each process does before it is stopped
    overrides: tuple[str, ...] = ()
    then: tuple[str, ...] = ()  # overrides of the resumed run
    first: Work = nothing


WITH_WORKERS = ("data.workers=2",)
WITHOUT_WORKERS = ("data.workers=0",)
FP16 = ("train.amp=fp16",)
EXACT = {
    "after step 1": Exact((1,)),
    "mid-epoch, then without workers": Exact((8,), WITH_WORKERS, then=WITHOUT_WORKERS),
    "at the end of an epoch": Exact((STEPS,)),
    "after the last step": Exact((2 * STEPS,)),
    "twice in one epoch": Exact((7, 2)),
    "without workers, then with": Exact((9,), WITHOUT_WORKERS, then=WITH_WORKERS),
    "accumulating 4 batches": Exact((7,), ("train.nbs=16",)),
    "accumulating 8 batches, in the warm-up": Exact((3,), ("train.nbs=32",)),
    "accumulating 8 batches": Exact((8,), ("train.nbs=32",)),
    "fp16, between overflows": Exact((2,), FP16, first=high_scale),
    "fp16, after overflows": Exact((8, 1), FP16, first=high_scale),
    "every step": Exact((1,) * (2 * STEPS), ("train.nbs=4",)),
    "masks, twice in one epoch": Exact((7, 2), SEGMENTATION),
    "labels, twice in one epoch": Exact((7, 2), CLASSIFICATION),
}
QUICK = (
    "twice in one epoch",
    "fp16, between overflows",
    "masks, twice in one epoch",
    "labels, twice in one epoch",
)


@pytest.mark.parametrize("case", few(EXACT, *QUICK))
def test_resumed_is_bit_for_bit_as_never_stopped(runs: Runs, whole: Wholes, case: str) -> None:
    stops, overrides, then, first = EXACT[case]
    work = runs.begin(*overrides)
    for steps in stops:
        done = runs.tried(runs.watched(work, stop_at(steps), first))
        assert done.code == 143, done.text
        work = runs.resume(*then)
    done = runs.tried(runs.watched(work))  # without `first`: the scale is the file's
    assert done.code == 0, done.text

    other = whole(*overrides, first=first)
    assert_as_never_stopped(runs, other)
    if first is high_scale:
        skipped = sum(record.get("skipped", 0) for record in result(other)["records"])
        assert 0 < skipped < 2 * STEPS
    fault = "Saving: stopped and resumed, compared bit for bit"
    task = case.partition(",")[0]
    if task in ("masks", "labels"):
        fault += f", on {task}"
    survived(fault, of="bits", tried=len(stops))
