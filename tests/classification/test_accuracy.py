"""Accuracy on paper, against a rule in loops, and what it writes."""

import csv
import math

import numpy as np
import pytest
import torch

from kdmini.classification.accuracy import Accuracy
from kdmini.contracts import UserError

NAMES = ["cat", "dog", "fish"]
SEVEN = [f"class {row}" for row in range(7)]


def measure(rows, labels, names, batch=3):
    metric = Accuracy(names)
    for start in range(0, len(rows), batch):
        part = slice(start, start + batch)
        predictions = [{"scores": torch.as_tensor(row)} for row in rows[part]]
        targets = [{"label": label, "id": f"image {label}"} for label in labels[part]]
        metric.update(predictions, targets)
    return metric


def test_a_case_computed_on_paper():
    rows = [[0.7, 0.2, 0.1], [0.1, 0.5, 0.4], [0.2, 0.5, 0.3], [0.6, 0.3, 0.1]]
    metric = measure(rows, [0, 1, 2, 1], NAMES)
    assert metric.compute() == {"top1": 0.5}  # of three classes, the best five say nothing
    assert metric.confusion().tolist() == [[1, 0, 0], [1, 1, 0], [0, 1, 0]]
    assert metric.per_class() == {
        "cat": {"top1": 1.0, "images": 1},
        "dog": {"top1": 0.5, "images": 2},
        "fish": {"top1": 0.0, "images": 1},
    }
    assert metric.chance() == 0.5  # always a dog
    by_image = metric.per_image()  # the last of two images of one name
    assert by_image == pytest.approx({"image 0": 0.7, "image 1": -0.6, "image 2": -0.5})


@pytest.mark.parametrize("seed", range(4))
def test_the_best_one_and_the_best_five_in_loops(seed):
    rng = np.random.default_rng(seed)
    rows = rng.random((50, 7))
    labels = rng.integers(0, 7, 50).tolist()
    first = five = 0
    for row, label in zip(rows.tolist(), labels, strict=True):
        order = sorted(range(7), key=lambda k: -row[k])
        first += order[0] == label
        five += label in order[:5]
    metric = measure(rows, labels, SEVEN)
    assert metric.compute() == {"top1": first / 50, "top5": five / 50}
    assert metric.confusion().trace() == first
    assert metric.summary == ("top1", "top5")


def test_of_equal_scores_the_first_is_better():
    metric = measure([[0.2] * 7] * 7, list(range(7)), SEVEN)
    assert metric.compute() == {"top1": 1 / 7, "top5": 5 / 7}


@pytest.mark.parametrize("nan", [[math.nan] * 7, [math.nan, *[0.1] * 6], [0.9, math.nan, *[0] * 5]])
def test_what_is_no_number_hits_nothing(nan):
    metric = measure([nan], [0], SEVEN)
    assert metric.compute()["top1"] == 0


def test_nothing_is_zero():
    assert Accuracy(SEVEN).compute() == {"top1": 0, "top5": 0}
    assert Accuracy(SEVEN).chance() == 0
    table = measure([[0.7, 0.2, 0.1]], [0], NAMES).per_class()
    assert math.isnan(table["dog"]["top1"])


def test_records_are_small_and_in_any_order():
    rows = torch.rand(20, 7)
    labels = torch.randint(0, 7, (20,)).tolist()
    metric = measure(rows, labels, SEVEN, batch=4)
    assert [record.nbytes for record in metric.records] == [4 * 3 * 8] * 5
    scores = metric.compute()
    metric.records.reverse()
    assert metric.compute() == scores


def test_classes_without_a_name_are_refused():
    with pytest.raises(UserError, match="image 3: label 3 and 3 scores, but the metric knows 3"):
        measure([[0.7, 0.2, 0.1]], [3], NAMES)
    with pytest.raises(UserError, match="image 0: label 0 and 2 scores, but the metric knows 3"):
        measure([[0.7, 0.2]], [0], NAMES)
    with pytest.raises(ValueError, match="argument 2 is longer"):
        Accuracy(NAMES).update([], [{"label": 0, "id": "a"}])


def test_it_writes_the_confusion_and_the_answers(tmp_path):
    names = ["cat, black", "dog", "fish"]
    metric = measure([[0.7, 0.2, 0.1], [0.125, 0.5, 0.375]], [0, 2], names)
    folder = metric.save(tmp_path / "a" / "b")
    with open(folder / "confusion.csv", newline="") as file:
        assert list(csv.reader(file)) == [
            ["", *names],
            ["cat, black", "1", "0", "0"],
            ["dog", "0", "0", "0"],
            ["fish", "0", "1", "0"],
        ]
    with open(folder / "answers.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["id", "true", "predicted", "score"]
    assert rows[2] == ["image 2", "fish", "dog", "0.5000"]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        metric.save(tmp_path / "file" / "b")
