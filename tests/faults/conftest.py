"""What the fault tests share; and the table of faults, printed and written when a whole run
of them has passed.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import train as train_script
from tests.conftest import CONFIG, TINY
from tests.faults.children import Done, run, script
from tests.faults.own import Own
from tests.faults.record import Row, add, rows, write_table
from tests.faults.runs import Runs, Wholes, Work, high_scale, nothing, stop_at


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    config = session.config
    if hasattr(config, "workeroutput"):  # one of several processes: it tells the first
        config.workeroutput["rows"] = rows()
        return
    selected = config.option.markexpr or config.option.keyword
    whole = config.args == ["tests/faults"] and not selected
    if exitstatus == 0 and whole:
        print("\n" + write_table())


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_testnodedown(node: Any) -> None:
    for fault, row in getattr(node, "workeroutput", {}).get("rows", {}).items():
        add(fault, Row(*row))


# --- data that a test may spoil


@pytest.fixture
def own(tmp_path: Path, shapes: Path) -> Own:
    shutil.copytree(shapes, tmp_path / "own")
    return Own(tmp_path / "own")


@pytest.fixture
def train(tmp_path: Path, config_file: Path, own: Own) -> Callable[..., Done]:
    """-> a call of train.py on the copy, with overrides; of one epoch, where it comes to that."""

    def start(*overrides: str) -> Done:
        changes = (f"data.root={own.folder}", "train.epochs=1", *overrides)
        work = script(train_script, "--config", config_file, *changes)
        return run(work, tmp_path / "out")

    return start


# --- runs that are stopped and resumed


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory, shapes: Path) -> Path:
    """Of two epochs of six batches, with accumulation."""
    path = tmp_path_factory.mktemp("saving") / "config.yaml"
    text = CONFIG.format(run="unnamed", shapes=shapes, tiny=TINY)
    path.write_text(text.replace("epochs: 4, batch: 8, nbs: 16", "epochs: 2, batch: 4, nbs: 8"))
    return path


@pytest.fixture
def runs(config: Path, tmp_path: Path) -> Runs:
    return Runs(config, tmp_path / "runs")


@pytest.fixture(scope="session")
def whole(config: Path) -> Wholes:
    """-> the run with these overrides that nothing happened to; each is made once."""
    made: dict[object, Runs] = {}

    def get(*overrides: str, first: Work = nothing) -> Runs:
        key = (overrides, first)
        if key not in made:
            runs = Runs(config, config.parent / f"whole{len(made)}")
            done = runs.tried(runs.watched(runs.begin(*overrides), first=first))
            assert done.code == 0, done.text
            made[key] = runs
        return made[key]

    return get


@pytest.fixture(scope="session")
def stopped(config: Path) -> Runs:
    """In fp16, so that the scaler has a state; stopped after step 9, and there is a
    checkpoint of step 8 too.
    """
    runs = Runs(config, config.parent / "stopped")
    work = runs.begin("train.amp=fp16", "train.save_every=1", "train.nbs=4")
    done = runs.tried(runs.watched(work, stop_at(9), high_scale))
    assert done.code == 143, done.text
    assert runs.newest() == 9
    assert len(runs.saved()) == 2
    return runs
