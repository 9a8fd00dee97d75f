"""Anchors, selection and losses of ATSS, by hand and against plain loops in float64."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from kdmini.detection.atss_loss import (
    LEVELS,
    Anchors,
    anchors_of,
    assign,
    centerness_of,
    deltas_to_xyxy,
    detection_loss,
)
from tests.detection.atss_loops import looped_loss, select_by_the_paper

CLASSES = 3


def empty_maps(height: int, width: int) -> list[Tensor]:
    """(1, 1, H, W) of each level of an image of this size."""
    maps = []
    for stride in LEVELS.values():
        rows = math.ceil(height / stride)
        columns = math.ceil(width / stride)
        maps.append(torch.zeros(1, 1, rows, columns))
    return maps


def random_maps(
    rng: np.random.Generator,
    channels: int,
    size: tuple[int, int],
    spread: float,
) -> list[Tensor]:
    """Of two images, float64."""
    maps = []
    for level in empty_maps(*size):
        shape = (2, channels, *level.shape[2:])
        maps.append(torch.from_numpy(rng.normal(0, spread, shape)))
    return maps


def random_targets(
    rng: np.random.Generator,
    images: int,
    objects: int,
    size: tuple[int, int],
) -> dict:
    """Boxes of 4 pixels to beyond the image, crowded, float64.

    A third of the places is padding, wherever it stands.
    """
    centres = rng.uniform(0, 1, (images, objects, 2)) * size[::-1]
    sides = np.exp(rng.uniform(math.log(4), math.log(200), (images, objects, 2)))
    labels = rng.integers(0, CLASSES, (images, objects))
    labels[rng.uniform(size=labels.shape) < 1 / 3] = -1
    corners = np.concatenate([centres - sides / 2, centres + sides / 2], -1)
    return {
        "boxes_xyxy": torch.from_numpy(corners),
        "labels": torch.from_numpy(labels),
    }


# --- by hand


def test_centerness_by_hand() -> None:
    points = torch.tensor([[5.0, 5], [1, 5], [2, 1]])
    boxes_xyxy = torch.tensor([0.0, 0, 10, 10]).expand(1, 3, 4)
    centre = 1
    left = math.sqrt(1 / 9)
    corner = math.sqrt(2 / 8 * 1 / 9)
    expected = torch.tensor([[centre, left, corner]])
    torch.testing.assert_close(centerness_of(boxes_xyxy, points), expected)


def test_centerness_is_next_to_nothing_on_a_side_and_outside() -> None:
    points = torch.tensor([[10.0, 3], [-3, 5]])
    boxes_xyxy = torch.tensor([0.0, 0, 10, 10]).expand(1, 2, 4)
    centerness = centerness_of(boxes_xyxy, points)
    assert centerness.isfinite().all()
    assert centerness.max() < 1e-3


def test_deltas_by_hand() -> None:
    anchors = Anchors(
        points=torch.tensor([[72.0, 24.0]]),
        sides=torch.tensor([[128.0]]),
        counts=[1],
    )
    same = deltas_to_xyxy(torch.zeros(1, 1, 4), anchors)
    assert same.flatten().tolist() == [72 - 64, 24 - 64, 72 + 64, 24 + 64]

    narrower = 5 * math.log(0.5)
    higher = 5 * math.log(2)
    deltas = torch.tensor([[[1.0, -2.0, narrower, higher]]])
    moved = deltas_to_xyxy(deltas, anchors)
    x = 72 + 12.8
    y = 24 - 25.6
    expected = torch.tensor([[[x - 32, y - 128, x + 32, y + 128]]])
    torch.testing.assert_close(moved, expected)


def test_huge_deltas_give_finite_boxes() -> None:
    unit = Anchors(torch.zeros(1, 2), torch.ones(1, 1), [1])
    assert deltas_to_xyxy(torch.full((1, 1, 4), 1e4), unit).isfinite().all()


# --- against loops


@pytest.mark.parametrize(
    ("seed", "size", "objects"),
    [(0, (128, 96), 12), (1, (64, 64), 6), (2, (160, 224), 30)],
)
def test_assignment_is_that_of_the_paper(seed: int, size: tuple[int, int], objects: int) -> None:
    maps = empty_maps(*size)
    targets = random_targets(np.random.default_rng(seed), 3, objects, size)
    points, sides, counts = anchors_of(maps)
    assigned = assign(Anchors(points.double(), sides.double(), counts), targets)
    expected = select_by_the_paper(maps, targets)
    assert expected.contested > 0
    assert (assigned.labels >= 0).sum() > objects / 2

    for n, owners in enumerate(expected.owners):
        owner = torch.tensor(owners)
        positive = owner >= 0
        labels = targets["labels"][n, owner].masked_fill(~positive, -1)
        boxes_xyxy = targets["boxes_xyxy"][n, owner]
        assert torch.equal(assigned.labels[n], labels)
        assert torch.equal(assigned.boxes_xyxy[n, positive], boxes_xyxy[positive])


@pytest.mark.parametrize("together", [1, 2])
def test_a_few_images_at_a_time_are_equal_to_the_bit(
    together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = (160, 224)
    objects = 30
    anchors = anchors_of(empty_maps(*size))
    targets = random_targets(np.random.default_rng(2), 3, objects, size)
    whole = assign(anchors, targets)
    assert (whole.labels >= 0).any(1).all()
    pairs = (objects + 1) * len(anchors.points)  # one more object is padding
    monkeypatch.setattr("kdmini.detection.boxes.MOST_PAIRS", math.ceil(together * pairs / 3))
    parts = assign(anchors, targets)
    assert torch.equal(parts.labels, whole.labels)
    assert torch.equal(parts.boxes_xyxy, whole.boxes_xyxy)


@pytest.mark.parametrize("regions", [0, 3])
def test_losses_are_those_of_the_papers(regions: int) -> None:
    """Regions, among them padding, are ignored."""
    rng = np.random.default_rng(3)
    size = (64, 96)
    targets = random_targets(rng, 2, 6, size)
    if regions:
        drawn = random_targets(rng, 2, regions, size)
        targets["ignored_xyxy"] = drawn["boxes_xyxy"] * (drawn["labels"] >= 0)[..., None]
    preds = {
        "cls": random_maps(rng, CLASSES, size, spread=2.0),
        "box": random_maps(rng, 4, size, spread=3.0),
        "centerness": random_maps(rng, 1, size, spread=2.0),
    }
    single = targets | {"boxes_xyxy": targets["boxes_xyxy"].float()}
    losses = detection_loss(preds, single)
    for name, value in looped_loss(preds, targets).items():
        assert losses[name].item() == pytest.approx(value, rel=1e-4), name
