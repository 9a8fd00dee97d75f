"""Task-aligned assignment: who claims an anchor, who gets it, with what score."""

import math
import sys
from multiprocessing import get_context
from resource import RUSAGE_SELF, getrusage
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.ops import complete_box_iou

from kdmini.detection.boxes import MOST_PAIRS, anchor_points, images_at_once
from kdmini.detection.yolo11.assign import assign, best_object
from tests.detection.yolo11.scenes import (
    CLASSES,
    CROWD,
    SCENES,
    Object,
    all_points,
    targets_of,
)


def answers(images: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """scores, boxes, points: boxes spread around their own anchors."""
    torch.manual_seed(seed)
    points, stride_of = all_points()
    reach = torch.rand(images, len(points), 4) * 3 * stride_of
    boxes_xyxy = torch.cat([points - reach[..., :2], points + reach[..., 2:]], -1)
    return torch.rand(images, len(points), CLASSES), boxes_xyxy, points


NEAR = Object([11.0, 10.0, 31.0, 30.0], 0)
FAR = Object([16.0, 10.0, 37.0, 30.0], 1)


@pytest.mark.parametrize("objects", [[NEAR, FAR], [FAR, NEAR]], ids=["near first", "far first"])
def test_an_anchor_claimed_twice_goes_to_the_highest_ciou(objects: list[Object]) -> None:
    points = torch.tensor([[20.0, 20.0], [28.0, 20.0]])  # both objects hold both
    boxes_xyxy = torch.tensor([[10.0, 10, 30, 30], [18.0, 10, 38, 30]])
    even = torch.full((1, 2, 3), 0.5)
    assigned = assign(even, boxes_xyxy[None], points, targets_of(objects))
    assert assigned.boxes_xyxy[0].tolist() == [NEAR.box_xyxy, FAR.box_xyxy]
    ciou = complete_box_iou(torch.tensor([NEAR.box_xyxy, FAR.box_xyxy]), boxes_xyxy)
    expected = torch.zeros(2, 3)
    expected[0, NEAR.label] = ciou[0, 0]
    expected[1, FAR.label] = ciou[1, 1]
    assert torch.allclose(assigned.scores[0], expected, atol=1e-4)


def test_only_contested_anchors_change_hands() -> None:
    candidate = torch.tensor(
        [
            [True, True, False],
            [True, False, False],
            [False, False, False],
        ]
    )
    overlap = torch.tensor(
        [
            [0.1, 0.2, 0.9],
            [0.4, 0.9, 0.1],
            [0.3, 0.3, 0.3],
        ]
    )
    owned = best_object(candidate[None], overlap[None])
    assert owned[0].tolist() == [
        [False, True, False],
        [True, False, False],
        [False, False, False],
    ]


def test_at_most_ten_anchors_and_only_with_their_centre_inside() -> None:
    scores, boxes_xyxy, points = answers(1)
    box = [10.0, 10.0, 90.0, 60.0]
    assigned = assign(scores, boxes_xyxy, points, targets_of([Object(box, 1)]))
    owned = assigned.scores[0].any(-1)
    assert owned.sum() == 10
    x, y = points[owned].T
    assert ((x > 10) & (x < 90) & (y > 10) & (y < 60)).all()
    assert not assigned.scores[0, :, [0, 2]].any()


def test_the_best_anchor_gets_the_best_overlap() -> None:
    scores, boxes_xyxy, points = answers(1)
    box = [10.0, 10.0, 90.0, 60.0]
    assigned = assign(scores, boxes_xyxy, points, targets_of([Object(box, 1)]))
    owned = assigned.scores[0].any(-1)
    best = complete_box_iou(torch.tensor([box]), boxes_xyxy[0, owned]).max()
    assert assigned.scores.max().item() == pytest.approx(best.item(), rel=1e-4)


def test_a_batch_is_its_images_one_by_one() -> None:
    scores, boxes_xyxy, points = answers(3)
    together = assign(scores, boxes_xyxy, points, targets_of(*SCENES))
    for n, objects in enumerate(SCENES):
        alone = assign(scores[[n]], boxes_xyxy[[n]], points, targets_of(objects))
        assert torch.allclose(together.scores[n], alone.scores[0], atol=1e-7)
        owned = alone.scores[0].any(-1)
        assert owned.any() == bool(objects)
        assert torch.equal(together.boxes_xyxy[n, owned], alone.boxes_xyxy[0, owned])


def test_the_order_of_objects_does_not_matter() -> None:
    scores, boxes_xyxy, points = answers(1)
    forwards = assign(scores, boxes_xyxy, points, targets_of(CROWD))
    backwards = assign(scores, boxes_xyxy, points, targets_of(CROWD[::-1]))
    assert torch.equal(forwards.scores, backwards.scores)
    owned = forwards.scores.any(-1)
    assert torch.equal(forwards.boxes_xyxy[owned], backwards.boxes_xyxy[owned])


# --- dense images

PAIRS = "kdmini.detection.boxes.MOST_PAIRS"


def dense(images: int, objects: int, side: int) -> tuple[Tensor, Tensor, Tensor, Any]:
    """scores, boxes, points, targets of square images: as many objects as there is place for."""
    torch.manual_seed(images * objects + side)
    sizes = [(side // stride, side // stride) for stride in (8, 16, 32)]
    points, stride_of = anchor_points(sizes, (8, 16, 32), torch.device("cpu"))
    reach = torch.rand(images, len(points), 4) * 3 * stride_of
    boxes_xyxy = torch.cat([points - reach[..., :2], points + reach[..., 2:]], -1)
    corner = torch.rand(images, objects, 2) * side
    objects_xyxy = torch.cat([corner, corner + torch.rand(images, objects, 2) * 30 + 3], -1)
    labels = torch.randint(-1, CLASSES, (images, objects))  # a quarter is padding
    # the last anchor belongs to the last object: the last values of the tensors count
    objects_xyxy[:, -1] = boxes_xyxy[:, -1] + 4 * torch.rand(images, 4)
    labels[:, -1] = 0
    scores = torch.rand(images, len(points), CLASSES)
    return scores, boxes_xyxy, points, {"boxes_xyxy": objects_xyxy, "labels": labels}


@pytest.mark.parametrize("together", [1, 2, 3], ids="images at once: {}".format)
@pytest.mark.parametrize("side", [32, 96, 224], ids="{} px".format)  # 21, 189, 1029 anchors
def test_a_few_images_at_a_time_are_equal_to_the_bit(
    side: int, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for objects in (3, 5, 7, 8, 64):  # so that a tensor ends anywhere in a vector
        case = dense(5, objects, side)
        monkeypatch.setattr(PAIRS, objects * len(case[2]))
        whole = assign(*case)
        assert whole.scores.any()
        monkeypatch.setattr(PAIRS, math.ceil(together * objects * len(case[2]) / 5))
        parts = assign(*case)
        assert torch.equal(parts.scores, whole.scores)
        assert torch.equal(parts.boxes_xyxy, whole.boxes_xyxy)


def test_the_shapes_decide_how_many_images_are_together() -> None:
    anchors = 8400  # of 640 px
    assert images_at_once(64, 64, anchors) >= 64  # what four images in one hold, mostly
    assert images_at_once(8, 64, anchors) >= 8
    assert images_at_once(4, 1024, anchors) == 1
    assert images_at_once(64, 1024, anchors) == 7
    assert images_at_once(4, 100_000, anchors) == 1
    assert images_at_once(3, 0, 0) == 3 * MOST_PAIRS


def grown(images: int) -> None:
    """Ends with code 0 where the images take less than 350 MB: together they take 625."""
    torch.set_num_threads(1)
    case = dense(images, 1024, 320)
    before = getrusage(RUSAGE_SELF).ru_maxrss
    assign(*case)
    megabytes = (getrusage(RUSAGE_SELF).ru_maxrss - before) / 1e3  # from KiB
    print(f"{images} images with 1,024 objects: {megabytes:.0f} MB")
    raise SystemExit(int(megabytes > 350))


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
def test_memory_does_not_grow_with_the_dense_images() -> None:
    child = get_context("spawn").Process(target=grown, args=(6,))
    child.start()
    child.join()
    assert child.exitcode == 0
