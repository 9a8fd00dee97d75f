"""Search settings: many runs of train.py, of which those that fall behind are
stopped.

python -m kdmini.tools.sweep configs/sweep/demo.yaml [key.path=value ...]

The keys of CONFIG are described at Sweep in kdmini/tools/sweep_space.py, and in
docs/sweep.md. Into its folder `out` go a run folder for each trial; study.db,
or what `storage` names; and at the end

    trials.csv    a line for each trial: what was drawn, its score, how it ended
    trials.png    the score by each parameter
    best.yaml     the config of the best trial

The same command goes on after a stop or a kill, and given twice, also on
another machine that sees the same storage, the processes share the trials.
"""

import argparse
import fcntl
import gc
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kdmini import checkpoint, config, memory, output, signals
from kdmini.contracts import UserError
from kdmini.defaults import no_option
from kdmini.runlog import RunFolder
from kdmini.tools import sweep_study as studies
from kdmini.tools.sweep_space import Plan, make_plan
from kdmini.tools.sweep_study import optuna
from kdmini.tools.sweep_table import conclude, line_of, row_of
from kdmini.tools.train import train
from kdmini.typed import nearest

POLL_S = 2.0  # between two looks at the trials of other processes


class Stopped(Exception):
    """A trial that has fallen behind."""


def sweep(plan: Plan) -> optuna.Study:
    """Runs what is left of it, and waits for what other processes run."""
    study = studies.open_study(plan)
    silence = plan.sweep.silence
    told = False
    while True:
        studies.give_up_silent(study, silence)
        if studies.queue_open(study, plan.sweep.count):
            run_one(study, plan)
            continue
        running = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,))
        if not running:
            return study
        if not told:
            print(
                f"waiting for {len(running)} trials of other processes; one that is silent for "
                f"{silence} s is taken over"
            )
        told = True
        time.sleep(POLL_S)


def run_one(study: optuna.Study, plan: Plan) -> None:
    """The first attempt of the queue, if it is to be made."""
    attempts: list[int] = []

    def objective(trial: optuna.Trial) -> float:
        number = studies.claim(study, trial)
        attempts.append(trial.number)
        try:
            return score_of(trial, plan, number)
        except SystemExit:
            studies.release(study, trial.number)  # others need not wait for its silence
            raise
        except UserError as error:
            raise UserError(f"trial {number}: {error}") from error

    try:
        study.optimize(objective, 1, catch=(studies.Dropped,))
    except (ValueError, optuna.exceptions.UpdateFinishedTrialError):
        if not attempts or study.trials[attempts[0]].state.name != "FAIL":
            raise
        print("this process was silent for too long: another goes on with its trial")
        attempts.clear()
    gc.collect()  # of a trial that was left the run folder would stay locked
    for attempt in attempts:
        print(line_of(row_of(study.trials[attempt]), plan))


def score_of(trial: optuna.Trial, plan: Plan, number: int) -> float:
    """Trains a trial, or the rest of it -> its best score."""
    values = {key: dimension.draw(trial, key) for key, dimension in plan.space.items()}
    folder = plan.folder(number)
    settings = plan.with_values(values, folder)
    print(f"trial {number} of {plan.sweep.count}: {values}")
    try:
        with followed(trial, plan):
            train_on(settings, folder, plan.sweep.config)
    except Stopped:
        trial.set_user_attr(studies.STOPPED, len(scores(folder, plan.score)))
    except (RuntimeError, MemoryError) as error:
        place = memory.exhausted(error)
        if not place:
            raise
        give_up(trial, f"out of memory on {place}")
    numbers = [value for value in scores(folder, plan.score) if math.isfinite(value)]
    if not numbers:
        give_up(trial, f"{plan.score} was never a number")
    return plan.sign * max(plan.sign * value for value in numbers)


def give_up(trial: optuna.Trial, reason: str) -> None:
    """Ends a trial as one that would end so again."""
    trial.set_user_attr(studies.ERROR, reason)
    raise studies.Dropped


def train_on(settings: dict[str, Any], folder: Path, source: str) -> None:
    """A run from its newest checkpoint, or from the beginning."""
    wait_for_owner(folder)
    begun = bool(checkpoint.existing(folder / "ckpt"))
    if not begun:  # it was killed before it had anything to save
        (folder / "config.yaml").unlink(missing_ok=True)
    train(settings, source, resume=begun)


def wait_for_owner(folder: Path) -> None:
    """Until nobody trains there: a process that was silent may only have been suspended."""
    lock = folder / "lock"
    if not lock.exists():
        return
    with lock.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for pid {lock.read_text()}, which was silent, to leave {folder}")
            fcntl.flock(file, fcntl.LOCK_EX)


@contextmanager
def followed(trial: optuna.Trial, plan: Plan) -> Iterator[None]:
    """Within it, the study is told of each evaluation that a run logs. Raises Stopped at one
    at which the trial has fallen behind.

    RunFolder is changed in place, so that the run is that of any config.
    """
    log = RunFolder.log

    def log_and_report(self: RunFolder, record: dict[str, Any]) -> None:
        log(self, record)
        names = [key.removeprefix("score/") for key in record if key.startswith("score/")]
        if not names:
            return
        if plan.score not in names:
            raise UserError(
                f"metric: there is no score `{plan.score}`; {nearest(plan.score, names)}"
            )
        step = len(scores(self.path, plan.score))
        trial.report(float(record[f"score/{plan.score}"]), step)
        if step < plan.evaluations and trial.should_prune():
            raise Stopped

    RunFolder.log = log_and_report  # type: ignore[method-assign]
    try:
        yield
    finally:
        RunFolder.log = log  # type: ignore[method-assign]


def scores(folder: Path, name: str) -> list[float]:
    """Of the evaluations of a run so far."""
    records = RunFolder(folder, lead=False).records()
    return [float(record[f"score/{name}"]) for record in records if f"score/{name}" in record]


def main(argv: list[str] | None = None) -> None:
    output.guard()
    parser = argparse.ArgumentParser(
        prog="python -m kdmini.tools.sweep",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", metavar="CONFIG", help="of a sweep")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="of CONFIG")
    args, unknown = parser.parse_known_intermixed_args(argv)
    if unknown:
        parser.error(no_option(unknown, argv or sys.argv))
    signals.exit_on_signals()
    try:
        plan = make_plan(config.load(args.config, args.overrides), args.config)
        with studies.of_database():
            conclude(sweep(plan), plan)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
