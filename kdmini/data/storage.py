"""Where decoded pixels stay: resident in the memory of the device, or in a scratch file that is
mapped from the disk, and which of the two.

A part is the packed pixels of one image, int32, in one dimension.
"""

import os
import tempfile
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO, Literal

import numpy as np
import torch
from torch import Tensor

from kdmini.contracts import UserError

Storage = Literal["auto", "resident", "mapped"]

SHARE = 0.9  # of a card's free memory that can be filled: the rest is fragments and workspaces
MARGIN = 1.05  # of the buffer over what is expected, for that is an estimate
GROWTH = 1.1  # of a buffer that is too small
ASSUMED_FREE = 2**31  # bytes, where the system does not tell

OPEN_FILES = Path("/proc/self/fd")  # where it is there, processes find each other's open files


def choose(expected: int, device: torch.device, step: int | None = None) -> Storage:
    """What `auto` is for pixels of so many bytes, of all sets together.

    step: bytes that a training step takes on the device; None where there is none to count,
    and half of what is free is left to others.
    """
    free = free_bytes(device)
    most = free / 2 if step is None else SHARE * free - step
    return "resident" if expected < most else "mapped"


def kept(
    storage: Storage, expected: int, device: torch.device, parts: Iterable[np.ndarray]
) -> Tensor:
    """The parts joined, where `storage` says; expected: bytes of all of them, about."""
    if storage == "resident":
        return resident(parts, expected, device)
    return mapped(scratch_file(parts))


def resident(parts: Iterable[np.ndarray], expected: int, device: torch.device) -> Tensor:
    """Joins the parts in one buffer on the device as they come, so that nothing else holds
    them. Where they are more than expected, the buffer is made anew.
    """
    room = int(MARGIN * expected) // 4
    buffer = torch.empty(room, dtype=torch.int32, device=device)
    end = 0
    for part in parts:
        start = end
        end += len(part)
        if end > len(buffer):
            larger = buffer.new_empty(max(end, int(GROWTH * len(buffer))))
            larger[:start] = buffer[:start]
            buffer = larger
        buffer[start:end] = torch.from_numpy(part)
    return buffer[:end]


def scratch_file(parts: Iterable[np.ndarray]) -> IO[bytes]:
    """The parts in an open file without a name, which vanishes when it is closed: it can neither
    be stale nor be left behind.
    """
    folder = Path(os.environ.get("KDMINI_CACHE") or "~/.cache/kdmini").expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as open_until_written:
            file = open_until_written.enter_context(tempfile.TemporaryFile(dir=folder))
            for part in parts:
                part.tofile(file)
            file.flush()
            open_until_written.pop_all()
            return file
    except OSError as error:
        raise UserError(
            f"cannot keep images in {folder} ({error}); set KDMINI_CACHE to a larger disk"
        ) from error


def mapped(file: IO[bytes] | str) -> Tensor:
    """The content of a scratch file; it stays when the file is closed.

    file: open, or its address in another process.
    """
    return torch.from_numpy(np.memmap(file, np.int32, mode="r+"))


def address(file: IO[bytes]) -> str:
    """By which other processes of this machine open the file, while it is open here."""
    return f"/proc/{os.getpid()}/fd/{file.fileno()}"


def free_bytes(device: torch.device) -> int:
    """Memory that is free now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    # macOS counts only what there is, and half of that is taken to be free
    for name, share in (("SC_AVPHYS_PAGES", 1), ("SC_PHYS_PAGES", 2)):
        with suppress(ValueError):
            return os.sysconf(name) * os.sysconf("SC_PAGE_SIZE") // share
    return ASSUMED_FREE
