"""What a detector exported with non-maximum suppression gives: its detections.

PyTorch has them of `select`, as the detector's own decode has. ONNX has its standard operator
in that place, NonMaxSuppression, which knows batches and classes.

Legend: N images, S image size, A anchors, K classes, D detections.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kdmini.detection.boxes import select
from kdmini.detection.yolo11.model import YOLO11, decode_maps
from kdmini.tools.export_boxes import BOX_TOLERANCE, FACTS, SCORE_TOLERANCE

SCORE = 0.001  # as in decode; whoever wants fewer drops those below: it changes no other
MAX_DET = 300  # D

# of the detections, how many may have no partner: two boxes that overlap by nearly the limit may
# go either way
SHARE_TOLERANCE = (0.02, 0.1)  # in float32 and in fp16


@torch.library.custom_op("kdmini::detections", mutates_args=())
def detections(boxes_xyxy: Tensor, scores: Tensor, iou: float) -> tuple[Tensor, Tensor, Tensor]:
    """(N, A, 4), (N, A, K) -> boxes_xyxy (N, D, 4), scores (N, D), labels int64 (N, D).

    Best first; where an image has fewer, zeros follow, with the label -1.
    """
    found_boxes, found_scores, labels = empty(boxes_xyxy)
    for image, (boxes_of, scores_of) in enumerate(zip(boxes_xyxy, scores, strict=True)):
        found = select(boxes_of, scores_of, SCORE, iou, MAX_DET)
        count = len(found["scores"])
        found_boxes[image, :count] = found["boxes_xyxy"]
        found_scores[image, :count] = found["scores"]
        labels[image, :count] = found["labels"]
    return found_boxes, found_scores, labels


@detections.register_fake
def empty_like(boxes_xyxy: Tensor, scores: Tensor, iou: float) -> tuple[Tensor, Tensor, Tensor]:
    return empty(boxes_xyxy)


def empty(boxes_xyxy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`detections` of images in which nothing is."""
    images = boxes_xyxy.shape[0]
    boxes = boxes_xyxy.new_zeros(images, MAX_DET, 4)
    scores = boxes_xyxy.new_zeros(images, MAX_DET)
    labels = boxes_xyxy.new_full((images, MAX_DET), -1, dtype=torch.int64)
    return boxes, scores, labels


def in_onnx() -> dict[Callable[..., Any], Callable[..., Any]]:
    """`detections` -> the same in ONNX, for the exporter's custom_translation_table."""
    from onnxscript import opset18

    op: Any = opset18  # its hints take no tensors that other operators gave

    def translated(boxes_xyxy: Any, scores: Any, iou: float) -> tuple[Any, Any, Any]:
        by_class = op.Transpose(scores, perm=[0, 2, 1])  # (N, K, A)
        most = op.Constant(value_ints=[MAX_DET])
        limit = op.Constant(value_floats=[iou])
        least = op.Constant(value_floats=[SCORE])
        # (those that stay, 3): image, class, anchor
        places = op.NonMaxSuppression(boxes_xyxy, by_class, most, limit, least)

        # back in their places, 0 elsewhere, the best of each image are at the top
        nothing = op.ConstantOfShape(op.Shape(by_class))
        kept = op.ScatterND(nothing, places, op.GatherND(by_class, places))
        ends = op.Constant(value_ints=[0, 0, 0, MAX_DET])
        flat = op.Pad(op.Flatten(kept, axis=1), ends)  # (N, K * A + D)
        best, index = op.TopK(flat, most, axis=1)

        anchors = op.Shape(scores, start=1, end=2)
        found = op.Greater(best, op.Constant(value_float=0.0))
        labels = op.Where(found, op.Div(index, anchors), op.Constant(value_int=-1))
        last = op.Constant(value_ints=[-1])
        anchor = op.Unsqueeze(op.Mod(index, anchors), last)
        boxes = op.GatherND(boxes_xyxy, anchor, batch_dims=1)
        boxes = op.Where(op.Unsqueeze(found, last), boxes, op.Constant(value_float=0.0))
        return boxes, best, labels

    return {torch.ops.kdmini.detections.default: translated}


class Suppressed(nn.Module):
    """A `kdmini.tools.export_form.Form`: a detector whose outputs are detections.

    iou: boxes of a class that overlap by more are taken for one object.
    """

    # output0 (N, D, 6): corners, score and label, as programs that read YOLO models expect of
    # one that suppresses; boxes_xyxy (N, D, 4), scores (N, D), labels (N, D)
    outputs = ("output0", "boxes_xyxy", "scores", "labels")
    facts = FACTS

    def __init__(self, detector: YOLO11, iou: float):
        super().__init__()
        self.detector = detector
        self.iou = iou

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """images (N, 3, S, S) -> `outputs`."""
        boxes_xyxy, scores, labels = detections(*decode_maps(self.detector(images)), self.iou)
        fused = torch.cat([boxes_xyxy, scores[..., None], labels[..., None].float()], 2)
        return fused, boxes_xyxy, scores, labels

    def difference(
        self, found: Sequence[np.ndarray], expected: Sequence[np.ndarray], half: bool = False
    ) -> tuple[str, bool]:
        same = np.concatenate([found[1], found[2][..., None], found[3][..., None]], 2)
        if not np.array_equal(found[0], same.astype(found[0].dtype)):
            return "its first output is not the others", False
        alone = 0
        count = 0
        for ours, theirs in zip(found[0], expected[0], strict=True):
            ours = ours[ours[:, 5] >= 0]
            theirs = theirs[theirs[:, 5] >= 0]
            alone += without_partner(ours, theirs, half) + without_partner(theirs, ours, half)
            count += len(ours) + len(theirs)
        share = alone / max(count, 1)
        words = f"{count // 2} detections, {share:.1%} not in both"
        return words, share <= SHARE_TOLERANCE[half]


def without_partner(rows: np.ndarray, others: np.ndarray, half: bool) -> int:
    """How many (D, 6) have none of their place, score and class among the others, (E, 6)."""
    apart = np.abs(rows[:, None] - others[None])  # (D, E, 6)
    bounds = np.array([*[BOX_TOLERANCE[half]] * 4, SCORE_TOLERANCE[half], 0.0])
    return int((~(apart <= bounds).all(2).any(1)).sum())
