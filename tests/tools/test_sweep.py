"""A sweep: who runs which trial, whatever is killed, and what it leaves behind.

Training is pretended: epochs that cost nothing, whose scores follow from the settings.
A real one is in tests/long.
"""

import csv
import gc
import os
import shutil
import signal
import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

optuna = pytest.importorskip("optuna", reason="needs optuna: pip install -e '.[sweep]'")

from optuna.storages._rdb.models import TrialModel  # noqa: E402 - after the check for its package
from sqlalchemy import Engine, event  # noqa: E402

from kdmini import config  # noqa: E402
from kdmini.contracts import UserError  # noqa: E402
from kdmini.runlog import RunFolder  # noqa: E402
from kdmini.tools import sweep, sweep_study, sweep_table  # noqa: E402
from kdmini.tools.sweep_space import Stop, make_plan  # noqa: E402
from tests.conftest import ROOT  # noqa: E402
from tests.faults.children import Child, script  # noqa: E402

SWEEP = """
config: {base}
overrides: [train.epochs=3]
out: {out}
space:
  train.lr0: {{low: 1e-3, high: 1e-1, scale: log}}
  train.batch: {{choices: [4, 8]}}
count: 4
sampler: random
stop: {{rule: none}}
silence: 3600
"""
FAIL = optuna.trial.TrialState.FAIL


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    """Databases that do not wait for the disk, and a collection of garbage of these tests."""

    def do_not_wait(connection: sqlite3.Connection, _: object) -> None:
        connection.execute("PRAGMA synchronous = OFF")

    event.listen(Engine, "connect", do_not_wait)
    gc.freeze()
    yield
    gc.unfreeze()
    event.remove(Engine, "connect", do_not_wait)


class Pretended:
    """train() in its place. journal: a line for each epoch, of all processes."""

    def __init__(self, journal: Path) -> None:
        self.journal = journal
        self.before_epoch: Callable[[str, int], object] = lambda folder, epoch: None

    def __call__(self, settings: dict[str, Any], source: str, resume: bool = False) -> None:
        folder = RunFolder(settings["run"], resume)
        if not resume:
            folder.begin(config.dump(settings))
            folder.checkpoints.mkdir()
            (folder.checkpoints / "step_00000000.pt").touch()
        lr0 = settings["train"]["lr0"]
        for epoch in range(len(folder.records()), settings["train"]["epochs"]):
            self.before_epoch(folder.path.name, epoch)
            with self.journal.open("a") as file:
                print(folder.path.name, epoch, lr0, file=file)
            folder.log({"epoch": epoch, "score/AP50-95": lr0 * (epoch + 1), "score/AP50": 0.5})

    def lines(self) -> list[list[str]]:
        return [line.split() for line in self.journal.read_text().splitlines()]


@pytest.fixture
def training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pretended:
    pretended = Pretended(tmp_path / "journal")
    monkeypatch.setattr(sweep, "train", pretended)
    monkeypatch.setattr(sweep, "POLL_S", 0.05)
    monkeypatch.setattr(sweep_table, "draw", lambda rows, plan: None)
    return pretended


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One with tables and nothing in them: to make these takes longer than a whole test."""
    file = tmp_path_factory.mktemp("database") / "study.db"
    optuna.storages.RDBStorage(f"sqlite:///{file}")
    return file


@pytest.fixture
def path(tmp_path: Path, config_file: Path, database: Path) -> Path:
    """The config of a sweep."""
    file = tmp_path / "sweep.yaml"
    file.write_text(SWEEP.format(base=config_file, out=tmp_path / "sweep"))
    (tmp_path / "sweep").mkdir()
    shutil.copy(database, tmp_path / "sweep")
    return file


def study_of(path: Path) -> optuna.Study:
    return sweep_study.open_study(make_plan(config.load(path), str(path)))


def table_of(path: Path) -> list[dict[str, str]]:
    with (path.parent / "sweep/trials.csv").open() as file:
        return list(csv.DictReader(file))


def all_are_silent(path: Path) -> None:
    """As if days had passed since the last signs of life."""
    with sqlite3.connect(path.parent / "sweep/study.db") as database:
        database.execute("UPDATE trial_heartbeats SET heartbeat = datetime('now', '-2 days')")
        database.execute("UPDATE trials SET datetime_start = datetime('now', '-2 days')")


def assert_each_epoch_once(training: Pretended, trials: int, epochs: int = 3) -> None:
    """And with the same values of a trial throughout."""
    done = sorted((name, int(epoch)) for name, epoch, _ in training.lines())
    names = [f"trial_{number:03d}" for number in range(trials)]
    assert done == [(name, epoch) for name in names for epoch in range(epochs)]
    assert len({(name, lr0) for name, _, lr0 in training.lines()}) == trials


def test_its_files(path: Path, training: Pretended, capsys: pytest.CaptureFixture) -> None:
    sweep.main([str(path)])
    assert_each_epoch_once(training, 4)
    rows = table_of(path)
    assert [row["trial"] for row in rows] == ["0", "1", "2", "3"]
    assert {row["ended"] for row in rows} == {"finished"}
    for row in rows:
        settings = config.load(path.parent / f"sweep/trial_00{row['trial']}/config.yaml")
        lr0 = settings["train"]["lr0"]
        assert 1e-3 <= lr0 <= 1e-1
        assert float(row["train.lr0"]) == lr0
        assert float(row["AP50-95"]) == 3 * lr0  # the best of three epochs
        assert settings["train"]["batch"] == int(row["train.batch"])

    best = max(rows, key=lambda row: float(row["AP50-95"]))
    settings = config.load(path.parent / "sweep/best.yaml")
    assert settings["run"] == str(path.parent / "sweep/best")
    assert settings["train"]["lr0"] == float(best["train.lr0"])
    assert f"best: trial {best['trial']}, AP50-95" in capsys.readouterr().out


def test_its_picture(path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install -e '.[plots]'")
    plan = make_plan(config.load(path), str(path))
    values = {"train.lr0": 0.01, "train.batch": 4}
    sweep_table.draw([sweep_table.Row(0, values, 0.5, 3, "stopped", 1)], plan)
    assert (path.parent / "sweep/trials.png").read_bytes().startswith(b"\x89PNG")


def test_a_low_score_can_be_sought(path: Path, training: Pretended) -> None:
    sweep.main([str(path), "direction=minimize"])
    rows = table_of(path)
    for row in rows:
        assert float(row["AP50-95"]) == float(row["train.lr0"])  # that of the first epoch
    lowest = min(float(row["train.lr0"]) for row in rows)
    assert config.load(path.parent / "sweep/best.yaml")["train"]["lr0"] == lowest


def test_it_is_as_long_as_it_is_said_to_be(path: Path, training: Pretended) -> None:
    sweep.main([str(path)])
    sweep.main([str(path)])
    assert_each_epoch_once(training, 4)
    sweep.main([str(path), "count=5"])
    assert_each_epoch_once(training, 5)


# --- stops, kills, several processes


def test_a_stop_gives_its_trial_free_at_once(path: Path, training: Pretended) -> None:
    def stop(folder: str, epoch: int) -> None:
        if (folder, epoch) == ("trial_002", 2):
            signal.raise_signal(signal.SIGTERM)

    training.before_epoch = stop
    child = Child(script(sweep, path), path.with_name("out"))
    assert child.wait() == 128 + signal.SIGTERM
    training.before_epoch = lambda folder, epoch: None
    sweep.main([str(path)])
    assert_each_epoch_once(training, 4)
    assert [row["attempts"] for row in table_of(path)] == ["1", "1", "2", "1"]


def test_a_killed_process_loses_no_trial(path: Path, training: Pretended) -> None:
    def kill(folder: str, epoch: int) -> None:
        if (folder, epoch) in (("trial_000", 0), ("trial_003", 2)):
            os.kill(os.getpid(), signal.SIGKILL)

    training.before_epoch = kill
    for _ in range(2):
        assert Child(script(sweep, path), path.with_name("out")).wait() == 128 + signal.SIGKILL
        training.before_epoch = lambda folder, epoch: kill(folder, epoch * (folder[-1] != "0"))
        all_are_silent(path)
    training.before_epoch = lambda folder, epoch: None
    sweep.main([str(path)])
    assert_each_epoch_once(training, 4)


def test_two_processes_share_the_trials(path: Path, training: Pretended) -> None:
    (path.parent / "sweep/study.db").unlink()  # they make it at the same moment
    children = [Child(script(sweep, path, "count=6"), path.with_name(f"out{i}")) for i in range(2)]
    for child in children:
        assert child.wait() == 0, child.text()
    assert_each_epoch_once(training, 6)
    for child in children:  # each has the whole table
        assert child.text().count("  finished  ") == 6


def test_of_two_attempts_at_a_trial_one_is_made(
    path: Path, training: Pretended, capsys: pytest.CaptureFixture
) -> None:
    """As two processes queue them that see at one moment that the trial is open."""
    study = study_of(path)
    for _ in range(2):
        study.add_trial(sweep_study.next_attempt(0, []))
    sweep.main([str(path)])
    assert_each_epoch_once(training, 4)
    assert capsys.readouterr().out.count("trial 0 of 4:") == 1


def test_of_two_processes_one_gets_a_waiting_attempt(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both read that it waits before either writes that it runs, if the database lets them."""
    study = study_of(path)
    study.add_trial(sweep_study.next_attempt(0, []))
    read = TrialModel.find_or_raise_by_id
    both_have_read = threading.Barrier(2)

    def read_and_wait(*args: Any, **kwargs: Any) -> TrialModel:
        trial = read(*args, **kwargs)
        with suppress(threading.BrokenBarrierError):
            both_have_read.wait(timeout=0.5)
        return trial

    monkeypatch.setattr(TrialModel, "find_or_raise_by_id", read_and_wait)

    def run(study: optuna.Study) -> bool:
        return study._storage.set_trial_state_values(1, optuna.trial.TrialState.RUNNING)

    with ThreadPoolExecutor(2) as threads:
        got = list(threads.map(run, [study, study_of(path)]))
    assert sorted(got) == [False, True]


MOMENTS = ["queued", "asked for", "alive", "drawn", "failed", "queued again", "asked for again"]


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_kill_at_any_moment_loses_no_trial(path: Path, training: Pretended, moment: str) -> None:
    reached = MOMENTS.index(moment)
    study = study_of(path)
    study.add_trial(sweep_study.next_attempt(0, []))
    drawn = None
    if reached >= 1:
        trial = study.ask()
    if reached >= 2:
        trial.storage.record_heartbeat(trial._trial_id)
    if reached >= 3:
        trial.set_user_attr(sweep_study.ALIVE, True)
        drawn = trial.suggest_float("train.lr0", 1e-3, 1e-1, log=True)
    if reached >= 4:
        study.tell(trial, state=FAIL)
    if reached >= 5:
        sweep_study.queue_open(study, 1)
    if reached >= 6:
        study.ask()
    all_are_silent(path)
    sweep.main([str(path)])
    assert_each_epoch_once(training, 4)
    assert drawn in (None, float(table_of(path)[0]["train.lr0"]))


def test_a_process_that_was_silent_leaves_its_trial_to_others(
    path: Path, training: Pretended, capsys: pytest.CaptureFixture
) -> None:
    lost: list[str] = []

    def lose(folder: str, epoch: int) -> None:
        if folder == "trial_001" and epoch == 2 and not lost:
            lost.append(folder)
            study = study_of(path)
            running = study.get_trials(states=(optuna.trial.TrialState.RUNNING,))
            study.tell(running[0].number, state=FAIL)

    training.before_epoch = lose
    sweep.main([str(path)])
    assert "this process was silent for too long" in capsys.readouterr().out
    assert_each_epoch_once(training, 4)


# --- how a trial ends


def test_a_trial_that_falls_behind_is_stopped(path: Path, training: Pretended) -> None:
    """By halving after the first epoch: the score rises with lr0, and so does its place."""
    sweep.main([str(path), "stop={rule: hyperband, min: 1, eta: 2}", "count=8"])
    rates: list[float] = []
    for row in table_of(path):
        rate = float(row["train.lr0"])
        rates.append(rate)
        at_first = sorted(rates, reverse=True)[: max(1, len(rates) // 2)]
        if rate not in at_first:
            assert (row["ended"], row["evaluations"]) == ("stopped", "1")
            assert float(row["AP50-95"]) == rate  # it is learned from as well
    assert {row["ended"] for row in table_of(path)} == {"finished", "stopped"}


def trial_with(values: list[float], number: int) -> optuna.trial.FrozenTrial:
    steps = dict(enumerate(values, 1))
    return optuna.create_trial(value=0, intermediate_values=steps, user_attrs={"trial": number})


@pytest.mark.parametrize(
    "values, stopped",
    [
        ([0.1], False),  # not judged before the second
        ([0.1, 0.2], True),  # place 5 of 5, of which 2 go on
        ([0.1, 0.31], False),
        ([0.31, 0.0], False),  # by its best score
        ([0.3, 0.3], False),  # a tie goes on
        ([0.0, 0.0, 0.0], False),  # between two looks
        ([0.3, 0.3, 0.3, 0.3], True),  # place 2 of 2, of which one goes on
        ([float("nan"), float("nan")], True),
    ],
)
def test_halving_written_out(values: list[float], stopped: bool) -> None:
    study = optuna.create_study(direction="maximize")
    for number, others in enumerate(([0.5, 0.5, 0.5, 0.5], [0.3, 0.3], [0.1, 0.2], [0.2, 0.1])):
        study.add_trial(trial_with(others, number))
    trial = trial_with(values, 4)
    trial.number = 4
    halving = sweep_study.Halving(Stop("hyperband", 2, 2, 1), 1)
    assert halving.prune(study, trial) == stopped


def test_brackets_are_judged_later_and_by_themselves() -> None:
    study = optuna.create_study(direction="maximize")
    for number in range(2):
        study.add_trial(trial_with([0.5] * 8, number))
    halving = sweep_study.Halving(Stop("hyperband", 2, 2, 2), 1)
    first_looks = []
    for number in (2, 3):
        judged = [n for n in range(1, 9) if halving.prune(study, trial_with([0.1] * n, number))]
        first_looks.append(judged)
    assert first_looks == [[2, 4, 8], [4, 8]]


def test_a_trial_without_memory_has_failed_and_the_sweep_goes_on(
    path: Path, training: Pretended
) -> None:
    def exhaust(folder: str, epoch: int) -> None:
        if folder == "trial_001":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    training.before_epoch = exhaust
    sweep.main([str(path)])
    sweep.main([str(path)])
    ended = [row["ended"] for row in table_of(path)]
    assert ended == ["finished", "failed: out of memory on the device", *["finished"] * 2]


def test_a_trial_that_cannot_train_is_a_line(path: Path, training: Pretended) -> None:
    def refuse(folder: str, epoch: int) -> None:
        raise UserError("the disk is full; make room")

    training.before_epoch = refuse
    child = Child(script(sweep, path), path.with_name("out"))
    assert child.wait() == 1
    assert child.text().splitlines()[-1] == "error: trial 0: the disk is full; make room"
    training.before_epoch = lambda folder, epoch: None
    sweep.main([str(path)])
    assert_each_epoch_once(training, 4)


# --- mistakes

LR0 = "{low: 1e-3, high: 1e-1, scale: log}"


@pytest.mark.parametrize(
    "override, message",
    [
        (f"space={{train.lr00: {LR0}}}", "space.train.lr00: unknown key; did you mean `lr0`?"),
        (f"space={{trian.lr0: {LR0}}}", "there is no `trian`; did you mean `train`?"),
        (f"space={{student.scal: {LR0}}}", "student.scal: unknown key; did you mean `scale`"),
        ("space={train.lr0: {low: 2, high: 1, scale: log}}", "2.0 to 1.0; the lower end goes"),
        ("space={train.momentum: {low: 0, high: 0.9, scale: log}}", "0.0 has no logarithm"),
        ("space={train.lr0: {low: -1, high: 1, scale: uniform}}", "lr0.low: -1 is out of range"),
        ("space={train.lr0: {low: 1, high: 2}}", "needs `scale`"),
        ("space={train.batch: {low: 1, high: x, scale: log}}", "high: expected int | float"),
        ("space={data.imgsz: {low: 32, high: 96, scale: log}}", "takes no 33: list its `choices`"),
        ("space={train.batch: {choices: [4]}}", "give two or more"),
        ("space={train.batch: {choices: [4, 0.5]}}", "batch.choices: expected int, got 0.5"),
        ("space={}", "nothing to search"),
        ("stop={rule: halving}", "stop.rule: 'halving' is not a choice"),
        ("overrides=[train.lr9=1]", "lr9: unknown key"),
        ("counts=3", "counts: unknown key; did you mean `count`?"),
        ("metric=AP5", "trial 0: metric: there is no score `AP5`; did you mean `AP50`?"),
        ("storage=postgresql://nobody@127.0.0.1:1/none", "storage: "),
        ("storage=nothing", "storage: Could not parse"),
    ],
)
def test_a_mistake_is_a_line(path: Path, training: Pretended, override: str, message: str) -> None:
    with pytest.raises(SystemExit) as left:
        sweep.main([str(path), override])
    line = str(left.value.code)
    assert line.startswith("error: ")
    assert message in line
    assert "\n" not in line


def test_the_study_of_another_sweep_is_refused(path: Path, training: Pretended) -> None:
    sweep.main([str(path), "count=1"])
    sweep.main([str(path), "count=2", "sampler=bayes", "overrides.0=train.epochs=3"])
    for change, words in (
        (f"space={{train.lr0: {LR0}}}", "space.train.batch was {'choices': [4, 8]}, is None"),
        ("direction=minimize", "direction was 'maximize', is 'minimize'"),
        ("overrides=[seed=9]", "config.seed was 3, is 9"),
    ):
        with pytest.raises(SystemExit) as left:
            sweep.main([str(path), "count=2", change])
        assert "the study `sweep` in the storage is of another sweep" in str(left.value.code)
        assert words in str(left.value.code)


def test_a_locked_database_is_a_line(
    path: Path, training: Pretended, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep.main([str(path), "count=1"])
    monkeypatch.setattr(sweep_study, "LOCKED_S", 0.05)
    with sqlite3.connect(path.parent / "sweep/study.db") as database:
        database.execute("BEGIN EXCLUSIVE")
        with pytest.raises(SystemExit) as left:
            sweep.main([str(path)])
    assert "storage: database is locked: another program holds it" in str(left.value.code)


@pytest.mark.parametrize("file", sorted((ROOT / "configs/sweep").glob("*.yaml")), ids=str)
def test_the_sweeps_of_configs_are_right(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    plan = make_plan(config.load(file), str(file))
    assert plan.evaluations > plan.stop.min
    assert f"python -m kdmini.tools.sweep {file.relative_to(ROOT)}" in file.read_text()
