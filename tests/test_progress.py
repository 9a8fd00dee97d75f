"""Numbers of a saved Progress that no run has."""

import math
from typing import Any

import pytest

from kdmini.progress import Progress, implausible

SAVED = Progress(2, 3, 0.5, 1, 0, {"box": 1.5}, {"box": 3}, 0, 2.0)


@pytest.mark.parametrize(
    "saved", [Progress(), SAVED, Progress(4, 0, -math.inf, 0), Progress(4, 0, -math.inf, 4)]
)
def test_the_numbers_of_a_run_are_plausible(saved):
    assert implausible(saved.state_dict()) == ""


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"epoch": -1}, "'epoch' is -1"),
        ({"step": 2**60}, "'step' is 1152921504606846976"),
        ({"skipped": -3}, "'skipped' is -3"),
        ({"best": math.nan}, "best is nan"),
        ({"best_epoch": 9}, "of epoch 9"),
        ({"sums": {"cls": 1.0}}, "the sum of 'cls' is 1.0"),  # without a count
        ({"sums": {"box": math.inf}}, "the sum of 'box' is inf"),
        ({"sums": {"box": "much"}}, "the sum of 'box' is 'much'"),
        ({"counts": {"box": 0}}, "the sum of 'box'"),
        ({"counts": {"box": 1.5}}, "'box' is 1.5"),
        ({"seconds": 0.0}, "seconds is 0.0"),
        ({"seconds": math.nan}, "seconds is nan"),
    ],
)
def test_a_number_that_no_run_has_is_named(changes, fault):
    state: dict[str, Any] = SAVED.state_dict() | changes
    assert fault in implausible(state)
