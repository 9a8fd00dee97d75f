"""Stop signals. A signal ends the program with 128 + its number, at once, or where `delayed`
says so, after a save.
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stop:
    """Whether a signal has asked for a stop."""

    def __init__(self) -> None:
        self.signum = 0  # of this process; 0 as long as there was none
        self.agreed = 0  # once all ranks know of it


def leave(signum: int, frame: FrameType | None = None) -> None:
    sys.exit(128 + signum)


def exit_on_signals() -> None:
    """From now on a signal unwinds the stack, so that nothing half-written is left; nohup's
    stay ignored.
    """
    for signum in SIGNALS:
        if signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, leave)


@contextmanager
def delayed(repeats: bool = False) -> Iterator[Stop]:
    """Within it the first signal only sets `stop.signum`, and takes effect at the end; the
    second does so at once.

    repeats: the second says no more than the first, as under torchrun, which passes on what a
    terminal sent already.
    """
    stop = Stop()

    def note(signum: int, frame: FrameType | None) -> None:
        if stop.signum == 0:
            announce(signum, "" if repeats else "; once more to leave at once")
        elif not repeats:
            leave(signum)
        stop.signum = signum

    before = {signum: signal.getsignal(signum) for signum in SIGNALS}
    for signum, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(signum, note)
    try:
        yield stop
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
    last = stop.agreed or stop.signum
    if last:
        leave(last)


def announce(signum: int, more: str) -> None:
    """Not by print, which the signal may have interrupted in the middle of printing."""
    line = f"\n{signal.Signals(signum).name}: finishing the step and saving{more}\n"
    os.write(2, line.encode())
