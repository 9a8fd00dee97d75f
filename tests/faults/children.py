"""Runs of the scripts in forked children: torch is imported already, so that one costs its own time
alone.
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

for name in (  # what a run imports when it needs it: here once, and not in every child
    *("torch._dynamo", "torch.cuda", "pycocotools.cocoeval"),
    *(
        "kdmini.detection.voc",
        "kdmini.distill.attention",
        "kdmini.detection.average_precision",
        "kdmini.detection.yolo11.model",
    ),
):
    importlib.import_module(name)


class Child:
    """A forked process that calls `work`, with its output in a file; it leads a process group of
    its own.
    """

    def __init__(self, work: Callable[[], object], output: Path):
        self.output = output
        sys.stdout.flush(), sys.stderr.flush()
        self.pid = os.fork()
        if self.pid:
            os.setpgid(self.pid, self.pid)  # here as well as there: whoever comes first
            return
        code = 99
        try:  # nothing of the parent's test run may go on in the child
            os.setpgid(0, 0)
            file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, 1), os.dup2(file, 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(
                signal.SIGHUP, signal.SIG_DFL
            )  # under nohup it came ignored, and a run respects that
            code = exit_code(work)
            sys.stdout.flush(), sys.stderr.flush()
        finally:
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
            time.sleep(0.002)

    def wait(self, limit: float = LIMIT_S) -> int:
        """-> exit code as a shell has it, 128 + signal for one that was killed; kills what takes
        too long.
        """
        end = time.monotonic() + limit
        while self.running():
            if time.monotonic() > end:
                self.send(signal.SIGKILL)
                os.waitpid(self.pid, 0)
                raise AssertionError(f"still running after {limit} s:\n{self.text()}")
            time.sleep(0.002)
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return 128 - code if code < 0 else code

    def text(self) -> str:
        return self.output.read_text(errors="replace") if self.output.exists() else ""


class Done(NamedTuple):
    code: int
    text: str  # stdout and stderr

    @property
    def last(self) -> str:
        """The last line, which for a mistake names the thing and the remedy."""
        return self.text.strip().splitlines()[-1] if self.text.strip() else ""


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


def script(module: ModuleType, *arguments: object) -> Callable[[], object]:
    """-> a call of the script's main() with a command line."""

    def work() -> None:
        sys.argv = [module.__name__, *map(str, arguments)]
        module.main()

    return work


def run(work: Callable[[], object], output: Path, limit: float = LIMIT_S) -> Done:
    """Forks, waits -> how it ended."""
    child = Child(work, output)
    return Done(child.wait(limit), child.text())
