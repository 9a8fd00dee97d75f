"""Where a run stands: numbers that no run has, and what a terminal of 80 columns shows."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
from tqdm import tqdm

from kdmini.engine import BAR, status
from kdmini.progress import Progress, implausible, text_of_epoch

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


LOSSES = {"loss/box": 5.862, "loss/cls": 3.999, "loss/dfl": 3.495, "loss/attention": 15.461}
SCORES = {f"score/{name}": 0.1234 for name in ("AP50-95", "AP50", "AP75", "VOC07", "VOC")}
DISTANCES = {"distance/raw": 3.472, **{f"distance/raw/model.{n}": 0.5 for n in range(6)}}


def test_an_epoch_is_told_in_lines_of_80_columns():
    record = {**LOSSES, "lambda/attention": 2.0, "lr": 0.01, **SCORES, **DISTANCES}
    progress = Progress(epoch=99, best=0.1234, best_epoch=99)
    assert text_of_epoch(record, progress).splitlines() == [
        "epoch 100: box 5.862 cls 3.999 dfl 3.495 attention 15.461 | lambda attention 2",
        "    AP50-95 0.123 AP50 0.123 AP75 0.123 VOC07 0.123 VOC 0.123 distance/raw 3.472",
        "    best",
    ]


def test_an_epoch_without_evaluation_is_never_the_best():
    progress = Progress(epoch=0, best=0.5, best_epoch=0, skipped=3)
    assert text_of_epoch({"loss/box": 1.0}, progress) == "epoch 1: box 1.000 | skipped 3"


def test_the_bar_shows_lambda_and_losses_first():
    training: Any = SimpleNamespace(
        progress=Progress(step=120, seconds=60.0),
        distillation=SimpleNamespace(lambdas=lambda epoch: {"attention": 2.0}),
        recipe=SimpleNamespace(batch=16),
    )
    first = "lambda 2 | box 5.86 cls 4 dfl 3.5 attention 15.5"
    losses = first.partition(" | ")[2]
    line = tqdm.format_meter(
        120,
        345,
        60,
        ncols=80,
        prefix="epoch 12/100",
        bar_format=BAR,
        postfix=status(losses, training, 0.01),
    )
    assert len(line) <= 80
    assert first in line
