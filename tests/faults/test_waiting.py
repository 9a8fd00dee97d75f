"""Between two looks at its numbers, nothing in training waits for the device."""

import math
import traceback
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import kdmini
from kdmini.progress import Tally
from kdmini.signals import Stop
from tests.faults.spoiling import Bench, Fault

PACKAGE = Path(kdmini.__file__).parent  # whatever the folder around it is called
WAITING = (
    "_local_scalar_dense",
    "nonzero",
    "_unique2",
    "is_nonzero",
    "item",
    "equal",
    "masked_select",
)


class Waits(TorchDispatchMode):
    """Keeps what makes the host wait on a GPU: operators whose result the host needs."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []  # with the line of kdmini that called it
        self.count = 0  # of all operators

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        name = func.overloadpacket.__name__
        by_mask = name.startswith("index") and any(is_mask(arg) for arg in args[1:])
        if name in WAITING or by_mask:
            stack = traceback.extract_stack()
            ours = [frame for frame in stack if Path(frame.filename).is_relative_to(PACKAGE)]
            self.found.append(f"{name}: {ours[-1].line}" if ours else name)
        return func(*args, **(kwargs or {}))


def is_mask(argument: object) -> bool:
    """Whether it is a list of indices with a mask among them, whose size is not known before."""
    if not isinstance(argument, list | tuple):
        return False
    return any(isinstance(item, Tensor) and item.dtype == torch.bool for item in argument)


@pytest.mark.parametrize("amp", [False, "bf16", "fp16"])
@pytest.mark.parametrize("place", ["", "cls"])
def test_between_two_reads_nothing_waits_for_the_device(
    shapes: Path, monkeypatch: pytest.MonkeyPatch, amp: bool | str, place: str
) -> None:
    bench = Bench(shapes, amp)
    bench.update()
    bench.update()
    bench.progress.next_epoch()
    reads = []

    def no_read(tally: Tally, *args: object) -> str:
        tally.waiting.clear()
        tally.progress.seconds = 1.0
        reads.append(args)
        return ""

    monkeypatch.setattr(Tally, "read", no_read)
    if place:
        bench.fault = Fault(place, math.nan)
    stop = Stop()
    waits = Waits()
    with waits:
        bench.train(stop)  # six steps; the only read is at the end, and taken away
    assert len(reads) == 1
    assert waits.count > 6 * 1000
    assert set(waits.found) == set()


def test_control_what_waits_is_seen() -> None:
    waits = Waits()
    with waits:
        torch.tensor(1.0).item()
    assert waits.found[-1] == "_local_scalar_dense"
