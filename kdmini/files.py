"""Files written whole or not at all."""

import os
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
