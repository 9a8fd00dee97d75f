"""The detection loss by hand, in loops, at its minimum, and of strange objects."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdmini.detection.boxes import counted
from kdmini.detection.yolo11.loss import detection_loss, distribution_focal, expected_dist
from tests.detection.yolo11.plain_loops import looped_loss
from tests.detection.yolo11.scenes import (
    BINS,
    BOX_CHANNELS,
    CLASSES,
    CROWD,
    SCENES,
    SIZES,
    STRIDES,
    Object,
    all_points,
    random_maps,
    targets_of,
)
from tests.precise import float_or_double


def loss_of(maps: list[Tensor], targets: Any) -> dict[str, Tensor]:
    return detection_loss(maps, targets, STRIDES, BINS)


def total(losses: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(losses.values())).sum()


# --- on a device


def test_its_gradient_waits_for_nothing() -> None:
    """On CUDA the gradient of a `prod` looks for zeros, and the host with it."""
    maps = [level.requires_grad_() for level in random_maps(3, 0)]
    reached = [total(loss_of(maps, targets_of(*SCENES))).grad_fn]
    for node in reached:
        parents = [parent for parent, _ in node.next_functions if parent is not None]
        reached += [parent for parent in parents if parent not in reached]
    names = {node.name() for node in reached}
    assert "MulBackward0" in names
    waits = ("Prod", "Cumprod", "Nonzero", "MaskedSelect")
    assert not {name for name in names if name.startswith(waits)}


# --- by hand, and in plain loops


def single_anchor() -> Tensor:
    """Of stride 32 at (16, 16), with one class of logit 0.

    The distribution of each side: a quarter in bin 0, three quarters in bin 1.
    """
    level = torch.full((1, BOX_CHANNELS + 1, 1, 1), -100.0)
    level[0, BOX_CHANNELS] = 0
    for side in range(4):
        level[0, side * BINS] = math.log(1)
        level[0, side * BINS + 1] = math.log(3)
    return level


def test_the_expected_distance_is_the_mean_of_the_distribution() -> None:
    dist_logits = single_anchor()[:, :BOX_CHANNELS].flatten(2).mT  # (1, 1, 4R)
    assert expected_dist(dist_logits, BINS).flatten().tolist() == pytest.approx([0.75] * 4)


def test_one_object_worked_out_by_hand() -> None:
    targets = targets_of([Object([0, 0, 32, 32], 0)])
    losses = detection_loss([single_anchor()], targets, [32], BINS)
    # The box is -8 -8 40 40. Centre and aspect are the object's, so CIoU is IoU, which is
    # also the target score. All is divided by 1, the least.
    iou = 32 * 32 / 48**2
    assert losses["box"].item() == pytest.approx(iou * (1 - iou), rel=1e-4)
    # of logit 0, whatever the target
    assert losses["cls"].item() == pytest.approx(math.log(2), rel=1e-4)
    two_bins = math.log(1 / 4) + math.log(3 / 4)
    assert losses["dfl"].item() == pytest.approx(-iou * two_bins / 2, rel=1e-4)


def test_dfl_equals_a_plain_loop() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 5, BOX_CHANNELS)
    dist = torch.rand(2, 5, 4) * 18 - 1.5  # some negative, some beyond the last bin
    ours = distribution_focal(logits, dist, BINS)
    for n in range(2):
        for a in range(5):
            expected = 0.0
            for side, row in enumerate(logits[n, a].view(4, BINS)):
                distance = min(max(dist[n, a, side].item(), 0), 14.99)
                low = int(distance)
                share_high = distance - low
                to_low = F.cross_entropy(row, torch.tensor(low)).item()
                to_high = F.cross_entropy(row, torch.tensor(low + 1)).item()
                expected += (1 - share_high) * to_low / 4
                expected += share_high * to_high / 4
            assert ours[n, a].item() == pytest.approx(expected, rel=1e-5)


def maps_of_boxes(seed: int) -> list[Tensor]:
    """Of SCENES, with boxes of about their size."""
    maps = random_maps(3, seed)
    falling = torch.arange(BINS).repeat(4) * -0.4
    with torch.no_grad():
        for level in maps:
            level[:, :BOX_CHANNELS] += falling.view(1, -1, 1, 1)
    return maps


@pytest.mark.parametrize("seed", range(3))
def test_equals_plain_loops(seed: int) -> None:
    maps = maps_of_boxes(seed)
    losses = loss_of(maps, targets_of(*SCENES))
    expected = looped_loss(maps, SCENES)
    for name, value in expected.items():
        assert value > 0.05, name
        assert losses[name].item() == pytest.approx(value, rel=2e-5), name


# --- ignored regions

REGIONS: list[list[list[float]]] = [
    [[40, 16, 96, 64], [-4, -4, 11, 20]],  # over objects, and beside them
    [[2, 3, 70, 40]],
    [],
]


def with_regions(targets: Any) -> Any:
    """`targets` of SCENES, with REGIONS padded."""
    ignored_xyxy = torch.zeros(3, 4, 4)
    for n, boxes in enumerate(REGIONS):
        ignored_xyxy[n, : len(boxes)] = torch.tensor(boxes).view(-1, 4)
    return {**targets, "ignored_xyxy": ignored_xyxy}


def test_ignored_regions_equal_plain_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "float", float_or_double)
    maps = [level.detach().double() for level in maps_of_boxes(0)]
    targets = targets_of(*SCENES)
    losses = loss_of(maps, with_regions(targets))
    assert losses["cls"] < 0.8 * loss_of(maps, targets)["cls"]
    for name, value in looped_loss(maps, SCENES, REGIONS).items():
        assert losses[name].item() == pytest.approx(value, rel=1e-6), name


def test_an_ignored_region_stops_the_gradient_of_background_alone() -> None:
    """To the bit; what answers for an object learns in a region, too."""
    targets = targets_of(*SCENES)
    logits = []  # gradients (N, A, K)
    others = []
    for given in (targets, with_regions(targets)):
        maps = random_maps(3)
        total(loss_of(maps, given)).backward()
        gradients = [level.grad.flatten(2).mT for level in maps]
        logits.append(torch.cat([gradient[..., BOX_CHANNELS:] for gradient in gradients], 1))
        others.append(torch.cat([gradient[..., :BOX_CHANNELS] for gradient in gradients], 1))
    assert torch.equal(*others)

    positive = others[0].any(2)  # (N, A)
    inside = torch.zeros_like(positive)
    points, _ = all_points()
    for n, boxes in enumerate(REGIONS):
        for a, (x, y) in enumerate(points.tolist()):
            inside[n, a] = any(x1 < x < x2 and y1 < y < y2 for x1, y1, x2, y2 in boxes)
    assert (positive & inside).sum() > 5
    silent = inside & ~positive
    assert silent.sum() > 50
    assert (logits[1][silent] == 0).all()
    assert torch.equal(logits[1][~silent], logits[0][~silent])


def test_regions_that_hold_no_anchor_change_no_bit() -> None:
    targets = targets_of(*SCENES)
    maps = random_maps(3)
    empty = {**targets, "ignored_xyxy": torch.zeros(3, 8, 4)}
    plain = loss_of(maps, targets)
    assert loss_of(maps, empty) == plain


def test_regions_of_a_few_images_at_a_time_are_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    targets = with_regions(targets_of(*SCENES))
    points, _ = all_points()
    none = torch.zeros(3, len(points), dtype=torch.bool)
    whole = counted(points, targets, none)
    assert whole is not None
    monkeypatch.setattr("kdmini.detection.boxes.MOST_PAIRS", 1)
    assert torch.equal(counted(points, targets, none), whole)


# --- no objects, padding, strange objects


@pytest.mark.parametrize("padding", [0, 3])
def test_images_without_objects(padding: int) -> None:
    maps = random_maps(2)
    targets: Any = {
        "boxes_xyxy": torch.zeros(2, padding, 4),
        "labels": torch.full((2, padding), -1),
    }
    losses = loss_of(maps, targets)
    assert losses["box"] == 0
    assert losses["dfl"] == 0
    logits = torch.cat([level[:, BOX_CHANNELS:].flatten() for level in maps])
    assert losses["cls"].item() == pytest.approx(F.softplus(logits).sum().item())

    total(losses).backward()
    for level in maps:
        scores = level[:, BOX_CHANNELS:].sigmoid()
        assert not level.grad[:, :BOX_CHANNELS].any()
        assert torch.allclose(level.grad[:, BOX_CHANNELS:], scores, atol=1e-6)


@pytest.mark.parametrize("order", [1, -1], ids=["after the objects", "before them"])
def test_padding_changes_nothing(order: int) -> None:
    maps = random_maps(3)
    targets = targets_of(*SCENES)
    rubbish = torch.tensor([2.0, 2, 90, 60]).expand(3, 4, 4)
    none = torch.full((3, 4), -1)
    padded: Any = {
        "boxes_xyxy": torch.cat([targets["boxes_xyxy"], rubbish][::order], 1),
        "labels": torch.cat([targets["labels"], none][::order], 1),
    }
    plain = loss_of(maps, targets)
    for name, value in loss_of(maps, padded).items():
        assert value.item() == pytest.approx(plain[name].item(), rel=1e-6), name


def test_fewer_anchors_than_candidates() -> None:
    two_anchors = torch.randn(1, BOX_CHANNELS + 2, 1, 2)
    targets = targets_of([Object([2, 2, 60, 30], 1)])
    losses = detection_loss([two_anchors], targets, [32], BINS)
    for name, value in losses.items():
        assert value.isfinite(), name
        assert value > 0, name


def assert_finite(losses: dict[str, Tensor], maps: list[Tensor]) -> None:
    """Losses, and the gradients of the maps."""
    for value in losses.values():
        assert value.isfinite()
    for level in maps:
        assert level.grad.isfinite().all()


NO_ANCHOR_INSIDE = {
    "no area": [20, 20, 20, 20],
    "no height": [10, 20, 50, 20],
    "turned round": [50, 50, 10, 10],
    "outside": [200, 200, 260, 240],
    "left of it": [-60, 5, -2, 40],
    "a tenth of a pixel": [20.0, 20.0, 20.1, 20.1],
}
STRANGE = NO_ANCHOR_INSIDE | {
    "tiny, round an anchor": [19.99, 19.99, 20.01, 20.01],
    "beyond the last bin": [-900, -900, 900, 900],
}


@pytest.mark.parametrize("box", STRANGE.values(), ids=STRANGE)
def test_strange_objects_leave_loss_and_gradient_finite(box: list[float]) -> None:
    maps = random_maps(1)
    strange = Object(box, 0)
    usual = Object([50, 20, 94, 62], 1)
    losses = loss_of(maps, targets_of([strange, usual]))
    total(losses).backward()
    assert_finite(losses, maps)


@pytest.mark.parametrize("box", NO_ANCHOR_INSIDE.values(), ids=NO_ANCHOR_INSIDE)
def test_objects_without_an_anchor_inside_change_nothing(box: list[float]) -> None:
    maps = random_maps(1)
    usual = Object([50, 20, 94, 62], 1)
    losses = loss_of(maps, targets_of([Object(box, 0), usual]))
    without = loss_of(maps, targets_of([usual]))
    assert all(losses[name] == without[name] for name in losses)


@pytest.mark.parametrize("value", [1e4, -1e4])
def test_huge_logits_leave_loss_and_gradient_finite(value: float) -> None:
    maps = [torch.full((1, BOX_CHANNELS + CLASSES, h, w), value) for h, w in SIZES]
    for level in maps:
        level[:, ::3] *= -1
        level.requires_grad_()
    losses = loss_of(maps, targets_of(CROWD))
    total(losses).backward()
    assert_finite(losses, maps)


# --- the perfect answer, precision

TWO_OBJECTS = [Object([4, 6, 40, 50], 0), Object([50, 20, 94, 62], 2)]


def perfect_maps(objects: list[Object]) -> list[Tensor]:
    """Every anchor inside an object gives its box exactly, its class almost surely."""
    maps = []
    for stride, (height, width) in zip(STRIDES, SIZES, strict=True):
        level = torch.full((1, BOX_CHANNELS + CLASSES, height, width), -30.0)
        for row in range(height):
            for column in range(width):
                x = (column + 0.5) * stride
                y = (row + 0.5) * stride
                for item in objects:
                    x1, y1, x2, y2 = item.box_xyxy
                    if x1 < x < x2 and y1 < y < y2:
                        cell = level[0, :, row, column]
                        cell[BOX_CHANNELS + item.label] = 30
                        put_distances(cell, [x - x1, y - y1, x2 - x, y2 - y], stride)
        maps.append(level.requires_grad_())
    return maps


def put_distances(cell: Tensor, pixels: list[float], stride: int) -> None:
    for bins, distance in zip(cell[:BOX_CHANNELS].view(4, BINS), pixels, strict=True):
        clamped = min(distance / stride, BINS - 1.001)
        low = int(clamped)
        share_high = clamped - low
        bins[low] = math.log(1 - share_high + 1e-12)
        bins[low + 1] = math.log(share_high + 1e-12)


def test_the_perfect_answer_is_the_minimum() -> None:
    maps = perfect_maps(TWO_OBJECTS)
    losses = loss_of(maps, targets_of(TWO_OBJECTS))
    assert abs(losses["box"].item()) < 1e-4
    # what is left of DFL is the spread over two bins, and no step makes it smaller
    losses["dfl"].backward()
    assert all(level.grad.abs().max() < 1e-4 for level in maps)


def test_a_side_that_is_a_stride_too_far_costs() -> None:
    maps = [level.detach() for level in perfect_maps(TWO_OBJECTS)]
    targets = targets_of(TWO_OBJECTS)
    perfect = loss_of(maps, targets)
    for level in maps:
        level[:, :BINS] = level[:, :BINS].roll(1, 1)  # the left one
    spoilt = loss_of(maps, targets)
    assert spoilt["box"] > 0.1
    assert spoilt["dfl"] > perfect["dfl"] + 1


def test_maps_fitted_to_one_scene_find_its_boxes() -> None:
    maps = random_maps(1)
    targets = targets_of(TWO_OBJECTS)
    optimizer = torch.optim.Adam(maps, 0.1)
    first = loss_of(maps, targets)
    for _ in range(150):
        losses = loss_of(maps, targets)
        optimizer.zero_grad()
        total(losses).backward()
        optimizer.step()
    assert losses["box"].item() < 0.02
    assert first["box"].item() > 0.1
    assert losses["cls"].item() < 0.1 * first["cls"].item()


def test_half_precision_maps_are_scored_in_float32() -> None:
    targets = targets_of(*SCENES)
    exact = random_maps(3)
    halves = [level.detach().bfloat16() for level in exact]
    rounded = loss_of([level.float() for level in halves], targets)
    with torch.autocast("cpu", torch.bfloat16):
        losses = loss_of(halves, targets)
    for name, value in losses.items():
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(rounded[name].item(), rel=1e-5), name
    for name, value in loss_of(exact, targets).items():
        assert losses[name].item() == pytest.approx(value.item(), rel=0.02), name
