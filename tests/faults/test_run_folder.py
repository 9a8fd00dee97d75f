"""The run folder goes away while the run is on: what can be saved is, and the run says so."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kdmini import checkpoint, engine
from tests.commands import assert_equal
from tests.faults.children import one_line
from tests.faults.record import survived
from tests.faults.runs import STEPS, Runs, Wholes, Work, few


def deleted(run: Path) -> None:
    shutil.rmtree(run)


def deleted_and_begun_anew(run: Path) -> None:
    deleted(run)
    (run / "ckpt").mkdir(parents=True)
    (run / "config.yaml").write_text("of: another\n")


def renamed(run: Path) -> None:
    run.rename(run.with_name("renamed"))


def emptied(run: Path) -> None:
    deleted(run / "ckpt")
    for path in run.iterdir():
        path.unlink()


WAYS = {way.__name__: way for way in (deleted, deleted_and_begun_anew, renamed, emptied)}


def in_training(lose: Callable[[Path], None], runs: Runs) -> Work:
    def after_step(done: int) -> None:
        if done == STEPS + 2:
            lose(runs.run)

    return runs.watched(runs.begin(), after_step)


def in_evaluation(lose: Callable[[Path], None], runs: Runs) -> Work:
    def first() -> None:
        evaluate = engine.evaluate

        def evaluating(*args: Any) -> Any:
            lose(runs.run)
            return evaluate(*args)

        engine.evaluate = evaluating

    return runs.watched(runs.begin(), first=first)


MOMENTS = {"training": (in_training, 2 * STEPS), "evaluation": (in_evaluation, STEPS)}


@pytest.mark.parametrize(
    ("way", "moment"),
    few(
        [(way, moment) for way in WAYS for moment in MOMENTS],
        ("deleted", "training"),
        ("renamed", "evaluation"),
    ),
)
def test_a_run_whose_folder_goes_is_saved_beside_it_and_goes_on(
    runs: Runs, whole: Wholes, way: str, moment: str
) -> None:
    start, saved_at = MOMENTS[moment]
    work = start(WAYS[way], runs)
    done = runs.tried(work)
    assert "finished" not in done.text
    rescued = runs.run.with_name("run_rescued")
    one_line(done, f"{runs.run} was deleted, renamed or emptied", f"--resume {rescued}")
    assert [path.name for path in (rescued / "ckpt").iterdir()] == [f"step_{saved_at:08d}.pt"]
    log = (rescued / "log.txt").read_text()
    assert re.search(r"^error: .* was deleted, renamed or emptied", log, re.M), log
    if way.endswith("anew"):  # nothing is written into what is not of this run
        assert list((runs.run / "ckpt").iterdir()) == []

    again = Runs(runs.config, runs.folder)
    again.run = rescued
    done = again.tried(again.watched(again.resume()))
    assert done.code == 0, done.text
    assert (rescued / "best.pt").exists()
    assert f"weights in {rescued / 'best.pt'}" in done.text
    mine = checkpoint.load(again.saved()[-1])
    other = checkpoint.load(whole().saved()[-1])
    for part in ("student", "ema", "optimizer", "distillation", "rng"):
        assert_equal(mine[part], other[part])
    survived("Saving: the run folder deleted, renamed or emptied while training", of="steps")


def test_a_best_file_that_was_deleted_is_not_promised(runs: Runs) -> None:
    def after_step(done: int) -> None:
        if done == 2 * STEPS:
            (runs.run / "best.pt").unlink()

    done = runs.tried(runs.watched(runs.begin(), after_step))
    assert done.code == 0, done.text
    assert not (runs.run / "best.pt").exists()
    assert f"its weights in {runs.run / 'best.pt'} were deleted" in done.text
    assert "evaluate:" not in done.text
