"""What predict says of each image, in JSON, as it goes on: a list in a file, or lines.

An entry is a mapping of plain values. In files text is UTF-8; in a name of a file that is
not, the other bytes stand as JSON's \\udc80 to \\udcff. On the standard output all is ASCII,
for a terminal acts upon some of the other characters.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from kdmini.tools.growing import appended

Add = Callable[[Mapping[str, Any]], None]  # is called with each entry


@contextmanager
def in_list(path: Path) -> Iterator[Add]:
    """A JSON list, with an entry on each line."""
    separator = b"[\n"

    def add(entry: Mapping[str, Any]) -> None:
        nonlocal separator
        append(separator + encoded(entry))
        separator = b",\n"

    with appended(path) as append:
        yield add
        append(b"\n]\n" if separator == b",\n" else b"[]\n")


@contextmanager
def in_lines(path: Path) -> Iterator[Add]:
    """JSON lines, each at once in PATH.part."""
    with appended(path) as append:
        yield lambda entry: append(encoded(entry) + b"\n")


@contextmanager
def on_stream(stream: TextIO) -> Iterator[Add]:
    """JSON lines, each at once."""
    yield lambda entry: print(json.dumps(entry), file=stream, flush=True)


def encoded(entry: Mapping[str, Any]) -> bytes:
    return json.dumps(entry, ensure_ascii=False).encode(errors="backslashreplace")
