"""Stop signals. A signal ends the program with 128 + its number, at once, or where `delayed`
says so, after a save.
"""

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# seconds within which a signal is still the same one: a shell whose terminal closes, `timeout`
# and other launchers send theirs twice
ECHO_S = 0.5


class Stop:
    """Whether a signal has asked for a stop.

    repeats: whether the second says no more than the first.
    """

    def __init__(self, repeats: bool = False) -> None:
        self.repeats = repeats
        self.signum = 0  # of this process; 0 as long as there was none
        self.since = 0.0
        self.agreed = 0  # once all ranks know of it
        self.told = False

    def note(self, signum: int, frame: FrameType | None) -> None:
        """The handler: it prints nothing, for the terminal may be what is gone."""
        now = time.monotonic()
        if self.signum == 0:
            self.signum = signum
            self.since = now
        elif signum == signal.SIGINT and not self.repeats and now - self.since > ECHO_S:
            leave(signum)

    def tell(self) -> None:
        """Says once that a signal has come; between two steps."""
        if self.told or not self.signum:
            return
        self.told = True
        more = "" if self.repeats else "; Ctrl-C once more to leave at once"
        print(f"\n{signal.Signals(self.signum).name}: finishing the step and saving{more}")


def leave(signum: int, frame: FrameType | None = None) -> None:
    """Ends the program. What a second signal could interrupt is the clearing up: it is
    ignored, but for Ctrl-C, which ends the process as it stands.
    """
    for other in SIGNALS:
        if signal.getsignal(other) is not signal.SIG_IGN:
            signal.signal(other, signal.SIG_DFL if other == signal.SIGINT else signal.SIG_IGN)
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
    """Within it a signal only sets `stop.signum`, and takes effect at the end; a second
    Ctrl-C does so at once.

    repeats: the second says no more than the first, as under torchrun, which passes on what a
    terminal sent already.
    """
    stop = Stop(repeats)
    before = {signum: signal.getsignal(signum) for signum in SIGNALS}
    for signum, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(signum, stop.note)
    try:
        yield stop
    finally:
        for signum, handler in before.items():
            if signal.getsignal(signum) == stop.note:  # else the program is leaving
                signal.signal(signum, handler)
    last = stop.agreed or stop.signum
    if last:
        leave(last)
