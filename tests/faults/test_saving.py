"""Saving, stopping and resuming: runs of train.py that are killed, stopped, damaged and continued.

Whatever happens, what is continued must come out bit for bit as the run that nothing happened to.
"""

import contextlib
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import train
from kdmini import checkpoint, device, engine, runlog, signals
from kdmini.optim import EMA
from kdmini.progress import Progress, Tally
from tests.conftest import CONFIG, TINY
from tests.faults.children import Child, Done, run, script
from tests.faults.record import survived
from tests.test_checkpoint import strike
from tests.test_train import assert_equal

STEPS = 6  # an epoch; there are two, and the first is all warm-up
# twice as fast, for what needs many steps; without accumulation, for checkpoints come after updates
# alone
PLAIN = ("teacher=null", "distill=null", "train.epochs=4", "train.nbs=4")
LONG = pytest.mark.long
Work = Callable[[], object]


def few(cases: Iterable[Any], *quick: Any) -> list[Any]:
    """The cases as parameters; all but the quick ones are marked as long."""
    values = ((case, case if isinstance(case, tuple) else (case,)) for case in cases)
    return [pytest.param(*value, marks=() if case in quick else LONG) for case, value in values]


def nothing(*_: object) -> None:
    pass


class Runs:
    """Calls of train.py in one folder, and what came of them. `journal` has a line for all that a
    step computes.
    """

    def __init__(self, config: Path, folder: Path):
        self.config, self.folder = config, folder
        self.run, self.journal = folder / "run", folder / "journal"
        folder.mkdir(parents=True, exist_ok=True)

    def begin(self, *overrides: object) -> Work:
        return script(train, "--config", self.config, f"run={self.run}", *overrides)

    def resume(self, *overrides: object) -> Work:
        return script(train, "--resume", self.run, *overrides)

    def watched(
        self, work: Work, after_step: Callable[[int], object] = nothing, first: Work = nothing
    ) -> Work:
        """-> the work, which in the child calls first(), keeps the journal, and calls
        after_step(steps it has done).
        """

        def watching() -> None:
            first()
            file, count = self.journal.open("a", buffering=1), itertools.count(1)
            add, apply_setting, update = Tally.add, engine.apply_setting, EMA.update

            def adding(tally: Any, losses: Any, skipped: Any, ids: Any) -> None:
                add(tally, losses, skipped, ids)
                values = {name: value.item() for name, value in losses.items()}
                print("step", ids, values, None if skipped is None else skipped.item(), file=file)
                torch.rand(1)  # so that the state of the random numbers is another after every step
                after_step(next(count))

            def applying(optimizer: Any, setting: Any) -> None:
                print(setting, file=file)
                apply_setting(optimizer, setting)

            def updating(ema: EMA, *args: Any) -> None:
                update(ema, *args)
                print("average of", ema.updates, file=file)

            Tally.add, engine.apply_setting, EMA.update = adding, applying, updating  # type: ignore
            work()

        return watching

    def steps(self) -> int:
        """Steps finished, by the journal."""
        return self.journal.read_text().count("\nstep ") if self.journal.exists() else 0

    def saved(self) -> list[Path]:
        return checkpoint.existing(self.run / "ckpt")

    def newest(self) -> int:
        """The step of the newest checkpoint."""
        return int(self.saved()[-1].stem.removeprefix("step_"))

    def tried(self, work: Work, **limits: float) -> Done:
        return run(work, self.folder / "out", **limits)

    def files(self) -> dict[Path, tuple[bytes, int]]:
        """All that is in the run folder, but the lock, with the time it was written."""
        paths = [path for path in self.run.rglob("*") if path.is_file() and path.name != "lock"]
        return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}

    def copy(self, folder: Path) -> "Runs":
        other = Runs(self.config, folder)
        shutil.copytree(self.run, other.run)
        return other


def result(runs: Runs) -> dict[str, Any]:
    """All that a run leaves, without the name of its folder and the time it took."""
    state = checkpoint.load(runs.saved()[-1])
    del state["config"], state["progress"]["seconds"]
    records = [json.loads(line) for line in (runs.run / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        record.pop("images/s", None)
    return {"checkpoint": state, "best": checkpoint.load(runs.run / "best.pt"), "records": records}


def assert_as_never_stopped(runs: Runs, whole: Runs, journal: bool = True) -> None:
    assert_equal(result(runs), result(whole))
    assert (
        not journal or runs.journal.read_text() == whole.journal.read_text()
    )  # each step once, and the same
    assert not list(runs.run.rglob("*.tmp"))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, shapes: Path) -> Path:
    path = tmp_path_factory.mktemp("saving") / "config.yaml"
    text = CONFIG.format(run="unnamed", shapes=shapes, tiny=TINY)
    path.write_text(text.replace("epochs: 4, batch: 8, nbs: 16", "epochs: 2, batch: 4, nbs: 8"))
    return path


@pytest.fixture
def runs(config: Path, tmp_path: Path) -> Runs:
    return Runs(config, tmp_path / "runs")


Wholes = Callable[..., Runs]


@pytest.fixture(scope="module")
def whole(config: Path) -> Wholes:
    """-> the run with these overrides that nothing happened to; each is made once."""
    made: dict[object, Runs] = {}

    def get(*overrides: str, first: Work = nothing) -> Runs:
        if (overrides, first) not in made:
            runs = made[overrides, first] = Runs(config, config.parent / f"whole{len(made)}")
            done = runs.tried(runs.watched(runs.begin(*overrides), first=first))
            assert done.code == 0, done.text
        return made[overrides, first]

    return get


@pytest.fixture(scope="module")
def stopped(config: Path) -> Runs:
    """In fp16, so that the scaler has a state; stopped after step 9, and there is a checkpoint of
    step 8 too.
    """
    runs = Runs(config, config.parent / "stopped")
    work = runs.begin("train.amp=fp16", "train.save_every=1", "train.nbs=4")
    done = runs.tried(runs.watched(work, stop_at(9), high_scale))
    assert done.code == 143 and runs.newest() == 9 and len(runs.saved()) == 2, done.text
    return runs


def stop_at(step: int, signum: int = signal.SIGTERM) -> Callable[[int], None]:
    def after_step(done: int) -> None:
        if done == step:
            signal.raise_signal(signum)

    return after_step


def high_scale() -> None:
    """In fp16 the first gradients overflow."""
    precision = device.precision

    def high(*args: Any) -> Any:
        autocast, scaler = precision(*args)
        return autocast, torch.amp.GradScaler(
            "cpu", init_scale=2.0**18
        ) if scaler.is_enabled() else scaler

    device.precision = high


# --- killed ---


def readable(path: Path) -> bool:
    try:
        checkpoint.load(path)
    except Exception:
        return False
    return True


def killed(runs: Runs, moment: float, first: Work = nothing) -> bool:
    """Begins a run and kills it `moment` seconds after its first checkpoint; -> whether it was
    still running.
    """
    child = Child(
        runs.watched(runs.begin(*PLAIN, "train.save_every=1"), first=first), runs.folder / "out"
    )
    child.until(runs.saved)
    time.sleep(moment)
    child.send(signal.SIGKILL)
    return child.wait() == 137


@pytest.mark.parametrize("tries", [2, pytest.param(20, marks=LONG)])
def test_sigkill_at_a_random_moment_costs_one_save_interval_at_most(
    config: Path, whole: Wholes, tmp_path: Path, tries: int
) -> None:
    rng = random.Random(tries)
    for attempt in range(tries):
        runs = Runs(config, tmp_path / f"{attempt}")
        while not killed(runs, rng.uniform(0.02, 0.9)):  # it was done already
            shutil.rmtree(runs.folder), runs.folder.mkdir()
        finished, saved = runs.steps(), runs.newest()
        for path in [*runs.saved(), *runs.run.glob("best.pt")]:
            checkpoint.load(path)
        done = runs.tried(runs.watched(runs.resume()))
        assert (
            done.code == 0 and f"resumed from {runs.run}/ckpt/step_{saved:08d}.pt" in done.text
        ), done.text
        assert_as_never_stopped(runs, whole(*PLAIN), journal=False)
        survived(
            "Saving: SIGKILL at a random moment, a checkpoint every step",
            finished - saved,
            most=1,
            of="step",
        )


def plain_save() -> None:
    """torch.save to the very file; with more to write, so that there is time to be killed."""
    more = torch.zeros(12_000_000)
    checkpoint.save_atomic = lambda content, path: torch.save({**content, "more": more}, path)  # type: ignore


def test_control_a_plain_save_does_leave_damaged_files(config: Path, tmp_path: Path) -> None:
    rng = random.Random(0)
    for attempt in range(20):
        runs = Runs(config, tmp_path / f"{attempt}")
        killed(runs, rng.uniform(0, 0.3), plain_save)
        if not all(map(readable, runs.saved())):
            return
        shutil.rmtree(runs.folder)
    raise AssertionError("the test above would not notice")


POINTS = {
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
    folder, parts = tmp_path / "ckpt", {"progress": Progress(epoch=1)}
    checkpoint.save(folder, 10, parts, {})

    def work() -> None:
        strike(monkeypatch, point, lambda: os._exit(137))
        checkpoint.save(folder, 20, parts, {})

    assert run(work, tmp_path / "out").code == 137
    assert checkpoint.newest(folder)[0] == checkpoint.numbered(folder, POINTS[point])
    assert all(map(readable, checkpoint.existing(folder)))
    survived(
        "Saving: the process ends before, within and after each part of a save", of="checkpoints"
    )


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
    assert done.code == 0 and all(f"removed {path}" in done.text for path in stale), done.text
    assert not list(runs.run.rglob("*.tmp"))

    fresh = Runs(stopped.config, tmp_path / "fresh")  # killed while it wrote its config
    fresh.run.mkdir()
    (fresh.run / "config.yaml.tmp").write_text("half")
    done = fresh.tried(fresh.begin("train.epochs=1"))
    assert done.code == 0 and f"removed {fresh.run}/config.yaml.tmp" in done.text, done.text
    assert not list(fresh.run.rglob("*.tmp"))


# --- stopped ---


def slow_evaluation() -> None:
    def evaluate(*args: Any) -> None:
        print("evaluating")
        time.sleep(30)

    engine.evaluate = evaluate  # type: ignore


STOPS = {  # moment -> overrides, steps done or a word said before the signal is sent
    "warm-up": ((), 1),
    "training": ((), 8),
    "accumulation": (("train.nbs=16",), 7),
    "evaluation": ((), "evaluating"),
}


SIGNALS = [
    (moment, signum)
    for moment in STOPS
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
]


@pytest.mark.parametrize(
    ("moment", "signum"),
    few(
        SIGNALS,
        ("training", signal.SIGINT),
        ("accumulation", signal.SIGHUP),
        ("evaluation", signal.SIGTERM),
    ),
)
def test_a_signal_to_the_group_loses_no_step(
    runs: Runs, whole: Wholes, moment: str, signum: signal.Signals
) -> None:
    overrides, ready = STOPS[moment]
    first = slow_evaluation if moment == "evaluation" else nothing
    child = Child(runs.watched(runs.begin(*overrides), first=first), runs.folder / "out")
    child.until(lambda: ready in child.text() if isinstance(ready, str) else runs.steps() >= ready)
    child.send(signum)
    assert child.wait() == 128 + signum, child.text()
    lost = runs.steps() - runs.newest()
    assert moment == "evaluation" or f"{signum.name}: finishing the step" in child.text()
    done = runs.tried(runs.watched(runs.resume()))
    assert done.code == 0, done.text
    assert_as_never_stopped(runs, whole(*overrides))
    survived("Saving: SIGINT, SIGTERM, SIGHUP in training and in evaluation", lost, of="steps")


def test_control_signals_that_nothing_delays_do_lose_steps(runs: Runs) -> None:
    def at_once() -> None:
        signals.delayed = lambda **_: contextlib.nullcontext(signals.Stop())  # type: ignore

    assert runs.tried(runs.watched(runs.begin(), stop_at(8), at_once)).code == 143
    assert (runs.steps(), runs.newest()) == (8, STEPS)


def test_a_second_signal_leaves_at_once_with_the_old_checkpoint(runs: Runs) -> None:
    def hang(done: int) -> None:
        if done == STEPS + 1:
            print("within a step that takes long")
            time.sleep(30)

    child = Child(runs.watched(runs.begin(), hang), runs.folder / "out")
    child.until(lambda: "takes long" in child.text())
    before, begun = runs.files(), time.monotonic()
    child.send(signal.SIGINT)
    time.sleep(0.1)
    assert child.running()
    child.send(signal.SIGINT)
    assert child.wait() == 130 and time.monotonic() - begun < 5, child.text()
    assert runs.files() == before and runs.newest() == STEPS
    survived("Saving: a second SIGINT while the first is being obeyed", of="checkpoints")


def test_a_hangup_that_nohup_ignores_stays_ignored(runs: Runs) -> None:
    def nohup() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    done = runs.tried(runs.watched(runs.begin(), stop_at(2, signal.SIGHUP), nohup))
    assert done.code == 0 and runs.steps() == runs.newest() == 2 * STEPS, done.text


class Exact(NamedTuple):
    stops: tuple[int, ...]  # steps that each process does before it is stopped
    overrides: tuple[str, ...] = ()
    then: tuple[str, ...] = ()  # overrides of the resumed run
    first: Work = nothing


EXACT = {
    "after step 1": Exact((1,)),
    "mid-epoch, then without workers": Exact((8,), ("data.workers=2",), ("data.workers=0",)),
    "at the end of an epoch": Exact((STEPS,)),
    "after the last step": Exact((2 * STEPS,)),
    "twice in one epoch": Exact((7, 2)),
    "without workers, then with": Exact((9,), ("data.workers=0",), ("data.workers=2",)),
    "accumulating 4 batches": Exact((7,), ("train.nbs=16",)),
    "accumulating 8 batches, in the warm-up": Exact((3,), ("train.nbs=32",)),
    "accumulating 8 batches": Exact((8,), ("train.nbs=32",)),
    "fp16, between overflows": Exact((2,), ("train.amp=fp16",), (), high_scale),
    "fp16, after overflows": Exact((8, 1), ("train.amp=fp16",), (), high_scale),
    "every step": Exact((1,) * (2 * STEPS), ("train.nbs=4",)),
}


@pytest.mark.parametrize("case", few(EXACT, "twice in one epoch", "fp16, between overflows"))
def test_resumed_is_bit_for_bit_as_never_stopped(runs: Runs, whole: Wholes, case: str) -> None:
    stops, overrides, then, first = EXACT[case]
    for steps, work in zip(
        stops, [runs.begin(*overrides), *[runs.resume(*then)] * len(stops)], strict=False
    ):
        done = runs.tried(runs.watched(work, stop_at(steps), first))
        assert done.code == 143, done.text
    done = runs.tried(runs.watched(runs.resume(*then)))  # without `first`: the scale is the file's
    assert done.code == 0, done.text
    other = whole(*overrides, first=first)
    assert_as_never_stopped(runs, other)
    if first is high_scale:
        assert 0 < sum(record.get("skipped", 0) for record in result(other)["records"]) < 2 * STEPS
    survived("Saving: stopped and resumed, compared bit for bit", of="bits", tried=len(stops))


# --- resumed from something else ---


def paths(state: Any, depth: int = 3) -> Iterator[tuple[Any, ...]]:
    """Keys, through dicts and lists of dicts; of the many tensors of a model only a few."""
    if isinstance(state, list):
        state = dict(enumerate(state)) if state and isinstance(state[0], dict) else {}
        yield from ((key, *rest) for key in state for rest in paths(state[key], depth))
    elif isinstance(state, dict) and depth:
        keys = list(state)
        for key in keys if len(keys) < 30 else (keys[0], keys[len(keys) // 2], keys[-1]):
            yield (key,)
            yield from ((key, *rest) for rest in paths(state[key], depth - 1))


def harmless(path: tuple[Any, ...]) -> bool:
    """Losses added up until now come and go with the terms; and what a config may have otherwise."""
    within_config = ".".join(map(str, path[1:])) if path[0] == "config" else ""
    return (
        path[:2] in (("progress", "sums"), ("progress", "counts")) and len(path) > 2
    ) or within_config in train.FREE


def without(state: Any, path: tuple[Any, ...]) -> Any:
    key, *rest = path
    if isinstance(state, list):
        return [without(item, tuple(rest)) if i == key else item for i, item in enumerate(state)]
    return type(state)(
        (k, without(v, tuple(rest)) if k == key else v)
        for k, v in state.items()
        if k != key or rest
    )


@pytest.mark.parametrize("every", [16, pytest.param(1, marks=LONG)])
def test_whatever_is_missing_from_a_checkpoint_is_named(
    stopped: Runs, tmp_path: Path, every: int
) -> None:
    runs, state = stopped.copy(tmp_path / "copy"), checkpoint.load(stopped.saved()[-1])
    missing = [path for path in paths(state) if not harmless(path)]
    assert len(missing) > 60
    assert {path[0] for path in missing} == set(state)
    for path in missing[::every]:
        for file in runs.saved():  # both, so that there is nothing to fall back on
            checkpoint.save_atomic(without(state, path), file)
        done = runs.tried(runs.resume())
        name = path[-1]
        if (
            path in [("config", "device"), ("config", "processes")] or name == "root"
        ):  # warned of, if anything
            assert done.code == 0 and (
                name == "root" or f"warning: {name} was None" in done.text
            ), done.text
            runs = stopped.copy(tmp_path / f"copy_{name}")
            continue
        assert done.code == 1 and str(runs.saved()[-1]) in done.last, (path, done.text)
        assert re.search(rf"lacks {name!r}|\b{name} was None", done.last), (path, done.last)
        survived(
            "Saving: a piece of the state is missing from the checkpoint", of="pieces unnoticed"
        )


NAMES = "[square, circle, triangle, star, ring, cross]"
REFUSED = {
    "train.batch": ["train.batch=8"],
    "seed": ["seed=4"],
    "student.scale": ["student.scale=[0.5, 0.125, 1024]"],
    "data.imgsz": ["data.imgsz=96"],
    "train.lr0": ["train.lr0=0.02"],
    "train.epochs": ["train.epochs=3"],
    "distill.attention.weight": ["distill.attention.weight=0.5"],
    "teacher": ["teacher=null", "distill=null"],
    "data.train.names": [f"data.train.names={NAMES}", f"data.val.names={NAMES}"],
}
WARNED = {
    "data.workers": "data.workers=0",
    "train.patience": "train.patience=9",
    "data.root": "data.root={root}",
}


@pytest.mark.parametrize("key", REFUSED)
def test_a_change_that_would_not_be_the_same_run_is_refused_by_name(
    stopped: Runs, tmp_path: Path, key: str
) -> None:
    runs = stopped.copy(tmp_path / "copy")
    before = runs.files()
    done = runs.tried(runs.resume(*REFUSED[key]))
    assert done.code == 1 and f"{key} was " in done.last and "begin another run" in done.last, (
        done.text
    )
    assert runs.files() == before and "decode" not in done.text
    survived("Saving: resumed with a config that is another run's", of="runs mixed")


def test_a_change_that_makes_no_difference_is_told_and_goes_on(
    stopped: Runs, shapes: Path, tmp_path: Path
) -> None:
    runs = stopped.copy(tmp_path / "copy")
    (tmp_path / "moved").symlink_to(shapes)
    done = runs.tried(
        runs.resume(*(change.format(root=tmp_path / "moved") for change in WARNED.values()))
    )
    assert done.code == 0 and all(f"warning: {key} was" in done.text for key in WARNED), done.text
    other = stopped.copy(tmp_path / "other")
    assert other.tried(other.resume()).code == 0
    assert_equal(result(runs), result(other))


def test_a_finished_run_says_so_and_nothing_changes(whole: Wholes, tmp_path: Path) -> None:
    runs = whole().copy(tmp_path / "copy")
    before = runs.files()
    for work in (runs.resume(), runs.resume("data.workers=0")):
        done = runs.tried(work)
        assert (
            done.code == 0 and "finished: best epoch" in done.text and "decode" not in done.text
        ), done.text
        assert runs.files() == before
    done = runs.tried(runs.begin())
    assert done.code == 1 and "holds a run already" in done.last and "--resume" in done.last, (
        done.text
    )
    assert runs.files() == before
    (runs.run / "config.yaml").unlink()
    before = runs.files()
    assert (
        runs.tried(runs.begin()).code == 1 and runs.files() == before
    )  # results are never written over


@pytest.mark.parametrize("there", ["nothing", "an empty folder", "a config alone"])
def test_there_is_nothing_to_resume(runs: Runs, there: str) -> None:
    if there != "nothing":
        runs.run.mkdir()
    if there == "a config alone":
        shutil.copy(runs.config, runs.run / "config.yaml")
    done = runs.tried(runs.resume())
    assert done.code == 1 and str(runs.run) in done.last and "Traceback" not in done.text, done.text


# --- the disk ---


def error_in_save(error: Exception) -> Work:
    def first() -> None:
        def save(content: Any, file: Any) -> None:
            if "progress" in content and content["progress"]["epoch"] == 1:
                file.write(b"half")
                raise error
            saving(content, file)

        saving, torch.save = torch.save, save

    return first


def file_size_limit() -> None:
    """As a quota: no file can grow beyond 1 MB once the first epoch is done."""

    def save(folder: Path, step: int, *args: Any) -> None:
        saving(folder, step, *args)
        if step == STEPS:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))

    saving, checkpoint.save = checkpoint.save, save


FULL = {
    "OSError": error_in_save(OSError(28, "No space left on device")),
    "RuntimeError": error_in_save(
        RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")
    ),
    "a limit of the system": file_size_limit,
}


@pytest.mark.parametrize("case", few(FULL, "a limit of the system"))
def test_a_full_disk_stops_the_run_with_what_it_needs_and_keeps_the_old(
    runs: Runs, whole: Wholes, case: str
) -> None:
    done = runs.tried(runs.watched(runs.begin(), first=FULL[case]))
    assert_told_of_a_full_disk(done)
    assert (
        all(map(readable, runs.saved()))
        and runs.newest() == STEPS
        and not list(runs.run.rglob("*.tmp"))
    )
    done = runs.tried(runs.watched(runs.resume()))
    assert done.code == 0, done.text
    assert_as_never_stopped(runs, whole(), journal=False)
    survived("Saving: the disk is full", of="checkpoints")


def assert_told_of_a_full_disk(done: Done) -> None:
    assert done.code == 1 and "Traceback" not in done.text, done.text
    assert re.search(
        r"cannot save .*\.pt .*needs \d+\.\d MB, \d+\.\d MB are free; make room and resume",
        done.last,
    )


def test_a_disk_that_really_is_full(config: Path, tmp_path: Path) -> None:
    runs = Runs(config, tmp_path / "runs")
    runs.run.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=10m", "tmpfs", str(runs.run)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    try:
        done = runs.tried(runs.begin("train.save_every=1"))
        assert_told_of_a_full_disk(done)
        assert (
            runs.saved() and all(map(readable, runs.saved())) and not list(runs.run.rglob("*.tmp"))
        )
        mount[4] = "remount,size=100m"
        subprocess.run(mount, check=True, capture_output=True)
        done = runs.tried(runs.resume())
        assert done.code == 0, done.text
        survived("Saving: the disk is full", of="checkpoints")
    finally:
        subprocess.run(["umount", str(runs.run)], check=True)


@pytest.mark.parametrize("what", ["the folder", "the lock"])
def test_a_folder_that_cannot_be_written_is_found_before_anything_is_built(
    config: Path, what: str
) -> None:
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to other users
        runs = Runs(Path(shutil.copy(config, name)), Path(name))
        runs.run.mkdir()
        if what == "the lock":
            shutil.copy(config, runs.run / "config.yaml")
            (runs.run / "lock").touch(mode=0o444)
        for path, mode in ((runs.config, 0o644), (runs.folder, 0o755), (runs.run, 0o555)):
            path.chmod(mode)
        if what == "the lock":
            (runs.run / "config.yaml").chmod(0o644), runs.run.chmod(0o777)
        work = runs.begin() if what == "the folder" else runs.resume()

        def somebody() -> None:
            if os.getuid() == 0:
                os.setuid(65534)
            work()

        done = runs.tried(somebody)
        assert done.code == 1 and "cannot write the run folder" in done.last, done.text
        assert (
            str(runs.run) in done.last
            and "decode" not in done.text
            and "Traceback" not in done.text
        )
        survived("Saving: the run folder is read-only", of="runs begun")


DAMAGE: dict[str, Callable[[bytearray], bytes]] = {
    **{
        f"flipped at {at}/6": lambda whole, at=at: flip(whole, len(whole) * at // 6)
        for at in range(1, 6)
    },
    "cut": lambda whole: whole[: len(whole) // 2],
    "without its end": lambda whole: whole[:-20],
    "zero bytes": lambda whole: b"",
    "full of zeros": lambda whole: bytes(len(whole)),
}


def flip(whole: bytearray, at: int) -> bytes:
    return whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :]


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(
    stopped: Runs, tmp_path: Path
) -> None:
    """Whole runs for some; the rest by `newest`, which chooses for them."""
    before, last = stopped.saved()
    for number, (case, damage) in enumerate(DAMAGE.items()):
        runs = stopped.copy(tmp_path / f"{number}")
        victim = runs.saved()[-1]
        victim.write_bytes(damage(bytearray(last.read_bytes())))
        if case in ("flipped at 3/6", "zero bytes"):
            done = runs.tried(runs.resume())
            assert done.code == 0 and f"skipped: {victim}" in done.text, (case, done.text)
            assert f"resumed from {runs.run}/ckpt/{before.name}" in done.text
        else:
            assert checkpoint.newest(victim.parent)[0].name == before.name, case
        survived("Saving: the newest checkpoint is damaged", of="damages unnoticed")


def test_every_flipped_byte_is_noticed_though_torch_is_silent(
    stopped: Runs, tmp_path: Path
) -> None:
    rng, file = random.Random(0), tmp_path / "flipped.pt"
    whole, silent = bytearray(stopped.saved()[-1].read_bytes()), 0
    tensors = whole.index(b"/data/0"), whole.rindex(b"PK\x01\x02")
    noticed = 0
    while noticed < 20:
        file.write_bytes(flip(whole, rng.randrange(*tensors)))
        with contextlib.suppress(Exception):
            torch.load(file, weights_only=True)
            silent += 1
        if readable(file):  # of no effect: padding between the tensors
            assert_equal(checkpoint.load(file), checkpoint.load(stopped.saved()[-1]))
            continue
        noticed += 1
        survived("Saving: the newest checkpoint is damaged", of="damages unnoticed")
    assert silent > 5  # the control: torch.load alone lets most of them pass


# --- several runs, one folder ---


def hang_after(step: int) -> Callable[[int], None]:
    def after_step(done: int) -> None:
        if done == step:
            print("waiting")
            time.sleep(60)

    return after_step


def test_a_second_run_in_the_folder_is_refused_until_the_first_is_gone(
    runs: Runs, whole: Wholes, tmp_path: Path
) -> None:
    first = Child(runs.watched(runs.begin(), hang_after(8)), tmp_path / "first")
    first.until(lambda: "waiting" in first.text())
    half = runs.run / "ckpt/step_00000009.pt.tmp"
    half.write_text("the first run is at it")
    before = runs.files()
    for work, words in (
        (runs.resume(), f"locked by pid {first.pid}"),
        (runs.begin(), "holds a run already"),
    ):
        done = runs.tried(work)
        assert done.code == 1 and words in done.last and str(runs.run) in done.last, done.text
    assert runs.files() == before  # the half-written file among them
    first.send(signal.SIGKILL)
    assert first.wait() == 137
    done = runs.tried(runs.watched(runs.resume()))
    assert done.code == 0 and f"removed {half}" in done.text, done.text
    assert_as_never_stopped(runs, whole(), journal=False)
    survived("Saving: two runs in one folder", of="runs mixed", tried=2)


def test_of_two_runs_begun_at_once_one_is_refused(
    config: Path, whole: Wholes, tmp_path: Path
) -> None:
    for attempt in range(2):
        runs = Runs(config, tmp_path / f"{attempt}")
        both = [Child(runs.begin(), tmp_path / f"{attempt}.{n}") for n in range(2)]
        assert sorted(child.wait() for child in both) == [0, 1]
        (told,) = [child.text() for child in both if "error:" in child.text()]
        assert re.search(r"locked by pid \d+|holds a run already", told), told
        survived("Saving: two runs in one folder", of="runs mixed")
        assert_equal(result(runs)["records"], result(whole())["records"])


# --- the best ---

LISTED = """
import numpy as np

SCORES = {scores}


class Listed:
    fitness = "score"

    def __init__(self, names: list[str]):
        pass

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


@pytest.mark.parametrize("scores", few(BEST, *list(BEST)[:1]))
def test_nan_is_never_the_best_and_numbers_of_numpy_do_no_harm(runs: Runs, scores: str) -> None:
    (runs.folder / "listed.py").write_text(LISTED.format(scores=scores))
    work = runs.begin(*PLAIN, "metric={build: listed:Listed}")

    def importing() -> None:
        sys.path.insert(0, str(runs.folder))
        work()

    done = runs.tried(importing)
    assert done.code == 0, done.text
    best = runs.run / "best.pt"
    assert (checkpoint.load(best)["epoch"] if best.exists() else None) == BEST[scores]
    assert all(map(readable, runs.saved()))
    assert [record["other"] for record in runlog.RunFolder(runs.run, resume=True).records()] == [
        0.5
    ] * 4
    survived("Saving: a metric returns NaN, or numbers of numpy", of="best models")
