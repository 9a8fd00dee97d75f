"""Odd paths, and a machine without a network: whole runs, through the command line."""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import eval as eval_script
import train as train_script
from tests.conftest import CONFIG, TINY
from tests.faults.attempts import STARTS
from tests.faults.children import run, script
from tests.faults.entries import Finished, finish, newest
from tests.faults.record import survived


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, shapes: Path) -> Finished:
    return finish(tmp_path_factory.mktemp("finished"), shapes)


# --- paths


def test_a_run_in_a_folder_with_spaces_and_korean(
    finished: Finished, shapes: Path, tmp_path: Path
) -> None:
    """Begun from a file, resumed, and evaluated with its teacher."""
    folder = tmp_path / "한글 폴더"
    photographs = folder / "사진 자료"
    weights = folder / "교사 가중치.pt"
    config = folder / "설정 파일.yaml"
    run_folder = folder / "실행 하나"
    tables = folder / "저장 곳"
    shutil.copytree(shapes, photographs)
    shutil.copy(finished.best, weights)
    text = CONFIG.format(run=run_folder, shapes=photographs, tiny=TINY)
    config.write_text(text.replace("epochs: 4", "epochs: 1"), encoding="utf-8")

    works = {
        "begin": script(
            train_script,
            "--config",
            config,
            f"student.weights={weights}",
            f"teacher.weights={weights}",
        ),
        # so that there is something left to do
        "unfinish": lambda: newest(run_folder).unlink(),
        "resume": script(train_script, "--resume", run_folder),
        "evaluate": script(
            eval_script,
            "--config",
            run_folder / "config.yaml",
            "--weights",
            run_folder / "best.pt",
            "--teacher",
            "--save",
            tables,
        ),
    }
    for name, work in works.items():
        done = run(work, tmp_path / name)
        assert done.code == 0, done.text
        survived("Processes: spaces and Korean in every path")
    assert f"resumed from {run_folder}" in (tmp_path / "resume").read_text()
    assert (tables / "teacher.json").exists()


# --- no network, no programs

OUTSIDE = (
    *STARTS,
    "socket.connect",
    "socket.getaddrinfo",
    "socket.gethostby",
    "socket.sendto",
)


def alone(work: Callable[[], object]) -> Callable[[], object]:
    """-> `work` under a hook that fails where it connects or starts a program."""

    def hook(event: str, args: tuple[Any, ...]) -> None:
        # a Unix socket, which has a path, stays on this machine
        is_local = event == "socket.connect" and isinstance(args[1], str | bytes)
        if event.startswith(OUTSIDE) and not is_local:
            raise AssertionError(f"{event} {args}")

    def hooked() -> None:
        sys.addaudithook(hook)
        work()

    return hooked


def test_a_whole_run_neither_connects_nor_starts_a_program(
    finished: Finished, tmp_path: Path
) -> None:
    """train.py and eval.py, with two decoding processes."""
    folder = tmp_path / "run"
    config = ("--config", finished.config, f"run={folder}", "data.workers=2")
    works = {
        "train": script(train_script, *config),
        "eval": script(eval_script, *config, "--weights", folder / "best.pt"),
    }
    for name, work in works.items():
        done = run(alone(work), tmp_path / name)
        assert done.code == 0, done.text
        survived("Processes: run that may neither connect nor start a program")


@pytest.mark.parametrize(
    "act",
    [
        lambda: socket.create_connection(("127.0.0.1", 9)),
        lambda: socket.getaddrinfo("localhost", 9),
        lambda: subprocess.run(["true"]),
        lambda: os.system("true"),  # noqa: S605
        lambda: os.posix_spawn("/bin/true", ["true"], {}),
        lambda: os.execv("/bin/true", ["true"]),
    ],
    ids=["connect", "getaddrinfo", "subprocess", "os.system", "posix_spawn", "execv"],
)
def test_control_the_hook_lets_nothing_of_this_pass(
    act: Callable[[], object], tmp_path: Path
) -> None:
    done = run(alone(act), tmp_path / "out")
    assert done.code == 1, done.text
    assert "AssertionError: " in done.text
