"""What a run refuses to be resumed from: pieces missing, another config, another process."""

import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kdmini import checkpoint
from kdmini.defaults import defaults, filled
from kdmini.resume import FREE, MEASURING
from tests.commands import assert_equal
from tests.faults.children import Child
from tests.faults.record import survived
from tests.faults.runs import LONG, Runs, Wholes, assert_as_never_stopped, result

# --- a piece is missing


def paths(state: Any, depth: int = 3) -> Iterator[tuple[Any, ...]]:
    """Keys, through dicts and lists of dicts; of the many tensors of a model only a few."""
    if isinstance(state, list):
        if state and isinstance(state[0], dict):
            for index, item in enumerate(state):
                for rest in paths(item, depth):
                    yield (index, *rest)
    elif isinstance(state, dict) and depth:
        keys = list(state)
        if len(keys) >= 30:
            keys = [keys[0], keys[len(keys) // 2], keys[-1]]
        for key in keys:
            yield (key,)
            for rest in paths(state[key], depth - 1):
                yield (key, *rest)


def harmless(path: tuple[Any, ...], state: dict[str, Any]) -> bool:
    """Losses added up until now come and go with the terms; and a config may lack what has a
    default, or have otherwise what makes no difference.
    """
    if path[0] == "config" and len(path) > 1:
        now = state["config"]
        if ".".join(map(str, path[1:])) in FREE | MEASURING or path[1] == "metric":
            return True
        return filled(without(now, path[1:]), defaults(now)) == now
    return path[:2] in (("progress", "sums"), ("progress", "counts")) and len(path) > 2


def without(state: Any, path: tuple[Any, ...]) -> Any:
    """A copy of dicts and lists that lacks what the path leads to."""
    key, *rest = path
    if isinstance(state, list):
        changed = list(state)
        changed[key] = without(state[key], tuple(rest))
        return changed
    changed = type(state)(state)
    if rest:
        changed[key] = without(state[key], tuple(rest))
    else:
        del changed[key]
    return changed


@pytest.mark.parametrize("every", [16, pytest.param(1, marks=LONG)])
def test_whatever_is_missing_from_a_checkpoint_is_named(
    stopped: Runs, tmp_path: Path, every: int
) -> None:
    state = checkpoint.load(stopped.saved()[-1])
    missing = [path for path in paths(state) if not harmless(path, state)]
    images = [path for path in missing if ", image " in str(path[-1])]
    missing = [path for path in missing if path not in images[1:]]  # one stands for all
    assert len(missing) > 60
    assert {path[0] for path in missing} == set(state)
    runs = stopped.copy(tmp_path / "copy")
    for path in missing[::every]:
        for file in runs.saved():  # both, so that there is nothing to fall back on
            checkpoint.save_atomic(without(state, path), file)
        done = runs.tried(runs.resume())
        name = path[-1]
        if name == "root" or path in [("config", "device"), ("config", "processes")]:
            assert done.code == 0, done.text
            if name != "root":
                assert f"warning: {name} was " in done.text
            runs = stopped.copy(tmp_path / f"copy_{name}")
            continue
        assert done.code == 1, (path, done.text)
        assert str(runs.saved()[-1]) in done.last, (path, done.text)
        words = [rf"lacks {re.escape(repr(name))}", rf"\b{name} was ", f"{name} was not there"]
        assert re.search("|".join(words), done.last), (path, done.last)
        fault = "Saving: a piece of the state is missing from the checkpoint"
        survived(fault, of="pieces unnoticed")


# --- another config

NAMES = "[square, circle, triangle, star, ring, cross]"
REFUSED = {
    "train.batch": ["train.batch=8"],
    "seed": ["seed=4"],
    "student.scale": ["student.scale=[0.5, 0.125, 1024]"],
    "data.imgsz": ["data.imgsz=96"],
    "train.lr0": ["train.lr0=0.02"],
    "train.epochs": ["train.epochs=1"],
    "distill.attention.weight": ["distill.attention.weight=0.5"],
    "teacher": ["teacher=null", "distill=null"],
    "data.train.names": [f"data.train.names={NAMES}", f"data.val.names={NAMES}"],
}


@pytest.mark.parametrize("key", REFUSED)
def test_a_change_that_would_not_be_the_same_run_is_refused_by_name(
    stopped: Runs, tmp_path: Path, key: str
) -> None:
    runs = stopped.copy(tmp_path / "copy")
    before = runs.files()
    done = runs.tried(runs.resume(*REFUSED[key]))
    assert done.code == 1, done.text
    assert f"{key} was " in done.last
    assert "begin another run" in done.last
    assert f"run={runs.run}-2 student.weights={runs.run}/best.pt" in done.last
    assert runs.files() == before
    assert "decode" not in done.text
    survived("Saving: resumed with a config that is another run's", of="runs mixed")


def test_a_change_that_makes_no_difference_is_told_and_goes_on(
    stopped: Runs, shapes: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    moved.symlink_to(shapes)
    changes = {"data.workers": 0, "train.patience": 9, "data.root": moved}
    runs = stopped.copy(tmp_path / "copy")
    done = runs.tried(runs.resume(*[f"{key}={value}" for key, value in changes.items()]))
    assert done.code == 0, done.text
    for key in changes:
        assert f"warning: {key} was" in done.text

    other = stopped.copy(tmp_path / "other")
    assert other.tried(other.resume()).code == 0
    assert_equal(result(runs), result(other))


# --- nothing left to do, nothing there


def test_a_finished_run_says_so_and_nothing_changes(whole: Wholes, tmp_path: Path) -> None:
    runs = whole().copy(tmp_path / "copy")
    before = runs.files()
    for work in (runs.resume(), runs.resume("data.workers=0")):
        done = runs.tried(work)
        assert done.code == 0, done.text
        assert "finished: best epoch" in done.text
        assert "decode" not in done.text
        assert runs.files() == before


def test_results_are_never_written_over(whole: Wholes, tmp_path: Path) -> None:
    runs = whole().copy(tmp_path / "copy")
    before = runs.files()
    done = runs.tried(runs.begin())
    assert done.code == 1, done.text
    assert "holds a run already" in done.last
    assert "--resume" in done.last
    assert runs.files() == before

    (runs.run / "config.yaml").unlink()
    before = runs.files()
    assert runs.tried(runs.begin()).code == 1
    assert runs.files() == before


@pytest.mark.parametrize("there", ["nothing", "an empty folder", "a config alone"])
def test_there_is_nothing_to_resume(runs: Runs, there: str) -> None:
    if there != "nothing":
        runs.run.mkdir()
    if there == "a config alone":
        shutil.copy(runs.config, runs.run / "config.yaml")
    done = runs.tried(runs.resume())
    assert done.code == 1, done.text
    assert str(runs.run) in done.last
    assert "Traceback" not in done.text


# --- several runs, one folder


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
    for work, reason in (
        (runs.resume(), f"locked by pid {first.pid}"),
        (runs.begin(), "holds a run already"),
    ):
        done = runs.tried(work)
        assert done.code == 1, done.text
        assert reason in done.last
        assert str(runs.run) in done.last
    assert runs.files() == before  # the half-written file among them

    first.send(signal.SIGKILL)
    assert first.wait() == 137
    done = runs.tried(runs.watched(runs.resume()))
    assert done.code == 0, done.text
    assert f"removed {half}" in done.text
    assert_as_never_stopped(runs, whole(), journal=False)
    survived("Saving: two runs in one folder", of="runs mixed", tried=2)


def test_of_two_runs_begun_at_once_one_is_refused(
    config: Path, whole: Wholes, tmp_path: Path
) -> None:
    for attempt in range(2):
        runs = Runs(config, tmp_path / f"{attempt}")
        both = [Child(runs.begin(), tmp_path / f"{attempt}.{n}") for n in range(2)]
        assert sorted(child.wait() for child in both) == [0, 1]
        (refusal,) = [child.text() for child in both if "error:" in child.text()]
        assert re.search(r"locked by pid \d+|holds a run already", refusal), refusal
        survived("Saving: two runs in one folder", of="runs mixed")
        assert_equal(result(runs)["records"], result(whole())["records"])
