"""Runs of the scripts in forked children: torch is imported already, so that one costs its
own time alone.
"""

import importlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

LIMIT_S = 60
POLL_S = 0.002

# what a run imports when it needs it: here once, and not in every child
NEEDED = (
    "torch._dynamo",
    "torch.cuda",
    "pycocotools.cocoeval",
    "kdmini.detection.voc",
    "kdmini.distill.attention",
    "kdmini.detection.average_precision",
    "kdmini.detection.yolo11.model",
    "kdmini.segmentation.fast_scnn",
    "kdmini.segmentation.mean_iou",
    "kdmini.segmentation.voc",
    "tests.classification.labelled",
)
for name in NEEDED:
    importlib.import_module(name)


class Child:
    """A forked process that calls `work`, with its output in a file.

    It leads a process group of its own.
    """

    def __init__(self, work: Callable[[], object], output: Path):
        self.output = output
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid:
            os.setpgid(self.pid, self.pid)  # here as well as there: whoever comes first
            return
        code = 99
        try:
            os.setpgid(0, 0)
            redirect(output)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            # under nohup it came ignored, and a run respects that
            signal.signal(signal.SIGHUP, signal.SIG_DFL)
            code = exit_code(work)
            sys.stdout.flush()
            sys.stderr.flush()
        finally:  # nothing of the parent's test run may go on in the child
            os._exit(code)

    def send(self, signum: int) -> None:
        """To the whole group, as a terminal does."""
        os.killpg(self.pid, signum)

    def running(self) -> bool:
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def until(self, ready: Callable[[], object], limit: float = LIMIT_S) -> None:
        """Waits for it; fails when the child ends before, or time is up."""
        end = time.monotonic() + limit
        while not ready():
            assert self.running(), f"ended too early:\n{self.text()}"
            assert time.monotonic() < end, f"not ready within {limit} s:\n{self.text()}"
            time.sleep(POLL_S)

    def wait(self, limit: float = LIMIT_S) -> int:
        """-> exit code as a shell has it, 128 + signal for one that was killed.

        What takes longer than `limit` seconds is killed, and fails.
        """
        end = time.monotonic() + limit
        while self.running():
            if time.monotonic() > end:
                self.send(signal.SIGKILL)
                os.waitpid(self.pid, 0)
                raise AssertionError(f"still running after {limit} s:\n{self.text()}")
            time.sleep(POLL_S)
        _, status = os.waitpid(self.pid, 0)
        code = os.waitstatus_to_exitcode(status)
        return 128 - code if code < 0 else code

    def text(self) -> str:
        return self.output.read_text(errors="replace") if self.output.exists() else ""


def redirect(output: Path) -> None:
    """Sends what this process writes to a file, line by line."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)


def exit_code(work: Callable[[], object]) -> int:
    """Calls it, and says how a Python program that did so would have ended."""
    try:
        work()
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
            return 1
        return error.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


class Done(NamedTuple):
    """How a run ended."""

    code: int
    text: str  # stdout and stderr

    @property
    def last(self) -> str:
        """The last line, which for a mistake names the thing and the remedy."""
        lines = self.text.strip().splitlines()
        return lines[-1] if lines else ""


def script(module: ModuleType, *arguments: object) -> Callable[[], object]:
    """-> a call of the script's main() with a command line."""

    def work() -> None:
        sys.argv = [module.__name__, *map(str, arguments)]
        module.main()

    return work


def run(work: Callable[[], object], output: Path, limit: float = LIMIT_S) -> Done:
    """Forks, waits -> how it ended."""
    child = Child(work, output)
    code = child.wait(limit)
    return Done(code, child.text())


def one_line(done: Done, *words: str) -> str:
    """The last line of a run that ended as a mistake of the user ends; `words` are in it."""
    assert done.code == 1, done.text
    assert "Traceback" not in done.text, done.text
    assert done.last.startswith("error: "), done.text
    for word in words:
        assert word in done.last, done.last
    return done.last
