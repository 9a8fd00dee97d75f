"""The assigner against the reference's own; DFL and the scales of losses on paper."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from oracle import oracle
from torch import Tensor
from witness import witness

from kdmini.detection.boxes import anchor_points
from kdmini.detection.yolo11.assign import assign
from kdmini.detection.yolo11.loss import distribution_focal
from tests.test_engine import Batches, Extra, train

pytestmark = pytest.mark.parity

AGAINST = "ultralytics 8.3.250"
PAPER = "worked out on paper"

IMAGES = 24
CLASSES = 7
MOST = 12  # objects in an image
SIZE = 128  # of an image, pixels
STRIDES = (8, 16, 32)

# argv: folder. Reads folder/given.pt, writes folder/found.pt.
ASSIGN = """
import sys
import torch
from ultralytics.utils.tal import TaskAlignedAssigner

scores, boxes, points, objects, labels = torch.load(sys.argv[1] + "/given.pt", weights_only=True)
assigner = TaskAlignedAssigner(topk=10, num_classes=scores.shape[2], alpha=0.5, beta=6.0)
there = (labels >= 0).unsqueeze(-1)
classes = labels.clamp(min=0).unsqueeze(-1)
_, boxes, scores, _, _ = assigner(scores, boxes, points, classes, objects, there)
torch.save((boxes, scores), sys.argv[1] + "/found.pt")
"""


class Case(NamedTuple):
    scores: Tensor  # (N, A, K)
    boxes_xyxy: Tensor  # (N, A, 4)
    points: Tensor  # (A, 2)
    targets: Any


def random_case() -> Case:
    """From no object in an image to all of them."""
    torch.manual_seed(3)
    sizes = [(SIZE // stride, SIZE // stride) for stride in STRIDES]
    points, stride_of = anchor_points(sizes, STRIDES, torch.device("cpu"))
    half = stride_of * torch.rand(IMAGES, len(points), 2).mul(3).exp() / 2
    boxes_xyxy = torch.cat([points - half, points + half], -1)
    scores = torch.rand(IMAGES, len(points), CLASSES)

    corner = torch.rand(IMAGES, MOST, 2) * 90
    sides = torch.rand(IMAGES, MOST, 2) ** 2 * 100 + 1
    objects_xyxy = torch.cat([corner, (corner + sides).clamp(max=SIZE)], -1)
    labels = torch.randint(CLASSES, (IMAGES, MOST))
    objects_xyxy[1, 1] = objects_xyxy[1, 0]  # a duplicate
    for image in range(IMAGES):
        count = image % (MOST + 1)
        labels[image, count:] = -1
        objects_xyxy[image, count:] = 0
    targets = {"boxes_xyxy": objects_xyxy, "labels": labels}
    return Case(scores, boxes_xyxy, points, targets)


def test_assigner_against_the_references(tmp_path: Path) -> None:
    scores, boxes_xyxy, points, targets = random_case()
    given = (scores, boxes_xyxy, points, targets["boxes_xyxy"], targets["labels"])
    torch.save(given, tmp_path / "given.pt")
    oracle(ASSIGN, tmp_path)
    their_boxes, their_scores = torch.load(tmp_path / "found.pt", weights_only=True)

    ours = assign(scores, boxes_xyxy, points, targets)
    mine = ours.scores.sum(-1) > 0
    theirs = their_scores.sum(-1) > 0
    assert theirs.sum() > 200
    differ = (mine != theirs).sum()
    boxes_off = (ours.boxes_xyxy - their_boxes)[theirs].abs().max()
    scores_off = (ours.scores - their_scores).abs().max()
    witness("Assigner: foreground, anchors that differ", AGAINST, differ, 0, IMAGES)
    witness("Assigner: target boxes, pixels", AGAINST, boxes_off, 0, IMAGES)
    witness("Assigner: target scores", AGAINST, scores_off, 1e-5, IMAGES)


def test_assigner_batched_and_image_by_image() -> None:
    scores, boxes_xyxy, points, targets = random_case()
    batched = assign(scores, boxes_xyxy, points, targets)
    for image in range(IMAGES):
        count = int((targets["labels"][image] >= 0).sum())  # without the padding
        own: Any = {key: value[[image], :count] for key, value in targets.items()}
        alone = assign(scores[[image]], boxes_xyxy[[image]], points, own)
        off = (alone.scores[0] - batched.scores[image]).abs().max()
        witness("Assigner: scores, batched", "image by image", off, 0)
        owned = alone.scores[0].sum(-1) > 0
        assert torch.equal(alone.boxes_xyxy[0, owned], batched.boxes_xyxy[image, owned])


@pytest.mark.parametrize(
    ("distance", "left", "share"),
    [(20.0, 14, 0.99), (14.25, 14, 0.25), (-3.0, 0, 0.0), (7.0, 7, 0.0)],
)
def test_distances_beyond_the_last_bin_are_clamped_to_14_99(
    distance: float, left: int, share: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 3, 64, dtype=torch.float64, generator=generator)
    log_p = logits.view(1, 3, 4, 16).log_softmax(-1)
    expected = -((1 - share) * log_p[..., left] + share * log_p[..., left + 1]).mean(-1)
    ours = distribution_focal(logits, torch.full((1, 3, 4), distance, dtype=torch.float64), 16)
    witness("Detection loss: DFL", PAPER, (ours - expected).abs().max(), 1e-12)


@pytest.mark.parametrize(("kd_scale", "factor"), [(1.0, 1), (3.0, 3), ("batch", 4)])
def test_the_backward_pass_is_scaled_by_the_batch_and_by_kd_scale(
    kd_scale: Any, factor: float
) -> None:
    # A weight of 1 moves by its gradient: 4 images, d task = 0.5, d distillation = 10.
    expected = 4 * 0.5 + factor * 10
    moved = 1 - train(Batches(0.5), Extra, kd_scale=kd_scale)[0]
    witness("Backward pass: N times the task, kd_scale", PAPER, abs(moved - expected), 1e-5)
