"""Boxes, by hand and against torchvision, and anchor points, by hand."""

import math

import pytest
import torch
from torch import Tensor
from torchvision.ops import (
    batched_nms,
    complete_box_iou,
    complete_box_iou_loss,
    generalized_box_iou_loss,
    nms,
)
from torchvision.ops import box_area as their_area

from kdmini.detection import boxes
from kdmini.detection.boxes import (
    anchor_points,
    apart_by_class,
    box_area,
    centre_inside,
    ciou,
    dist_ltrb_to_xyxy,
    flatten_levels,
    giou,
    intersection,
    nms_by_class,
    xyxy_to_dist_ltrb,
)
from tests.pretended import card

CPU = torch.device("cpu")
# rows of pairs()
EQUAL = 80
TOUCHING = 81
UNLIKE = 82


def random_boxes(count: int, seed: int, spread: float = 100.0) -> Tensor:
    """(count, 4) float64."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator, dtype=torch.float64)
    sides = torch.rand(count, 2, generator=generator, dtype=torch.float64)
    left_top = corner * spread
    return torch.cat([left_top, left_top + sides * 40 + 0.5], 1)


def pairs() -> tuple[Tensor, Tensor]:
    """Overlapping, apart, nested, equal, touching, and unlike boxes: (P, 4), (P, 4)."""
    a = random_boxes(400, 0, spread=60)
    b = random_boxes(400, 1, spread=60)
    b[:40] = a[:40] + 0.3
    b[40:80] = a[40:80] + torch.tensor([-1.0, -1.0, 2.0, 2.0])
    b[EQUAL] = a[EQUAL]
    width = a[TOUCHING, 2] - a[TOUCHING, 0]
    b[TOUCHING] = a[TOUCHING] + torch.tensor([1.0, 0.0, 1.0, 0.0]) * width
    b[UNLIKE] = torch.tensor([0.0, 0.0, 500.0, 0.6])
    return a, b


# --- CIoU


def test_ciou_of_boxes_worked_out_by_hand() -> None:
    a = torch.tensor([0.0, 0, 2, 2])
    shifted = torch.tensor([1.0, 1, 3, 3])  # of the same aspect
    assert ciou(a, a).item() == pytest.approx(1, abs=1e-6)
    assert ciou(a, shifted).item() == pytest.approx(1 / 7 - 2 / 18, abs=1e-6)


def test_ciou_of_unlike_aspects_worked_out_by_hand() -> None:
    square = torch.tensor([0.0, 0, 2, 2])
    tall = torch.tensor([0.0, 0, 2, 4])
    iou = 1 / 2
    distance = 1  # of the centres
    diagonal = 20  # its square
    v = 4 / math.pi**2 * (math.atan(1) - math.atan(0.5)) ** 2
    alpha = v / (v + 1 - iou)
    expected = iou - distance / diagonal - alpha * v
    assert ciou(square, tall).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-7), (torch.float32, 1e-5)])
def test_ciou_equals_torchvision(dtype: torch.dtype, tolerance: float) -> None:
    a, b = (boxes.to(dtype) for boxes in pairs())
    ours = ciou(a, b)
    theirs = complete_box_iou(a, b).diagonal()
    assert (ours - theirs).abs().max() < tolerance
    assert ours.max() <= 1 + tolerance
    assert ours.min() >= -1.5
    assert ours.min() < -0.5


def test_ciou_broadcasts() -> None:
    a = random_boxes(7, 2)
    b = random_boxes(5, 3)
    ours = ciou(a[:, None], b[None])
    theirs = complete_box_iou(a, b)
    assert ours.shape == (7, 5)
    assert (ours - theirs).abs().max() < 1e-7


@pytest.mark.parametrize("swapped", [False, True])
def test_gradients_of_ciou_equal_torchvision(swapped: bool) -> None:
    moving, other = reversed(pairs()) if swapped else pairs()
    ours = moving.clone().requires_grad_()
    theirs = moving.clone().requires_grad_()
    (1 - ciou(ours, other)).sum().backward()
    complete_box_iou_loss(theirs, other, reduction="sum").backward()

    assert theirs.grad.abs().max() > 0.01
    assert torch.isfinite(ours.grad).all()
    difference = (ours.grad - theirs.grad).abs().amax(1)
    rows = (difference > 1e-7).nonzero().flatten()
    # where two corners coincide the maximum has no gradient of its own
    assert set(rows.tolist()) <= {EQUAL, TOUCHING}


def test_degenerate_boxes_give_finite_gradients() -> None:
    point = torch.tensor([[5.0, 5, 5, 5]])
    boxes = torch.tensor(
        [
            [5.0, 5, 5, 5],
            [0, 0, 4, 0],
            [3, 3, 1, 1],
        ],
        requires_grad=True,
    )
    value = ciou(boxes, point)
    value.sum().backward()
    assert value.isfinite().all()
    assert boxes.grad.isfinite().all()


# --- area, intersection, generalised IoU


def test_area_by_hand_is_zero_where_a_side_is_negative() -> None:
    inside_out = [3.0, 3, 1, 1]
    usual = [0.0, 0, 2, 5]
    assert box_area(torch.tensor([inside_out, usual])).tolist() == [0, 10]


def test_area_equals_torchvision() -> None:
    boxes, _ = pairs()
    assert torch.allclose(box_area(boxes), their_area(boxes))


def test_intersection_by_hand() -> None:
    square = torch.tensor([0.0, 0, 4, 4])
    others = torch.tensor(
        [
            [2.0, 3, 6, 9],  # overlaps by 2 x 1
            [4, 0, 8, 4],  # touches
            [5, 5, 9, 9],  # is apart
            [1, 1, 2, 3],  # lies inside
            [-1, -1, 9, 9],  # lies around
        ]
    )
    assert intersection(square, others).tolist() == [2, 0, 0, 2, 16]


def test_intersection_is_symmetric_and_broadcasts() -> None:
    a, b = pairs()
    assert torch.equal(intersection(a, b), intersection(b, a))
    assert intersection(a[:, None], b[None, :3]).shape == (400, 3)


def test_giou_by_hand() -> None:
    a = torch.tensor([0.0, 0, 2, 2])
    apart = torch.tensor([3.0, 0, 4, 2])  # 6 of the enclosing 8 are covered
    assert giou(a, a).item() == pytest.approx(1, abs=1e-6)
    assert giou(a, apart).item() == pytest.approx(-2 / 8, abs=1e-6)


def test_giou_is_torchvisions_also_for_boxes_without_area() -> None:
    a, b = pairs()
    b[100:105, 2:] = b[100:105, :2]  # as the padding of a batch
    theirs = generalized_box_iou_loss(a, b)
    torch.testing.assert_close(1 - giou(a, b), theirs, atol=1e-6, rtol=0)


# --- anchor points


def test_anchor_points_are_the_centres_of_the_cells_row_by_row() -> None:
    points, stride_of = anchor_points([(2, 3), (1, 2)], [8, 16], CPU)
    first_row = [[4, 4], [12, 4], [20, 4]]
    second_row = [[4, 12], [12, 12], [20, 12]]
    second_level = [[8, 8], [24, 8]]
    assert points.tolist() == first_row + second_row + second_level
    assert stride_of.flatten().tolist() == [8] * 6 + [16] * 2
    assert points.dtype == torch.float32
    assert stride_of.dtype == torch.float32


def test_an_image_of_640_pixels_has_8400_anchor_points() -> None:
    sizes = [(80, 80), (40, 40), (20, 20)]
    points, stride_of = anchor_points(sizes, [8, 16, 32], CPU)
    assert points.shape == (8400, 2)
    assert stride_of.shape == (8400, 1)
    assert points[6400].tolist() == [8, 8]
    assert points[-1].tolist() == [624, 624]


def test_flattened_levels_are_in_the_order_of_their_anchor_points() -> None:
    sizes = [(2, 3), (1, 2)]
    points, _ = anchor_points(sizes, [8, 16], CPU)
    columns = torch.tensor([[4.0, 12, 20], [4, 12, 20]])
    rows = torch.tensor([[4.0, 4, 4], [12, 12, 12]])
    first = torch.stack([columns, rows])[None].half()  # (1, 2, H, W), x y of each cell
    second = torch.tensor([[[[8.0, 24]], [[8, 8]]]]).half()
    flat = flatten_levels([first, second])
    assert flat.dtype == torch.float32
    assert torch.equal(flat, points[None])


def test_a_level_without_a_stride_is_an_error() -> None:
    with pytest.raises(ValueError):
        anchor_points([(2, 2), (1, 1)], [8], CPU)


# --- distances


def test_distances_by_hand() -> None:
    points = torch.tensor([[12.0, 20.0]])
    stride_of = torch.tensor([[8.0]])
    boxes_xyxy = torch.tensor([[[4.0, 16, 28, 60]]])  # (1, 1, 4)
    dist_ltrb = torch.tensor([[[1, 0.5, 2, 5]]])
    assert torch.equal(xyxy_to_dist_ltrb(boxes_xyxy, points, stride_of), dist_ltrb)
    assert torch.equal(dist_ltrb_to_xyxy(dist_ltrb, points, stride_of), boxes_xyxy)


def test_a_distance_is_negative_where_the_point_is_outside() -> None:
    points = torch.tensor([[12.0, 20.0]])
    stride_of = torch.tensor([[8.0]])
    box_to_the_right = torch.tensor([[20.0, 0, 30, 40]])
    dist_ltrb = xyxy_to_dist_ltrb(box_to_the_right, points, stride_of)
    assert dist_ltrb.tolist() == [[-1, 2.5, 2.25, 2.5]]


def test_boxes_go_there_and_back() -> None:
    points, stride_of = anchor_points([(16, 16), (8, 8), (4, 4)], [8, 16, 32], CPU)
    boxes_xyxy = random_boxes(3 * len(points), 4).float()
    boxes_xyxy = boxes_xyxy.reshape(3, len(points), 4)
    dist_ltrb = xyxy_to_dist_ltrb(boxes_xyxy, points, stride_of)
    back = dist_ltrb_to_xyxy(dist_ltrb, points, stride_of)
    assert torch.allclose(back, boxes_xyxy, atol=1e-4)


def test_distances_go_there_and_back() -> None:
    points, stride_of = anchor_points([(16, 16), (8, 8), (4, 4)], [8, 16, 32], CPU)
    dist_ltrb = torch.rand(3, len(points), 4) * 15
    boxes_xyxy = dist_ltrb_to_xyxy(dist_ltrb, points, stride_of)
    back = xyxy_to_dist_ltrb(boxes_xyxy, points, stride_of)
    assert torch.allclose(back, dist_ltrb, atol=1e-4)


# --- points in boxes


@pytest.mark.parametrize(
    "x, inside",
    [(5.0, True), (10 - 1e-8, True), (10.0, False), (1e-8, True), (0.0, False), (-1.0, False)],
)
def test_a_point_is_inside_a_box_but_not_on_its_side(x: float, inside: bool) -> None:
    box = torch.tensor([[[0.0, 0, 10, 10]]], dtype=torch.float64)  # (N, G, 4)
    point = torch.tensor([[x, 5.0]], dtype=torch.float64)  # (A, 2)
    assert centre_inside(point, box).tolist() == [[[inside]]]


# --- suppression


@pytest.mark.parametrize("count", [1, 300, 3000])  # torchvision goes class by class above 1,000
def test_what_stays_by_class_is_torchvisions(count: int) -> None:
    boxes_xyxy = random_boxes(count, 5).float()
    labels = torch.arange(count) % 7
    scores = torch.rand(count, generator=torch.Generator().manual_seed(6))
    expected = batched_nms(boxes_xyxy, scores, labels, 0.5)
    assert torch.equal(nms_by_class(boxes_xyxy, scores, labels, 0.5), expected)
    assert torch.equal(nms(apart_by_class(boxes_xyxy, labels), scores, 0.5), expected)
    assert (len(expected) < count) == (count > 1)


@pytest.mark.parametrize("count", [0, 5, 30_000])
def test_suppression_on_a_card_waits_for_nothing_but_itself(
    monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    suppressed = []

    def fake_nms(boxes_xyxy: Tensor, scores: Tensor, iou: float) -> Tensor:
        suppressed.append(boxes_xyxy.shape)
        return torch.empty(3, dtype=torch.int64, device="cuda")

    monkeypatch.setattr(boxes, "nms", fake_nms)
    with card() as operations:
        boxes_xyxy = torch.empty(count, 4, device="cuda")
        scores = torch.empty(count, device="cuda")
        labels = torch.empty(count, dtype=torch.int64, device="cuda")
        nms_by_class(boxes_xyxy, scores, labels, 0.5)
    assert suppressed == ([(count, 4)] if count else [])
    # of the labels to floating point, on the card
    assert operations.counts["_to_copy"] <= 1
    waiting = {"copy_", "_unique2", "nonzero", "_local_scalar_dense", "lift_fresh"}
    assert not waiting & operations.counts.keys()
