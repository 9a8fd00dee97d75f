"""The panels of the curves, by the groups of the keys in metrics.jsonl."""

import pytest

pytest.importorskip("matplotlib")
from kdmini.tools.curves import curves, panels_of

RECORDS = [
    {"epoch": -1, "distance/aligned": 0.5, "distance/raw": 1.0, "distance/raw/neck": 1.0},
    {"epoch": 0, "lambda/hint": 2.0, "loss/hint": 4.0, "loss/AP": 3.0, "lr": 0.1, "skipped": 0},
    {"epoch": 1, "lambda/hint": 0.0, "loss/AP": 2.0, "lr": 0.1, "skipped": 1, "score/top1": 0.7},
]


def test_a_loss_with_a_lambda_is_a_term_and_names_are_not_guessed() -> None:
    panels = {panel.title.split(",")[0]: panel.lines for panel in panels_of(RECORDS)}
    assert panels["Losses of the model"] == {"AP": [(1, 3.0), (2, 2.0)]}
    assert panels["Losses of distillation"] == {"hint": [(1, 4.0)]}
    assert panels["Lambda: how strongly a term counts"] == {"hint": [(1, 2.0), (2, 0.0)]}
    assert panels["Scores on the validation set"] == {"top1": [(2, 0.7)]}


def test_distances_are_in_three_panels_and_what_is_empty_is_none() -> None:
    panels = [panel.lines for panel in panels_of(RECORDS)]
    assert {"aligned": [(0, 0.5)], "raw": [(0, 1.0)]} in panels
    assert {"neck": [(0, 1.0)]} in panels
    assert len(panels) == 7  # no distances behind the align modules at a tap, no speed


def test_a_line_that_is_alone_is_named_at_its_axis() -> None:
    labels = [axis.get_ylabel() for axis in curves(RECORDS, "a run").axes]
    assert "hint, lambda" in labels
    assert "lr" in labels
    assert "sum over the taps" in labels


def test_what_is_no_finite_number_is_in_no_panel() -> None:
    values = {"a": True, "b": float("nan"), "c": 10**400, "d": "0.5", "e": float("inf"), "f": 1}
    record = {"epoch": 0, **{f"score/{name}": value for name, value in values.items()}}
    (panel,) = panels_of([record])
    assert panel.lines == {"f": [(1, 1)]}


def test_a_count_has_a_panel_of_its_own() -> None:
    """Beside it scores would be lines along the ground."""
    records = [{"epoch": 0, "score/mIoU": 0.5, "score/absent": 0}, {"epoch": 1, "score/absent": 4}]
    scores, counts = panels_of(records)
    assert set(scores.lines) == {"mIoU"}
    assert set(counts.lines) == {"absent"}
