"""Files written whole or not at all, and read where they are files."""

import os
import stat
from collections.abc import Callable
from pathlib import Path

from kdmini.contracts import UserError


def write_whole(path: Path, content: str | bytes) -> None:
    """By a temporary file beside it, renamed at the end. Raises UserError."""
    temporary = path.with_name(path.name + ".tmp")
    data = content.encode() if isinstance(content, str) else content
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(
            f"cannot write {path} ({error.strerror}); make room, or write elsewhere"
        ) from error
    finally:
        if temporary.is_file():  # a signal, too, may have come between
            temporary.unlink()


# what is in the place of a file
OTHER_KINDS: dict[str, Callable[[int], bool]] = {
    "a folder": stat.S_ISDIR,
    "a pipe": stat.S_ISFIFO,
    "a device": lambda mode: stat.S_ISCHR(mode) or stat.S_ISBLK(mode),
    "a socket": stat.S_ISSOCK,
}


def check_kind(path: str | Path) -> None:
    """Raises UserError for a path that is a folder, a pipe, a device or a socket.

    To open a pipe would wait for whoever writes into it, and a device may never end.
    Passes where nothing is: opening that fails by itself.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return
    for kind, is_kind in OTHER_KINDS.items():
        if is_kind(mode):
            raise UserError(f"{path} is {kind}, not a file; name a file")
