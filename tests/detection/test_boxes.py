"""Boxes, against torchvision, and anchor points, against numbers written down by hand."""

import math

import pytest
import torch
from torchvision.ops import box_area as their_area
from torchvision.ops import complete_box_iou, complete_box_iou_loss

from kdmini.detection.boxes import (
    anchor_points,
    box_area,
    ciou,
    dist_ltrb_to_xyxy,
    intersection,
    xyxy_to_dist_ltrb,
)

CPU = torch.device("cpu")


def random_boxes(count, seed, spread=100.0):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator, dtype=torch.float64) * spread
    sides = torch.rand(count, 2, generator=generator, dtype=torch.float64) * 40 + 0.5
    return torch.cat([corner, corner + sides], 1)


def pairs():
    """Overlapping, apart, nested, equal, touching, and very unlike boxes: (P, 4), (P, 4)."""
    a, b = random_boxes(400, 0, 60), random_boxes(400, 1, 60)
    b[:40] = a[:40] + 0.3
    b[40:80] = torch.cat([a[40:80, :2] - 1, a[40:80, 2:] + 2], 1)
    b[80] = a[80]
    b[81] = a[81] + torch.tensor([1.0, 0, 1, 0]) * (a[81, 2] - a[81, 0])
    b[82] = torch.tensor([0.0, 0, 500, 0.6])
    return a, b


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-7), (torch.float32, 1e-5)])
def test_ciou_equals_torchvision(dtype, tolerance):
    a, b = (boxes.to(dtype) for boxes in pairs())
    found = ciou(a, b)
    expected = complete_box_iou(a, b).diagonal()
    assert (found - expected).abs().max() < tolerance
    assert found.max() <= 1 + tolerance and found.min() >= -1.5 and found.min() < -0.5


def test_ciou_broadcasts():
    a, b = random_boxes(7, 2), random_boxes(5, 3)
    found = ciou(a[:, None], b[None])
    assert found.shape == (7, 5)
    assert (found - complete_box_iou(a, b)).abs().max() < 1e-7


def test_ciou_of_boxes_worked_out_by_hand():
    a, b = torch.tensor([0.0, 0, 2, 2]), torch.tensor([1.0, 1, 3, 3])
    assert ciou(a, a).item() == pytest.approx(1, abs=1e-6)
    assert ciou(a, b).item() == pytest.approx(1 / 7 - 2 / 18, abs=1e-6)  # same aspect
    tall = torch.tensor(
        [0.0, 0, 2, 4]
    )  # same left top corner: IoU 1/2, centres 1 apart, diagonal^2 20
    v = 4 / math.pi**2 * (math.atan(1) - math.atan(0.5)) ** 2
    assert ciou(a, tall).item() == pytest.approx(0.5 - 1 / 20 - v * v / (v + 0.5), abs=1e-6)


def test_gradients_of_ciou_equal_torchvision():
    a, b = pairs()
    for mine, other in ((a, b), (b, a)):
        ours, theirs = mine.clone().requires_grad_(), mine.clone().requires_grad_()
        (1 - ciou(ours, other)).sum().backward()
        complete_box_iou_loss(theirs, other, reduction="sum").backward()
        assert theirs.grad.abs().max() > 0.01
        different = (ours.grad - theirs.grad).abs().max(1).values > 1e-7
        # where two corners coincide the maximum has no gradient of its own: only the equal box and
        # the touching one
        assert set(different.nonzero().flatten().tolist()) <= {80, 81}
    assert torch.isfinite(ours.grad).all()


def test_degenerate_boxes_give_finite_gradients():
    a = torch.tensor([[5.0, 5, 5, 5], [0, 0, 4, 0], [3, 3, 1, 1]], requires_grad=True)
    value = ciou(a, torch.tensor([[5.0, 5, 5, 5]]))
    value.sum().backward()
    assert torch.isfinite(value).all() and torch.isfinite(a.grad).all()


def test_area_and_intersection():
    a, b = pairs()
    assert torch.allclose(box_area(a), their_area(a))
    assert box_area(torch.tensor([[3.0, 3, 1, 1], [0, 0, 2, 5]])).tolist() == [0, 10]
    by_hand = torch.tensor([[0.0, 0, 4, 4], [0, 0, 4, 4], [0, 0, 4, 4], [1, 1, 2, 3]])
    against = torch.tensor([[2.0, 3, 6, 9], [4, 0, 8, 4], [5, 5, 9, 9], [0, 0, 9, 9]])
    assert intersection(by_hand, against).tolist() == [2, 0, 0, 2]
    assert torch.equal(intersection(a, b), intersection(b, a))
    assert intersection(a[:, None], b[None, :3]).shape == (400, 3)


def test_anchor_points_are_the_centres_of_the_cells_row_by_row():
    points, stride_of = anchor_points([(2, 3), (1, 2)], [8, 16], CPU)
    assert points.tolist() == [
        [4, 4],
        [12, 4],
        [20, 4],
        [4, 12],
        [12, 12],
        [20, 12],
        [8, 8],
        [24, 8],
    ]
    assert stride_of.tolist() == [[8]] * 6 + [[16]] * 2
    assert points.dtype == stride_of.dtype == torch.float32
    points, stride_of = anchor_points([(80, 80), (40, 40), (20, 20)], [8, 16, 32], CPU)
    assert points.shape == (8400, 2) and stride_of.shape == (8400, 1)
    assert points[6400].tolist() == [8, 8] and points[-1].tolist() == [624, 624]


def test_a_level_without_a_stride_is_an_error():
    with pytest.raises(ValueError):
        anchor_points([(2, 2), (1, 1)], [8], CPU)


def test_distances_by_hand():
    points, stride_of = torch.tensor([[12.0, 20.0]]), torch.tensor([[8.0]])
    boxes = torch.tensor([[[4.0, 16, 28, 60]]])  # (1, 1, 4)
    assert xyxy_to_dist_ltrb(boxes, points, stride_of).tolist() == [[[1, 0.5, 2, 5]]]
    assert (
        dist_ltrb_to_xyxy(torch.tensor([[[1, 0.5, 2, 5]]]), points, stride_of).tolist()
        == boxes.tolist()
    )
    assert xyxy_to_dist_ltrb(torch.tensor([[20.0, 0, 30, 40]]), points, stride_of)[0, 0] < 0


def test_distances_go_there_and_back():
    points, stride_of = anchor_points([(16, 16), (8, 8), (4, 4)], [8, 16, 32], CPU)
    boxes = random_boxes(3 * len(points), 4).float().reshape(3, len(points), 4)
    distances = xyxy_to_dist_ltrb(boxes, points, stride_of)
    assert torch.allclose(dist_ltrb_to_xyxy(distances, points, stride_of), boxes, atol=1e-4)
    distances = torch.rand(3, len(points), 4) * 15
    back = xyxy_to_dist_ltrb(dist_ltrb_to_xyxy(distances, points, stride_of), points, stride_of)
    assert torch.allclose(back, distances, atol=1e-4)
