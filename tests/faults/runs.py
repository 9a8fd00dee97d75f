"""Runs of train.py that are stopped, killed and resumed, and what came of them.

Whatever happens, what is continued must come out bit for bit as the run that nothing
happened to.
"""

import itertools
import json
import shutil
import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

import train
from kdmini import assemble, checkpoint, engine
from kdmini.optim import EMA
from kdmini.progress import Tally
from tests.commands import assert_equal
from tests.faults.children import Done, run, script

STEPS = 6  # an epoch; there are two, and the first is all warm-up
# twice as fast, for what needs many steps; without accumulation, for checkpoints come after
# updates alone
PLAIN = ("teacher=null", "distill=null", "train.epochs=4", "train.nbs=4")
LONG = pytest.mark.long
Work = Callable[[], object]


def few(cases: Iterable[Any], *quick: Any) -> list[Any]:
    """The cases as parameters; all but the quick ones are marked as long."""
    parameters = []
    for case in cases:
        values = case if isinstance(case, tuple) else (case,)
        marks = () if case in quick else LONG
        parameters.append(pytest.param(*values, marks=marks))
    return parameters


def nothing(*_: object) -> None:
    pass


class Runs:
    """Calls of train.py in one folder, and what came of them.

    `journal` has a line for all that a step computes.
    """

    def __init__(self, config: Path, folder: Path):
        self.config = config
        self.folder = folder
        self.run = folder / "run"
        self.journal = folder / "journal"
        folder.mkdir(parents=True, exist_ok=True)

    def begin(self, *overrides: object) -> Work:
        return script(train, "--config", self.config, f"run={self.run}", *overrides)

    def resume(self, *overrides: object) -> Work:
        return script(train, "--resume", self.run, *overrides)

    def tried(self, work: Work, **limits: float) -> Done:
        return run(work, self.folder / "out", **limits)

    def watched(
        self, work: Work, after_step: Callable[[int], object] = nothing, first: Work = nothing
    ) -> Work:
        """-> the work, which in the child calls first(), keeps the journal, and calls
        after_step(steps it has done).
        """

        def watching() -> None:
            first()
            file = self.journal.open("a", buffering=1)
            count = itertools.count(1)
            add = Tally.add
            apply_setting = engine.apply_setting
            update = EMA.update

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

            Tally.add = adding  # type: ignore
            engine.apply_setting = applying  # type: ignore
            EMA.update = updating  # type: ignore
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

    def temporary(self) -> list[Path]:
        """Files that were being written."""
        return list(self.run.rglob("*.tmp"))

    def files(self) -> dict[Path, tuple[bytes, int]]:
        """All that is in the run folder, but the lock and the log, with the time it was
        written.
        """
        files = [path for path in self.run.rglob("*") if path.is_file()]
        paths = [path for path in files if path.name not in ("lock", "log.txt")]
        return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}

    def copy(self, folder: Path) -> "Runs":
        other = Runs(self.config, folder)
        shutil.copytree(self.run, other.run)
        return other


Wholes = Callable[..., Runs]  # overrides, first= -> the run with them that nothing happened to


def result(runs: Runs) -> dict[str, Any]:
    """All that a run leaves, without the name of its folder and the time it took."""
    state = checkpoint.load(runs.saved()[-1])
    del state["config"]
    del state["progress"]["seconds"]
    records = [json.loads(line) for line in (runs.run / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        record.pop("images/s", None)
    return {"checkpoint": state, "best": checkpoint.load(runs.run / "best.pt"), "records": records}


def assert_as_never_stopped(runs: Runs, whole: Runs, journal: bool = True) -> None:
    """journal: whether each step was done once; one that was lost is done again."""
    assert_equal(result(runs), result(whole))
    if journal:
        assert runs.journal.read_text() == whole.journal.read_text()
    assert not runs.temporary()


def readable(path: Path) -> bool:
    try:
        checkpoint.load(path)
    except Exception:
        return False
    return True


# --- what happens to a run


def stop_at(step: int, signum: int = signal.SIGTERM) -> Callable[[int], None]:
    def after_step(done: int) -> None:
        if done == step:
            signal.raise_signal(signum)

    return after_step


def high_scale() -> None:
    """In fp16 the first gradients overflow."""
    precision = assemble.precision

    def high(*args: Any) -> Any:
        autocast, scaler = precision(*args)
        if scaler.is_enabled():
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**18)
        return autocast, scaler

    assemble.precision = high
