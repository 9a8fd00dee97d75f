"""What a program prints. The terminal may close, the reader of a pipe leave, the disk behind
a file fill up: none of it raises into the program, which goes on in silence.

What was printed is also kept, for the log of a run; progress bars are not.
"""

import contextlib
import errno
import io
import os
import select
import signal
import sys
from collections import deque
from functools import partialmethod
from pathlib import Path
from typing import Any

from tqdm import tqdm

WAITING = 1000  # lines kept until there is a log: the newest

# what a terminal would act upon and not show: it comes out of files, and out of servers
ACTED_UPON = [*range(32), *range(127, 160), 0x061C, *range(0x200E, 0x2010)]
ACTED_UPON += [*range(0x2028, 0x202F), *range(0x2066, 0x206A)]  # lines, and right to left
ESCAPES = {code: ascii(chr(code))[1:-1] for code in ACTED_UPON if chr(code) not in "\n\t"}
UP = "\x1b[A"  # by which tqdm returns to the first of several bars


class Log:
    """Lines that were printed: in memory, until there is a file for them."""

    def __init__(self) -> None:
        self.waiting: deque[str] = deque(maxlen=WAITING)
        self.descriptor = -1

    def add(self, line: str) -> None:
        """Never raises: what cannot be written is left out."""
        if self.descriptor < 0:
            self.waiting.append(line)
            return
        with contextlib.suppress(OSError):
            os.write(self.descriptor, f"{line}\n".encode(errors="backslashreplace"))

    def open(self, path: Path) -> None:
        if self.descriptor >= 0:  # of a run before, in the same process
            os.close(self.descriptor)
            self.descriptor = -1
        with contextlib.suppress(OSError):
            self.descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        while self.waiting and self.descriptor >= 0:
            self.add(self.waiting.popleft())


_log = Log()


def log_to(path: Path) -> None:
    """Appends to the file what was printed before and what will be."""
    _log.open(path)


class Descriptor(io.FileIO):
    """Bytes to a descriptor. After a failure whatever is written to it is discarded.

    needed: whether the program has no purpose without it, and ends.
    """

    def __init__(self, file: int | str, needed: bool) -> None:
        super().__init__(file, "w", closefd=isinstance(file, str))
        self.needed = needed

    def write(self, data: Any) -> int:
        try:
            written = super().write(data)
            while written is None:  # full, and not one that blocks
                select.select([], [self], [])
                written = super().write(data)
            return written
        except OSError as error:
            discard(self.fileno())
            if self.needed:
                end_unread(error)
            return len(data)


def discard(descriptor: int) -> None:
    """What is written to it from now on goes nowhere, also from code that is not Python."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


def end_unread(error: OSError) -> None:
    """Ends the program as the system ends one that writes into a pipe that nobody reads."""
    if error.errno == errno.EPIPE:
        sys.exit(128 + signal.SIGPIPE)
    sys.exit(f"error: cannot write to the standard output ({error.strerror})")


class Stream(io.TextIOWrapper):
    """Text to a descriptor, at once. Escaped is a character that the encoding lacks, or that
    a terminal would act upon.
    """

    def __init__(self, before: Any, descriptor: Descriptor) -> None:
        encoding = getattr(before, "encoding", "utf-8")
        super().__init__(io.BufferedWriter(descriptor), encoding, "backslashreplace")
        self.before = before  # or the descriptor would be closed with it
        self.line = ""  # not yet at its end

    def write(self, text: str) -> int:
        text = shown(text)
        if not text.startswith(("\r", UP)):  # as a progress bar does
            *lines, self.line = (self.line + text).split("\n")
            for line in filter(str.strip, lines):
                _log.add(line)
        count = super().write(text)
        self.flush()  # nothing is left to fail when Python exits
        return count


def shown(text: str) -> str:
    """What may reach a terminal: a progress bar moves its cursor, nothing else does."""
    if not text.replace(UP, ""):
        return text
    start = "\r" if text.startswith("\r") else ""
    return start + text.removeprefix("\r").translate(ESCAPES)


def guard(needed: bool = False) -> None:
    """From now on no print fails. Of any other stream than those of the process, such as a
    notebook's, nothing is changed.

    needed: end the program when nobody reads its standard output any more, as a tool does
    whose result that is.
    """
    descriptor = os.open(os.devnull, os.O_RDWR)
    while descriptor <= 2:  # one that is closed would become that of the next file
        descriptor = os.open(os.devnull, os.O_RDWR)
    os.close(descriptor)
    os.environ.setdefault("PYTHON_COLORS", "0")  # which would be escaped
    sys.stdout = guarded(sys.stdout, 1, needed)
    sys.stderr = guarded(sys.stderr, 2, False)


def guarded(stream: Any, number: int, needed: bool) -> Any:
    """The stream of a descriptor, in a form that does not fail; None, as Python has it for
    one that was closed, becomes one that discards.
    """
    if stream is None:
        return Stream(None, Descriptor(os.devnull, needed=False))
    try:
        is_of_process = stream.fileno() == number and not isinstance(stream, Stream)
    except (OSError, ValueError):  # it has no descriptor
        return stream
    if not is_of_process:
        return stream
    with contextlib.suppress(OSError):
        stream.flush()
    return Stream(stream, Descriptor(number, needed))


def be_silent() -> None:
    """No standard output and no progress bars; errors are still told."""
    discard(1)
    quiet = partialmethod(tqdm.__init__, disable=True)  # as tqdm's own pages have it
    setattr(tqdm, "__init__", quiet)  # noqa: B010 - mypy would not have it assigned
