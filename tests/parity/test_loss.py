"""The assigner alone against the reference's own, on random scenes, and batched against image by
image.
"""

from pathlib import Path

import pytest
import torch
from oracle import oracle
from witness import witness

from kdmini.detection.boxes import anchor_points
from kdmini.detection.yolo11.assign import assign
from kdmini.detection.yolo11.loss import distribution_focal
from tests.test_engine import Batches, Extra, train

pytestmark = pytest.mark.parity

IMAGES, CLASSES, MOST, SIZE = 24, 7, 12, 128

ASSIGN = """
import sys
import torch
from ultralytics.utils.tal import TaskAlignedAssigner
scores, boxes, points, objects, labels = torch.load(sys.argv[1] + "/given.pt", weights_only=True)
assigner = TaskAlignedAssigner(topk=10, num_classes=scores.shape[2], alpha=0.5, beta=6.0)
there = (labels >= 0).unsqueeze(-1)
_, boxes, scores, _, _ = assigner(scores, boxes, points, labels.clamp(min=0).unsqueeze(-1), objects, there)
torch.save((boxes, scores), sys.argv[1] + "/found.pt")
"""


def test_assigner(tmp_path: Path) -> None:
    torch.manual_seed(3)
    points, stride_of = anchor_points(
        [(SIZE // s, SIZE // s) for s in (8, 16, 32)], (8, 16, 32), torch.device("cpu")
    )
    half = stride_of * torch.rand(IMAGES, len(points), 2).mul(3).exp() / 2
    boxes, scores = (
        torch.cat([points - half, points + half], -1),
        torch.rand(IMAGES, len(points), CLASSES),
    )
    corner, sides = torch.rand(IMAGES, MOST, 2) * 90, torch.rand(IMAGES, MOST, 2) ** 2 * 100 + 1
    objects = torch.cat([corner, (corner + sides).clamp(max=SIZE)], -1)
    labels = torch.randint(CLASSES, (IMAGES, MOST))
    objects[1, 1] = objects[1, 0]  # a duplicate
    for image in range(IMAGES):  # from no object to all of them
        labels[image, image % (MOST + 1) :], objects[image, image % (MOST + 1) :] = -1, 0
    torch.save((scores, boxes, points, objects, labels), tmp_path / "given.pt")
    oracle(ASSIGN, tmp_path)
    their_boxes, their_scores = torch.load(tmp_path / "found.pt", weights_only=True)
    ours = assign(scores, boxes, points, {"boxes_xyxy": objects, "labels": labels})
    mine, theirs = ours.scores.sum(-1) > 0, their_scores.sum(-1) > 0
    assert theirs.sum() > 200
    against = "ultralytics 8.3.250"
    witness("Assigner: foreground, anchors that differ", against, (mine != theirs).sum(), 0, IMAGES)
    witness(
        "Assigner: target boxes, pixels",
        against,
        (ours.boxes_xyxy - their_boxes)[theirs].abs().max(),
        0,
        IMAGES,
    )
    witness(
        "Assigner: target scores", against, (ours.scores - their_scores).abs().max(), 1e-5, IMAGES
    )
    for image in range(IMAGES):
        count = int((labels[image] >= 0).sum())  # without the padding
        cut = {
            "boxes_xyxy": objects[image : image + 1, :count],
            "labels": labels[image : image + 1, :count],
        }
        alone = assign(scores[image : image + 1], boxes[image : image + 1], points, cut)
        witness(
            "Assigner: scores, batched",
            "image by image",
            (alone.scores[0] - ours.scores[image]).abs().max(),
            0,
        )
        same = (alone.boxes_xyxy[0] == ours.boxes_xyxy[image])[mine[image]]
        assert same.all()


def test_distances_beyond_the_last_bin_are_clamped_to_14_99() -> None:
    logits = torch.randn(1, 3, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    log_p = logits.view(1, 3, 4, 16).log_softmax(-1)
    for distance, (left, share) in {
        20.0: (14, 0.99),
        14.25: (14, 0.25),
        -3.0: (0, 0.0),
        7.0: (7, 0.0),
    }.items():
        by_hand = -((1 - share) * log_p[..., left] + share * log_p[..., left + 1]).mean(-1)
        ours = distribution_focal(logits, torch.full((1, 3, 4), distance, dtype=torch.float64), 16)
        witness("Detection loss: DFL", "worked out on paper", (ours - by_hand).abs().max(), 1e-12)


def test_the_backward_pass_is_scaled_by_the_batch_and_by_kd_scale() -> None:
    # a weight of 1 that moves by its gradient: 4 images, d task = 0.5, d distillation = 10
    for kd_scale, gradient in ((1.0, 4 * 0.5 + 10), (3.0, 4 * 0.5 + 30), ("batch", 4 * 0.5 + 40)):
        moved = 1 - train(Batches(0.5), Extra, kd_scale=kd_scale)[0]
        witness(
            "Backward pass: N times the task, kd_scale",
            "worked out on paper",
            abs(moved - gradient),
            1e-5,
        )
