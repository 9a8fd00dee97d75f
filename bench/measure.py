"""Side by side: variants in turn, in one process; medians with quartiles.

On the CPU one thread and process CPU time; on a GPU wall clock, up to the end of the
work that was queued.
"""

import platform
import time
from collections.abc import Callable, Mapping

import numpy as np
import torch

QUARTILES = (25, 50, 75)


def take_turns(
    variants: Mapping[str, Callable[[], object]], rounds: int = 9, device: str = "cpu"
) -> dict[str, np.ndarray]:
    """-> seconds of each call, (rounds,) each; a further round before them warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(-1, rounds):
        for name, work in variants.items():
            started = clock(device)
            work()
            passed = clock(device) - started
            if number >= 0:
                seconds[name].append(passed)
    return {name: np.array(values) for name, values in seconds.items()}


def clock(device: str) -> float:
    if device == "cpu":
        torch.set_num_threads(1)
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def table(seconds: Mapping[str, np.ndarray], against: str, items: int, item: str) -> str:
    """Milliseconds per item, and how many times faster than `against`.

    The median of the rounds' ratios, with quartiles.
    """
    lines = [f"| | ms per {item} | faster than {against}: median (quartiles) |", "|---|---|---|"]
    for name, values in seconds.items():
        low, middle, high = np.percentile(seconds[against] / values, QUARTILES)
        cost = 1000 * np.median(values) / items
        lines.append(f"| {name} | {cost:.3g} | {middle:.2f} ({low:.2f}, {high:.2f}) |")
    return "\n".join(lines)


def machine(device: str = "cpu", threads: int = 1) -> str:
    """Versions and hardware, for the head of a record."""
    if device == "cpu":
        count = "one thread" if threads == 1 else f"{threads} threads"
        hardware = f"{platform.machine()}, {count}"
    else:
        hardware = torch.cuda.get_device_name()
    return f"torch {torch.__version__}, Python {platform.python_version()}, {hardware}"


def no_peer(error: ImportError) -> str:
    """What is said where ultralytics takes no part in a comparison."""
    return f"ultralytics takes no part ({error}): PYTHONPATH=.oracle/newest, after `make parity`"
