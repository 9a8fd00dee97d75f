"""What a step of the main recipe takes of a card is no more than bench/counted.json says, on
which the tables of docs/small.md and docs/speed.md stand.
"""

import json
from functools import cache
from typing import Any

from bench import memory
from tests.cuda.conftest import run

KERNELS = 1700  # of a step, rendering left out
MEMORY = 290e6  # bytes an image
# another release of torch may take some operators apart otherwise
SPREAD = 1.01


@cache
def counted() -> tuple[dict[str, Any], dict[str, Any]]:
    """Here, and as recorded."""
    return json.loads(run("count", "")), memory.counted()


def test_a_step_launches_no_more_kernels_and_moves_no_more_bytes() -> None:
    here, recorded = counted()
    assert here["step"].keys() == recorded["step"].keys()
    for part, numbers in here["step"].items():
        for kind, number in numbers.items():
            assert number <= SPREAD * recorded["step"][part][kind], (part, kind)


def test_a_step_is_within_its_bounds() -> None:
    here, _ = counted()
    kernels = [part["kernels"] for name, part in here["step"].items() if name != "images"]
    assert len(kernels) == 8
    assert 1000 < sum(kernels) <= KERNELS
    assert 200e6 < here["memory"]["distilled"]["image"] <= MEMORY


def test_memory_is_as_recorded() -> None:
    here, recorded = counted()
    assert here["memory"].keys() == recorded["memory"].keys()
    for name, numbers in here["memory"].items():
        image = recorded["memory"][name]["image"]
        assert image / SPREAD <= numbers["image"] <= image * SPREAD, name
        beside = abs(numbers["fixed"] - recorded["memory"][name]["fixed"])
        assert beside < recorded["memory"][name]["image"] / 10, name
