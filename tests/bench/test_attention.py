"""What attention transfers: how it is measured, and that the page is made of what is kept."""

import json

import numpy as np
import pytest
import torch

from bench import attention
from bench.attention_pictures import gains_by_row
from bench.rows import protocol_at
from kdmini.contracts import View
from kdmini.data.layout import Frame
from kdmini.tools.scenes import Scenes
from tests.conftest import ROOT


def test_the_area_under_the_curve_counts_pairs() -> None:
    """A tie is half a pair."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(0, 4, (5, 6), generator=generator).float()
    positive = torch.rand(5, 6, generator=generator) < 0.4
    pairs = []
    for inner in values[positive].tolist():
        for outer in values[~positive].tolist():
            pairs.append(1.0 if inner > outer else 0.5 if inner == outer else 0.0)
    assert attention.area_under_curve(values, positive) == pytest.approx(sum(pairs) / len(pairs))
    assert attention.area_under_curve(values, torch.ones(5, 6, dtype=torch.bool)) is None


def scenes(*boxes: list[list[float]]) -> Scenes:
    """Square photographs of 32 pixels."""
    targets = []
    for number, of_one in enumerate(boxes):
        corners = np.array(of_one, dtype=np.float32).reshape(-1, 4)
        labels = np.arange(len(of_one))
        targets.append({"boxes_xyxy": corners, "labels": labels, "id": str(number)})
    frames = [Frame(1.0, np.zeros(2), np.array([32, 32]), 32)] * len(boxes)
    return Scenes(torch.zeros(len(boxes), 3, 32, 32), targets, frames)


def test_cells_are_in_a_box_by_their_middle() -> None:
    found = attention.inside(scenes([[0, 0, 13, 8]], []), (4, 4))
    expected = torch.zeros(2, 4, 4, dtype=torch.bool)
    expected[0, 0, :2] = True
    assert torch.equal(found, expected)


def test_objects_can_be_given_to_another_photograph() -> None:
    both = scenes([[0, 0, 8, 8]], [[1, 1, 9, 9], [2, 2, 10, 10]])
    right = attention.boxes_of(both, slice(0, 2))
    wrong = attention.boxes_of(both, slice(0, 2), roll=1)
    assert right["labels"].tolist() == [[0, -1], [0, 1]]
    assert wrong["labels"].tolist() == [[0, 1], [0, -1]]
    assert torch.equal(wrong["boxes_xyxy"][0], right["boxes_xyxy"][1])


def test_a_view_is_rolled_whole() -> None:
    numbers = torch.arange(3.0).view(3, 1, 1, 1)
    view = View({"tap": numbers}, [numbers], torch.empty(0), [numbers])
    turned = attention.rolled(view)
    for found in (turned.feats["tap"], turned.preds[0], (turned.classes or [])[0]):
        assert found.flatten().tolist() == [2, 0, 1]


def test_the_page_is_made_of_what_is_kept() -> None:
    found = json.loads(attention.KEPT.read_text())
    page = attention.PAGE.read_text()
    tables = page.partition(attention.MARKS[0])[2].partition(attention.MARKS[1])[0]
    assert tables.strip() == attention.tables(found)


def test_gains_are_those_of_the_records() -> None:
    path = ROOT / "bench/evidence/head.yaml"
    protocol = protocol_at(path)
    gains = gains_by_row(protocol, path.with_suffix(""))
    assert gains
    page = path.with_suffix(".md").read_text()
    for name, values in gains.items():
        line = next(line for line in page.splitlines() if line.startswith(f"| {name} "))
        assert f"{sum(values) / len(values):+.2f}" in line
