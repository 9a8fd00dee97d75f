"""lambda(t): the formula of the research notes, and what is no schedule."""

import pytest

from kdmini.contracts import UserError
from kdmini.distill.schedule import check_segments, piecewise_linear

NOTES = [[0, 2.0, 40, 0.0], [40, 0.3, 100, 0.0], [100, 0.05, float("inf"), 0.05]]


def lambda_of_the_notes(epoch: float) -> float:
    if epoch < 40:
        return 2.0 * (1 - epoch / 40)
    elif epoch < 100:
        return 0.3 * (1 - (epoch - 40) / 60)
    else:
        return 0.05


def test_equals_the_formula_in_every_epoch() -> None:
    for epoch in range(150):
        expected = lambda_of_the_notes(epoch)
        assert piecewise_linear(NOTES, epoch) == pytest.approx(expected, abs=1e-12), epoch


WRITTEN_DOWN = {  # epoch -> lambda
    0: 2,
    20: 1,
    39: 0.05,
    40: 0.3,
    70: 0.15,
    99: 0.005,
    100: 0.05,
    105: 0.05,
    149: 0.05,
}


@pytest.mark.parametrize("epoch", WRITTEN_DOWN)
def test_values_written_down(epoch: int) -> None:
    """Where the notes' table and formula differ, at 40 and 100, the formula wins."""
    assert piecewise_linear(NOTES, epoch) == pytest.approx(WRITTEN_DOWN[epoch])


def test_zero_before_between_and_after_the_segments() -> None:
    segments = [[2, 1.0, 4, 3.0], [6, 1.0, 8, 1.0]]
    values = [piecewise_linear(segments, epoch) for epoch in range(10)]
    assert values == [0, 0, 1, 2, 0, 0, 1, 1, 0, 0]
    assert piecewise_linear([], 3) == 0


def test_an_epoch_may_be_a_fraction() -> None:
    assert piecewise_linear([[2, 1.0, 4, 3.0]], 3.5) == 2.5


def test_a_segment_without_an_end_keeps_its_first_value() -> None:
    assert piecewise_linear([[0, 2.0, float("inf"), 5.0]], 1000) == 2


@pytest.mark.parametrize("segments", [NOTES, [], [[0, 1, 1, 0]], [[0, 1, 5, 0], [9, 1, 10, 1]]])
def test_segments_that_follow_one_another_are_taken(segments: list[list[float]]) -> None:
    check_segments(segments)


REFUSED = {
    "overlap": (
        [[0, 2.0, 40, 0.0], [39, 0.3, 100, 0.0]],
        r"\[39, 0.3, 100, 0.0\] .* after epoch 40",
    ),
    "in the wrong order": (
        [[40, 2.0, 80, 0.0], [0, 0.3, 40, 0.0]],
        r"\[0, 0.3, 40, 0.0\]",
    ),
    "of no length": ([[0, 1.0, 0, 1.0]], r"\[0, 1.0, 0, 1.0\]"),
    "backwards": ([[5, 1.0, 2, 1.0]], r"\[5, 1.0, 2, 1.0\]"),
    "of three numbers": ([[0, 1.0, 2]], r"\[0, 1.0, 2\]"),
    "of five numbers": ([[0, 1.0, 2, 1.0, 3]], r"\[0, 1.0, 2, 1.0, 3\]"),
}


@pytest.mark.parametrize("segments, named", REFUSED.values(), ids=REFUSED)
def test_other_segments_are_refused_by_value(segments: list[list[float]], named: str) -> None:
    with pytest.raises(UserError, match=named):
        check_segments(segments)
