"""Files that grow as long as a program runs, and have their names when they are whole."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from kdmini.contracts import UserError
from kdmini.typed import printable


@contextmanager
def growing(path: Path) -> Iterator[Path]:
    """-> NAME.part beside it, to be written to. At the end it gets the name; where the end is
    not reached, it is taken away. Raises UserError where it cannot get the name.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        yield part
        with writing(path):
            os.replace(part, path)
    finally:
        if part.is_file():
            part.unlink()


@contextmanager
def appended(path: Path) -> Iterator[Callable[[bytes], None]]:
    """-> what appends bytes to a growing file, at once. Both raise UserError."""
    with growing(path) as part:
        with writing(path):
            file = part.open("wb", buffering=0)  # or what does not fit would fail once more

        def append(data: bytes) -> None:
            rest = memoryview(data)
            with writing(path):
                while rest:
                    rest = rest[file.write(rest) :]

        with file:
            yield append


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Within it, an OSError becomes a UserError: the file cannot be written."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write {printable(path)} ({error.strerror}); make room, or write elsewhere"
        ) from error
