"""What training costs on 1, 8 and 64 H100: on paper, from what a step was counted to take.

python -m bench.scale

Kernels and bytes of a step are those of bench/counted.json, whose parts are the first table.
Where nothing else is said, numbers of the machine are its maker's; the share of the memory's
bandwidth that a step reaches was measured on one H200 (bench/RESULTS.md, 2026-11-26). The
tables stand in docs/speed.md.
"""

from typing import NamedTuple

from bench.memory import counted
from bench.meta import TAPS, detector, parameters, table
from kdmini.distill.align import Align
from kdmini.distill.step import tap_shapes

BANDWIDTH = 3.35e12  # bytes/s of an H100's memory
MEASURED = 524  # images/s of a step on an H200, eager, bf16, batch 64
BANDWIDTH_THEN = 4.8e12  # bytes/s of its memory
LAUNCH = 6e-6  # s of the host for a kernel; assumed
INSIDE = 300e9  # bytes/s that a GPU sends to the next in its machine; assumed, of 450e9
BETWEEN = 40e9  # bytes/s that a GPU sends to another machine; assumed, of 50e9
HOP = 10e-6  # s that a message takes to begin; assumed
GPUS_OF_A_MACHINE = 8
GRADIENT = 4  # bytes

EPOCHS = 150
IMAGES = 17_125  # at most: annotated images of VOC 2012
HELD_OUT = 4_952
DECODE = 1.8e-3  # s of a core for a photograph; measured, bench/RESULTS.md of 2026-11-21
CORES = 12  # that decode in a machine
STORED = 16.6e9  # bytes, decoded


class Cost(NamedTuple):
    """Of a step, in seconds."""

    computing: float  # on the card
    launching: float  # on the host
    sending: float  # the gradients, all of it hidden behind the backward pass or not


def cost(gpus: int, images: int) -> Cost:
    """Of so many images on each GPU."""
    kernels = sum(part["kernels"] for part in counted()["step"].values())
    # bound by the memory: as many times slower as its bandwidth is lower
    speed = MEASURED * BANDWIDTH / BANDWIDTH_THEN
    return Cost(
        computing=images / speed,
        launching=kernels * LAUNCH,
        sending=ring(gpus, GRADIENT * learned()),
    )


def parts() -> str:
    """What a step takes of a card, part by part."""
    step = counted()["step"]
    rows = [(name, part["kernels"], f"{part['MB']:.0f}") for name, part in step.items()]
    kernels = sum(part["kernels"] for part in step.values())
    moved = sum(part["MB"] for part in step.values())
    rows.append(("all", kernels, f"{moved:.0f}"))
    return table(("part of a step", "kernels", "MB moved an image"), rows)


def learned() -> int:
    """Parameters of the student and of the align modules."""
    student = detector("s")
    shapes = tap_shapes(student, detector("m"), TAPS, 640)
    return parameters(student) + parameters(Align(shapes))


def ring(gpus: int, size: int) -> float:
    """Seconds of an all-reduce of so many bytes: each GPU sends twice nearly all of them, as
    fast as the slowest link.
    """
    if gpus == 1:
        return 0.0
    slowest = INSIDE if gpus <= GPUS_OF_A_MACHINE else BETWEEN
    return 2 * (gpus - 1) / gpus * size / slowest + 2 * (gpus - 1) * HOP


def scaling() -> str:
    """64 images on each GPU, and 64 images on all."""
    rows = []
    for gpus, images in ((1, 64), (8, 64), (64, 64), (8, 8), (32, 2)):
        step = cost(gpus, images)
        # sending is hidden behind the backward pass, half of a step, as far as it fits there
        busy = max(step.computing, step.launching)
        seconds = busy + max(step.sending - busy / 2, 0)
        speed = gpus * images / seconds
        hours = EPOCHS * IMAGES / speed / 3600
        rows.append(
            (
                gpus,
                images,
                f"{1000 * step.computing:.0f}",
                f"{1000 * step.launching:.0f}",
                f"{1000 * step.sending:.1f}",
                f"{speed:,.0f}",
                f"{hours:.2f}",
            )
        )
    head = (
        "GPUs",
        "images on each",
        "computing, ms",
        "launching, ms",
        "sending, ms",
        "images/s",
        f"{EPOCHS} epochs, h",
    )
    return table(head, rows)


def main() -> None:
    print(parts())
    print(f"\n{scaling()}")
    seconds = (IMAGES + HELD_OUT) * DECODE / CORES
    print(f"\ndecoding: {seconds:.1f} s and {STORED / 1e9:.1f} GB a machine, once")


if __name__ == "__main__":
    main()
