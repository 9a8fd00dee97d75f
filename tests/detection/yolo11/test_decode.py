"""From raw maps to detections: distances, cells, and the suppression of doubles."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.ops import nms

from kdmini.detection import boxes
from kdmini.detection.yolo11.model import YOLO11, decode_maps

STRIDES = (8, 16, 32)
BINS = 16
BOX_CHANNELS = 4 * BINS


def detector(classes: int) -> YOLO11:
    """A small one; decoding depends on no weight."""
    return YOLO11([f"class {i}" for i in range(classes)], [0.5, 0.0625, 1024])


def empty_maps(height: int, width: int, classes: int) -> list[Tensor]:
    """Raw maps of an image of this size in which no class is found anywhere."""
    maps = []
    for stride in STRIDES:
        level = torch.zeros(1, BOX_CHANNELS + classes, height // stride, width // stride)
        level[:, BOX_CHANNELS:] = -20
        maps.append(level)
    return maps


def random_maps(images: int, classes: int, size: tuple[int, int], seed: int) -> list[Tensor]:
    torch.manual_seed(seed)
    height, width = size
    maps = []
    for stride in STRIDES:
        shape = (images, BOX_CHANNELS + classes, height // stride, width // stride)
        maps.append(torch.randn(shape))
    return maps


def put(cell: Tensor, ltrb: list[float], logits: dict[int, float]) -> None:
    """Distances in strides, as two neighbouring bins, and logits of some classes."""
    for side, distance in enumerate(ltrb):
        left = int(distance)
        share_right = distance - left
        bins = cell[BINS * side : BINS * (side + 1)]
        bins[:] = -100
        bins[left] = math.log(1 - share_right)
        if share_right:
            bins[left + 1] = math.log(share_right)
    for label, value in logits.items():
        cell[BOX_CHANNELS + label] = value


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def test_one_cell_with_known_distances_gives_the_known_box() -> None:
    maps = empty_maps(64, 96, 5)
    # row 2, column 3 of stride 16: centre (3.5, 2.5) * 16 = (56, 40)
    cell = maps[1][0, :, 2, 3]
    put(cell, [1.25, 2.0, 0.5, 1.0], {3: logit(0.8), 1: logit(0.3)})
    (detections,) = detector(5).decode(maps, score=0.25, iou=0.7, max_det=300)
    box_xyxy = torch.tensor([36.0, 8.0, 64.0, 56.0])
    assert torch.allclose(detections["boxes_xyxy"], box_xyxy.expand(2, 4), atol=1e-4)
    assert torch.allclose(detections["scores"], torch.tensor([0.8, 0.3]))
    assert detections["labels"].tolist() == [3, 1]  # two classes of one box


@pytest.mark.parametrize(
    ("level", "row", "column", "centre"),
    [(0, 7, 11, (92, 60)), (0, 0, 0, (4, 4)), (2, 1, 2, (80, 48))],
)
def test_cells_lie_row_by_row_in_an_image_that_is_no_square(
    level: int, row: int, column: int, centre: tuple[int, int]
) -> None:
    maps = empty_maps(64, 96, 1)
    put(maps[level][0, :, row, column], [1, 1, 1, 1], {0: 2.0})
    (detections,) = detector(1).decode(maps, 0.25)
    x, y = centre
    stride = STRIDES[level]
    expected = [x - stride, y - stride, x + stride, y + stride]
    assert detections["boxes_xyxy"].round().tolist() == [expected]


def test_nms_keeps_the_best_of_one_class_and_spares_the_others() -> None:
    maps = empty_maps(64, 64, 2)
    cells = maps[0][0]  # (C, H, W)
    put(cells[:, 2, 2], [1, 1, 1, 1], {0: logit(0.6)})  # centre 20, 20
    put(cells[:, 2, 3], [2, 1, 0, 1], {0: logit(0.9)})  # the same box from the next cell
    put(cells[:, 3, 2], [1, 2, 1, 0], {1: logit(0.7)})  # and once more, of the other class
    put(cells[:, 6, 6], [1, 1, 1, 1], {0: logit(0.5)})  # elsewhere
    (detections,) = detector(2).decode(maps, 0.25, 0.7)
    scores = torch.tensor([0.9, 0.7, 0.5])
    assert torch.allclose(detections["scores"], scores, atol=5e-4)
    assert detections["labels"].tolist() == [0, 1, 0]


def test_decode_is_torchvisions_nms_class_by_class() -> None:
    maps = random_maps(2, 4, (96, 128), seed=1)
    for level in maps:
        level[:, :BOX_CHANNELS] *= 3
    boxes_xyxy, scores = decode_maps(maps)
    decoded = detector(4).decode(maps, score=0.6, iou=0.5, max_det=10_000)
    for image, detections in enumerate(decoded):
        count = 0
        for label in range(4):
            class_scores = scores[image, :, label]
            above = (class_scores > 0.6).nonzero().squeeze(1)
            kept = nms(boxes_xyxy[image, above], class_scores[above], 0.5)
            assert len(kept) < len(above)  # or the threshold was not tried
            best_first = above[kept]
            own = detections["labels"] == label
            assert torch.equal(detections["boxes_xyxy"][own], boxes_xyxy[image, best_first])
            assert torch.equal(detections["scores"][own], class_scores[best_first])
            count += len(kept)
        assert len(detections["labels"]) == count
        assert (detections["scores"].diff() <= 0).all()


# --- what is kept

EVERYTHING = 4 * (144 + 36 + 9)  # every class of every cell of 96 x 96 pixels


def decode_96(model: YOLO11, score: float = 0.0, max_det: int = 10_000) -> Any:
    """What is left of the same random maps where no box suppresses another."""
    maps = random_maps(1, 4, (96, 96), seed=2)
    (detections,) = model.decode(maps, score=score, iou=1.0, max_det=max_det)
    return detections


def test_only_what_is_above_the_score_is_kept() -> None:
    model = detector(4)
    scores = decode_96(model)["scores"]
    assert len(scores) == EVERYTHING
    assert torch.equal(decode_96(model, score=0.7)["scores"], scores[scores > 0.7])


def test_the_best_are_kept_where_the_number_is_limited() -> None:
    model = detector(4)
    scores = decode_96(model)["scores"]
    assert torch.equal(decode_96(model, max_det=7)["scores"], scores[:7])


def test_the_best_candidates_are_kept_where_they_are_too_many(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = detector(4)
    scores = decode_96(model)["scores"]
    monkeypatch.setattr(boxes, "MAX_CANDIDATES", 50)
    assert torch.equal(decode_96(model)["scores"], scores[:50])


def test_nothing_above_the_score_gives_empty_detections() -> None:
    maps = random_maps(1, 4, (96, 96), seed=2)
    (none,) = detector(4).decode(maps, score=1.0, iou=0.7, max_det=300)
    shapes = {key: tuple(value.shape) for key, value in none.items()}
    assert shapes == {"boxes_xyxy": (0, 4), "scores": (0,), "labels": (0,)}


def test_half_precision_maps_are_decoded_in_float32() -> None:
    maps = empty_maps(640, 640, 1)
    put(maps[0][0, :, 70, 70], [1.5, 2.5, 3.5, 4.5], {0: 3.0})
    (detections,) = detector(1).decode([level.bfloat16() for level in maps], 0.25)
    expected = torch.tensor([[552.0, 544.0, 592.0, 600.0]])
    assert detections["boxes_xyxy"].dtype == torch.float32
    # bfloat16 has steps of 4 at 564: the box would move by as much
    assert torch.allclose(detections["boxes_xyxy"], expected, atol=0.2)
