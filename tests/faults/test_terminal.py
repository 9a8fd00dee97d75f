"""Whatever happens to the output of a run, a stop loses nothing: in real terminals, by an
interactive bash.
"""

import os
import random
import shlex
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.faults.children import Child
from tests.faults.record import survived
from tests.faults.runs import PLAIN, STEPS, Runs, Wholes, assert_as_never_stopped
from tests.faults.terminal import CTRL_C, Terminal
from tests.house.source import ROOT

TRIES = 5  # of each kind
LAST_STEP = 4 * STEPS
SAVED = (*PLAIN, "train.save_every=5", "train.val_every=4")
LIMIT_S = 90
# a job of the shell: the code is written by a process that outlives its signals
JOB = "bash -c {line}\n"
LINE = "trap : HUP INT; {line}; echo ${{PIPESTATUS[0]}} >code.tmp; mv code.tmp code"
SIGNS = ("Traceback", "Exception ignored", "Error", "error:", "Warning")


class Try(NamedTuple):
    """One run in a terminal of its own, stopped."""

    runs: Runs
    line: str  # of the shell; PROGRAM stands for the run
    stop: Callable[[Terminal, Runs], None]
    code: int
    step: int  # stopped once so many are finished
    delay: float  # and so many seconds later

    def text(self) -> str:
        """All that is left of what it printed."""
        names = ("terminal", "tee", "run/log.txt")
        paths = [self.runs.folder / name for name in names]
        return "\n".join(path.read_text(errors="replace") for path in paths if path.exists())


def hang_up(terminal: Terminal, runs: Runs) -> None:
    terminal.close()


def press_ctrl_c(terminal: Terminal, runs: Runs) -> None:
    """The terminal sends SIGINT to the whole group in its foreground."""
    terminal.type(CTRL_C)


def terminate(terminal: Terminal, runs: Runs) -> None:
    os.kill(int((runs.run / "lock").read_text()), signal.SIGTERM)


KINDS: dict[str, tuple[str, Callable[[Terminal, Runs], None], int]] = {
    "the terminal closes": ("PROGRAM", hang_up, 129),
    "the terminal of a pipe closes": ("PROGRAM 2>&1 | tee tee", hang_up, 129),
    "Ctrl-C to a pipe": ("PROGRAM 2>&1 | tee tee", press_ctrl_c, 130),
    "Ctrl-C without a reader": ("PROGRAM 2>&1 | head -1", press_ctrl_c, 130),
    "SIGTERM without a reader": ("PROGRAM | head -1", terminate, 143),
    "Ctrl-C, descriptors closed": ("PROGRAM 1>&- 2>&-", press_ctrl_c, 130),
    "Ctrl-C, output full": ("PROGRAM >/dev/full 2>&1", press_ctrl_c, 130),
    "Ctrl-C, ASCII": ("PYTHONIOENCODING=ascii PROGRAM", press_ctrl_c, 130),
}


def tries(config: Path, folder: Path) -> list[Try]:
    """All kinds, at random moments."""
    draws = random.Random(16)
    made = []
    for number in range(TRIES):
        for kind, (line, stop, code) in KINDS.items():
            runs = Runs(config, folder / f"{number} 한글 {kind}")
            step = draws.randint(1, LAST_STEP - 5)
            made.append(Try(runs, line, stop, code, step, draws.uniform(0, 0.05)))
    return made


def stopped(one: Try) -> int:
    """Begins the run and stops it -> its exit code."""
    runs = one.runs
    command = ("env", f"PYTHONPATH={ROOT}", "OMP_NUM_THREADS=1", sys.executable, "-m")
    arguments = ("tests.faults.journalled", runs.journal, "--config", runs.config)
    program = shlex.join(map(str, (*command, *arguments, f"run={runs.run}", *SAVED)))
    line = LINE.format(line=one.line.replace("PROGRAM", program))
    terminal = Terminal(runs.folder)
    terminal.type(JOB.format(line=shlex.quote(line)).encode())
    code = runs.folder / "code"
    try:
        until(lambda: finished_steps(runs) >= one.step or code.exists(), terminal)
        time.sleep(one.delay)
        if not code.exists():  # else it has ended of itself
            one.stop(terminal, runs)
        until(code.exists, terminal)
    finally:
        terminal.close()
        (runs.folder / "terminal").write_bytes(terminal.text)
    return int(code.read_text())


def until(ready: Callable[[], bool], terminal: Terminal) -> None:
    end = time.monotonic() + LIMIT_S
    while not ready():
        assert time.monotonic() < end, terminal.text.decode(errors="replace")
        time.sleep(0.002)


def finished_steps(runs: Runs) -> int:
    return runs.journal.read_text().count("step\n") if runs.journal.exists() else 0


@pytest.fixture(scope="module")
def ended(config: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Try, int]]:
    """All tries, two at a time, and their exit codes."""
    all_of_them = tries(config, tmp_path_factory.mktemp("terminal"))
    with ThreadPoolExecutor(2) as pool:
        codes = list(pool.map(stopped, all_of_them))
    return list(zip(all_of_them, codes, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_stop_at_a_random_moment_loses_no_step(
    ended: list[tuple[Try, int]], whole: Wholes, kind: str
) -> None:
    mine = [(one, code) for one, code in ended if one.runs.folder.name.endswith(f" {kind}")]
    assert len(mine) == TRIES
    for one, code in mine:
        runs = one.runs
        text = one.text()
        assert code == one.code, text
        assert not [sign for sign in SIGNS if sign in text], text
        log = (runs.run / "log.txt").read_text()
        assert "stopped after step" in log, log
        assert "%|" not in log  # of a progress bar
        lost = finished_steps(runs) - runs.newest()
        survived("Saving: stopped in a terminal, its output gone", lost, of="steps")

    # and resumed, all at once
    other = whole(*SAVED)
    children = [
        Child(one.runs.watched(one.runs.resume()), one.runs.folder / "out") for one, _ in mine
    ]
    for child, (one, _) in zip(children, mine, strict=True):
        assert child.wait(LIMIT_S) == 0, child.text()
        assert_as_never_stopped(one.runs, other, journal=False)
