"""A finished run, and the five ways by which a file of weights comes into a run."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import eval as eval_script
import train as train_script
from kdmini import checkpoint
from tests.conftest import CONFIG, TINY
from tests.faults.children import run, script


class Finished(NamedTuple):
    """A run of one epoch, its folder and the config that it was begun with."""

    config: Path
    run: Path

    @property
    def best(self) -> Path:
        return self.run / "best.pt"


def one_epoch(run: Path, shapes: Path) -> str:
    """The text of a config of one epoch, decoded in the process itself."""
    text = CONFIG.format(run=run, shapes=shapes, tiny=TINY)
    return text.replace("epochs: 4", "epochs: 1").replace("workers: 2", "workers: 0")


def finish(folder: Path, shapes: Path) -> Finished:
    """Trains in folder/run."""
    config = folder / "config.yaml"
    config.write_text(one_epoch(folder / "run", shapes))
    done = run(script(train_script, "--config", config), folder / "out")
    assert done.code == 0, done.text
    return Finished(config, folder / "run")


@contextmanager
def put_back(finished: Finished, copy: Path) -> Iterator[Finished]:
    """For a test that puts other checkpoints into a run: afterwards it is as before."""
    shutil.copytree(finished.run, copy)
    yield finished
    shutil.rmtree(finished.run)
    shutil.copytree(copy, finished.run)
    shutil.rmtree(other_run(finished), ignore_errors=True)


def other_run(finished: Finished) -> Path:
    """The folder of a run that begins from a file."""
    return Path(f"{finished.run}2")


def newest(run: Path) -> Path:
    return checkpoint.existing(run / "ckpt")[-1]


# --- the entries: each gives a call that reads the file


def student(file: Path, finished: Finished) -> Callable[[], object]:
    return script(
        train_script,
        "--config",
        finished.config,
        f"run={other_run(finished)}",
        f"student.weights={file}",
    )


def teacher(file: Path, finished: Finished) -> Callable[[], object]:
    return script(
        train_script,
        "--config",
        finished.config,
        f"run={other_run(finished)}",
        f"teacher.weights={{path: {file}, classes: by_name}}",
    )


def evaluated(file: Path, finished: Finished) -> Callable[[], object]:
    return script(eval_script, "--config", finished.config, "--weights", file)


def evaluated_teacher(file: Path, finished: Finished) -> Callable[[], object]:
    return script(
        eval_script,
        "--config",
        finished.config,
        "--weights",
        finished.best,
        "--teacher",
        f"teacher.weights={file}",
    )


def resumed(file: Path, finished: Finished) -> Callable[[], object]:
    """With the file as the only checkpoint of the run."""

    def work() -> None:
        for old in (finished.run / "ckpt").glob("*.pt"):
            old.unlink()
        shutil.copy(file, checkpoint.numbered(finished.run / "ckpt", 3))
        script(train_script, "--resume", finished.run)()

    return work


ENTRIES: dict[str, Callable[[Path, Finished], Callable[[], object]]] = {
    "student": student,
    "teacher": teacher,
    "eval": evaluated,
    "eval --teacher": evaluated_teacher,
    "resume": resumed,
}


def good_file(entry: str, finished: Finished) -> Path:
    """What this entry reads where nothing is wrong."""
    return newest(finished.run) if entry == "resume" else finished.best
