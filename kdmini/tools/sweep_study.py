"""The study of a sweep: who runs which trial, what is drawn, and which trial falls behind.

Several processes share it through a database, and any of them may be killed at any moment.
A trial of the sweep is a number from 0 on; each attempt at it is a trial of Optuna, with
that number as an attribute. Three rules make that no trial is lost or run twice:

1. An attempt that has failed never becomes anything else, and numbers only rise. Of the
   attempts at a trial that have not failed, the first counts, and any other is dropped.
2. A trial without an attempt, or all of whose attempts have failed, is open: whoever sees
   it queues an attempt, with the values that were drawn before.
3. An attempt whose process has been silent for too long has failed.

So nothing has to happen in one piece: whoever comes next sees what is left to do.
"""

import json
import math
import sqlite3
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from importlib.util import find_spec

from kdmini import config
from kdmini.contracts import UserError
from kdmini.resume import FREE, INEXACT

try:
    import optuna
except ImportError:
    sys.exit("error: a sweep takes Optuna, which is not installed: pip install -e '.[sweep]'")
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import Connection, event
from sqlalchemy.exc import IntegrityError, OperationalError, ProgrammingError, SQLAlchemyError

from kdmini.tools.sweep_space import Plan, Stop

# attributes of an attempt
NUMBER = "trial"  # in the sweep
ATTEMPT = "attempt"  # from 1 on
ALIVE = "alive"  # since its process has given a sign of life
STOPPED = "stopped"  # after so many evaluations
ERROR = "error"  # why the trial is not tried again

LOCKED_S = 60  # that a process waits for another's writing to SQLite
MAKING_S = 3.0  # in which another process has made the tables
BEATS = 6  # signs of life, in the time after which there has to be one


class Dropped(Exception):
    """An attempt that somebody else makes, or that is not to be made again."""


@contextmanager
def of_database() -> Iterator[None]:
    """Within it, a database that fails is one line."""
    try:
        yield
    except (SQLAlchemyError, optuna.exceptions.StorageInternalError, ImportError) as error:
        cause = error.__cause__ if isinstance(error.__cause__, SQLAlchemyError) else error
        line = " ".join(str(getattr(cause, "orig", cause)).split())
        if "is locked" in line:
            line += ": another program holds it; the same command goes on when it is closed"
        raise UserError(f"storage: {line}") from error


def open_study(plan: Plan) -> optuna.Study:
    """Raises UserError for a database that cannot be used, or holds another sweep."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    # its heartbeat is experimental, and an evaluation that is made again is reported again
    warnings.filterwarnings("ignore", module="optuna")
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    sweep = plan.sweep
    plan.out.mkdir(parents=True, exist_ok=True)
    url = sweep.storage or f"sqlite:///{plan.out / 'study.db'}"
    is_file = url.startswith("sqlite")
    settings = {"connect_args": {"timeout": LOCKED_S}} if is_file else {"pool_pre_ping": True}

    def connect() -> optuna.storages.RDBStorage:
        interval = max(1, sweep.silence // BEATS)
        return optuna.storages.RDBStorage(
            url,
            engine_kwargs=settings,
            heartbeat_interval=interval,
            grace_period=sweep.silence,
        )

    try:
        storage = connect()
    except (IntegrityError, OperationalError, ProgrammingError) as error:
        if not any(word in str(error) for word in ("exists", "UNIQUE", "duplicate")):
            raise
        time.sleep(MAKING_S)  # another process makes the tables at the same moment
        storage = connect()
    if is_file:
        begin_at_once(storage)
    study = optuna.create_study(
        storage=storage,
        study_name=sweep.name,
        load_if_exists=True,
        direction=sweep.direction,
        sampler=make_sampler(plan),
        pruner=make_pruner(plan),
    )
    refuse_another(study, plan)
    return study


def begin_at_once(storage: optuna.storages.RDBStorage) -> None:
    """Lets a transaction hold SQLite's lock from its beginning, not from its first writing.

    Otherwise two processes may read that one attempt is waiting, and both make it: Optuna asks
    for the row to be locked, which SQLite does not do.
    Source: SQLAlchemy's documentation of SQLite, "Transactions with SQLite and the sqlite3 Driver".
    """
    storage.engine.dispose()

    @event.listens_for(storage.engine, "connect")
    def leave_transactions_to_us(connection: sqlite3.Connection, _: object) -> None:
        connection.isolation_level = None

    @event.listens_for(storage.engine, "begin")
    def begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")


def refuse_another(study: optuna.Study, plan: Plan) -> None:
    ours = json.loads(json.dumps(plan.identity()))
    theirs = study.user_attrs.get("sweep")
    if theirs is None:
        study.set_user_attr("sweep", ours)
        return
    free = {f"config.{key}" for key in FREE | INEXACT}
    changes = config.changed(theirs, ours)
    refused = [text for key, text in changes.items() if key not in free and key[-5:] != ".root"]
    if refused:
        place = f"the study `{plan.sweep.name}` in the storage"
        remedy = "set it back, or give another `out` and `name`"
        raise UserError(f"{place} is of another sweep: {'; '.join(refused[:5])}: {remedy}")


def make_sampler(plan: Plan) -> optuna.samplers.BaseSampler:
    first = plan.sweep.random_first
    if plan.sweep.sampler == "random":
        print("sampler: random")
        return optuna.samplers.RandomSampler()
    if find_spec("scipy"):
        print(f"sampler: a Gaussian process, after {first} random trials")
        return optuna.samplers.GPSampler(n_startup_trials=first)
    print(f"sampler: TPE, after {first} random trials; with scipy it is a Gaussian process")
    return optuna.samplers.TPESampler(n_startup_trials=first, constant_liar=True)


# --- who runs which trial


def attempts_of(study: optuna.Study) -> dict[int, list[FrozenTrial]]:
    """Number of a trial -> the attempts at it, in their order."""
    attempts: dict[int, list[FrozenTrial]] = {}
    for trial in study.get_trials(deepcopy=False):
        if NUMBER in trial.user_attrs:
            attempts.setdefault(trial.user_attrs[NUMBER], []).append(trial)
    return attempts


def counts(attempt: FrozenTrial) -> bool:
    """Whether it has not failed, or in a way in which any other would."""
    return attempt.state != TrialState.FAIL or ERROR in attempt.user_attrs


def queue_open(study: optuna.Study, count: int) -> bool:
    """Whether an attempt is waiting to be made; one at the first open trial, if any."""
    if study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
        return True
    attempts = attempts_of(study)
    for number in range(count):
        made = attempts.get(number, [])
        if not any(map(counts, made)):
            study.add_trial(next_attempt(number, made))
            return True
    return False


def next_attempt(number: int, attempts: Sequence[FrozenTrial]) -> FrozenTrial:
    """One that goes on with the values that an attempt before has drawn, and its scores."""
    attributes = {NUMBER: number, ATTEMPT: 1 + sum(bool(trial.params) for trial in attempts)}
    if not attempts:
        return optuna.create_trial(state=TrialState.WAITING, user_attrs=attributes)
    furthest = max(attempts, key=lambda trial: (len(trial.params), len(trial.intermediate_values)))
    return optuna.create_trial(
        state=TrialState.WAITING,
        params=furthest.params,
        distributions=furthest.distributions,
        intermediate_values=furthest.intermediate_values,
        user_attrs=attributes,
    )


def claim(study: optuna.Study, trial: optuna.Trial) -> int:
    """The number of the trial that this attempt is to make. Raises Dropped."""
    number = trial.user_attrs.get(NUMBER)
    if number is None:  # the queue was emptied by others in between
        raise Dropped
    made = attempts_of(study)[number]
    if any(other.number < trial.number and counts(other) for other in made):
        raise Dropped
    # at once: the thread that Optuna has for this may be slow to begin
    trial.storage.record_heartbeat(trial._trial_id)  # type: ignore[attr-defined]
    trial.set_user_attr(ALIVE, True)
    return number


def give_up_silent(study: optuna.Study, silence: int) -> None:
    """Fails the attempts whose processes are silent."""
    optuna.storages.fail_stale_trials(study)
    # those that were killed before their first; where the clocks of machines differ, one that
    # lives may be made by somebody else
    oldest = datetime.now() - timedelta(seconds=silence)
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        begun = trial.datetime_start or oldest
        if ALIVE not in trial.user_attrs and begun < oldest:
            release(study, trial.number)


def release(study: optuna.Study, attempt: int) -> None:
    """Fails it, unless it has ended."""
    study.tell(attempt, state=TrialState.FAIL, skip_if_finished=True)


# --- which trial falls behind


def make_pruner(plan: Plan) -> optuna.pruners.BasePruner:
    stop = plan.stop
    if stop.rule == "none":
        return optuna.pruners.NopPruner()
    if plan.evaluations <= stop.min:
        print(
            f"warning: stop.min={stop.min}: no trial is stopped, as each is evaluated "
            f"{plan.evaluations} times"
        )
    if stop.rule == "median":
        return optuna.pruners.MedianPruner(n_warmup_steps=stop.min)
    return Halving(stop, plan.sign)


class Halving(optuna.pruners.BasePruner):
    """Hyperband as wandb has it: successive halving that waits for nobody.

    At min, min * eta, min * eta^2, ... evaluations a trial goes on if its best score so far
    is among the first 1/eta of all that got there. Optuna's own judges by the latest score,
    and counts a trial that was taken over twice.
    Source: Li et al., "A System for Massively Parallel Hyperparameter Tuning", MLSys 2020.
    """

    def __init__(self, stop: Stop, sign: int) -> None:
        self.stop = stop
        self.sign = sign

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        bracket = self.bracket(trial)
        step = len(trial.intermediate_values)
        if not self.is_judged(step, bracket):
            return False
        bests = [self.best(trial, step)]
        for other in study.get_trials(deepcopy=False):
            got_there = len(other.intermediate_values) >= step
            is_rival = other.number != trial.number and other.state != TrialState.FAIL
            if is_rival and got_there and self.bracket(other) == bracket:
                bests.append(self.best(other, step))
        places = max(1, len(bests) // self.stop.eta)
        return bests[0] < sorted(bests, reverse=True)[places - 1]

    def bracket(self, trial: FrozenTrial) -> int:
        return trial.user_attrs.get(NUMBER, 0) % self.stop.brackets

    def is_judged(self, step: int, bracket: int) -> bool:
        due = self.stop.min * self.stop.eta**bracket
        while due < step:
            due *= self.stop.eta
        return due == step

    def best(self, trial: FrozenTrial, steps: int) -> float:
        """The best of its first scores; more is better."""
        first = sorted(trial.intermediate_values.items())[:steps]
        numbers = [self.sign * value for _, value in first if math.isfinite(value)]
        return max(numbers, default=-math.inf)
