"""Memory that runs out, of a device or of the machine: a line in place of a traceback."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from kdmini.contracts import UserError

# in messages of RuntimeError; torch has a class of its own for its allocator of CUDA alone
OF_MACHINE = ("DefaultCPUAllocator", "Cannot allocate memory")
OF_DEVICE = ("out of memory", "STATUS_ALLOC_FAILED")  # CUDA, NCCL, Triton; cuBLAS, cuDNN


def exhausted(error: BaseException) -> str:
    """Whose memory it says has run out, in words; empty for an error of another kind."""
    if isinstance(error, MemoryError):
        return "this machine"
    text = str(error) if isinstance(error, RuntimeError) else ""
    if any(words in text for words in OF_MACHINE):
        return "this machine"
    if any(words in text for words in OF_DEVICE):
        return "the device"
    return ""


@contextmanager
def bounded(remedy: str) -> Iterator[None]:
    """Within it, memory that runs out raises UserError. remedy: what asks for less."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        place = exhausted(error)
        if not place:
            raise
        raise UserError(f"out of memory on {place}: {remedy}") from error


def remedy_of(settings: Mapping[str, Any]) -> str:
    """What in a config, which need not be a right one, asks for less."""
    stated: dict[str, Any] = {}
    for name in ("train", "data"):
        section = settings.get(name)
        stated |= section if isinstance(section, Mapping) else {}
    batch = stated.get("batch")
    imgsz = stated.get("imgsz", "640 (the default)")
    return (
        f"train.batch={batch} at data.imgsz={imgsz} is too much; lower one of them, or set "
        "data.storage=mapped, or on CUDA train.amp=true"
    )
