"""Calls in a child process, under an audit hook that sees what a file may not do."""

import contextlib
import io
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from kdmini import checkpoint
from tests.faults.children import Done, exit_code, run
from tests.faults.entries import Finished

# events that start a program
STARTS = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "subprocess.",
)
FORBIDDEN = (
    *STARTS,
    "pty.",
    "webbrowser.",
    "socket.connect",
    "socket.getaddrinfo",
    "socket.bind",
    "pickle.find_class",
)


class Attempt(NamedTuple):
    """How a call ended, and what the payload in the file did."""

    done: Done
    traces: list[str]  # audit events, and CANARY where its file appeared


def attempts(
    calls: Mapping[str, Callable[[], object]],
    canary: Path,
    output: Path,
    prepare: Callable[[], object] = lambda: None,
) -> dict[str, Attempt]:
    """Makes the calls one after another in one child, watched, after `prepare`."""
    results = output.with_suffix(".json")

    def work() -> None:
        prepare()
        events: list[str] = []
        watch(events, canary)
        made = {name: attempt(call, canary, events) for name, call in calls.items()}
        results.write_text(json.dumps(made))

    done = run(work, output, limit=300)
    assert done.code == 0, done.text
    made = json.loads(results.read_text())
    return {name: Attempt(Done(*ended), traces) for name, (ended, traces) in made.items()}


def watch(events: list[str], canary: Path) -> None:
    """From now on, while the process lives, `events` gets what no reading may do."""

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if is_forbidden(event, args, str(canary)):
            events.append(event)

    sys.addaudithook(hook)


def is_forbidden(event: str, args: tuple[Any, ...], canary: str) -> bool:
    """Whether a payload may have done this, and the program itself has no reason to."""
    if event == "import":
        return args[0] == "this"
    if event == "exec":  # importing a module is one too
        return canary in args[0].co_consts
    if event == "open":
        return str(args[0]) == canary
    return event.startswith(FORBIDDEN)


def attempt(call: Callable[[], object], canary: Path, events: list[str]) -> Attempt:
    events.clear()
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        code = exit_code(call)
    traces = [*events]
    if canary.exists():
        traces.append("CANARY")
        canary.unlink()
    sys.modules.pop("this", None)  # or importing it again would be no event
    return Attempt(Done(code, output.getvalue()), traces)


def assert_one_line(done: Done, file: Path, name: str) -> None:
    """Exit code 1, and a last line of bounded length with the file and the remedy."""
    assert done.code == 1, f"{name}: ended with {done.code}\n{done.text}"
    assert "Traceback" not in done.text, f"{name}: {done.text}"
    assert done.last.startswith("error: "), f"{name}: {done.last!r}"
    assert done.last.isprintable(), f"{name}: {done.last!r}"
    assert str(file) in done.last, f"{name}: {done.last}"
    assert len(done.last) < 700 + len(str(file)), f"{name}: {done.last}"
    assert ": " in done.last or ";" in done.last, f"{name}: no remedy in {done.last}"


def assert_refused(done: Done, entry: str, file: Path, finished: Finished, name: str) -> None:
    """A checkpoint is skipped by name, and nothing else is there to resume from."""
    if entry == "resume":
        skipped = checkpoint.numbered(finished.run / "ckpt", 3)
        assert f"skipped: {skipped}" in done.text, f"{name}: {done.text}"
        file = finished.run
    assert_one_line(done, file, name)
