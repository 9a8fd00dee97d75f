"""What an exported detector gives: boxes and scores before non-maximum suppression.

Legend: N images, S image size, A anchors, K classes.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from kdmini.detection.boxes import left_top, right_bottom
from kdmini.detection.yolo11.model import YOLO11, decode_maps

# by how much another program may differ from PyTorch, in float32, which it sums in another
# order, and in fp16: it is the boxes of anchors without an object that move most
BOX_TOLERANCE = (0.1, 5.0)  # pixels
SCORE_TOLERANCE = (1e-3, 0.05)

# what programs that read YOLO models read in the file; its other keys, names and imgsz, they
# read as they are
FACTS = {"task": "detect", "stride": "32", "batch": "1"}


class Decoded(nn.Module):
    """A `kdmini.tools.export_form.Form`: a detector whose outputs are boxes and scores, in the two
    layouts that are read.
    """

    # output0 (N, 4 + K, A): centre x, centre y, width, height and the scores, as programs that
    # read YOLO models expect of the first output; boxes_xyxy (N, A, 4), scores (N, A, K)
    outputs = ("output0", "boxes_xyxy", "scores")
    facts = FACTS

    def __init__(self, detector: YOLO11):
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """images (N, 3, S, S) -> `outputs`."""
        boxes_xyxy, scores = decode_maps(self.detector(images))
        low = left_top(boxes_xyxy)
        high = right_bottom(boxes_xyxy)
        fused = torch.cat([(low + high) / 2, high - low, scores], 2)
        return fused.mT, boxes_xyxy, scores

    def difference(
        self, found: Sequence[np.ndarray], expected: Sequence[np.ndarray], half: bool = False
    ) -> tuple[str, bool]:
        fused, boxes, scores = (np.abs(a - b) for a, b in zip(found, expected, strict=True))
        box_error = np.maximum(fused[:, :4].max(), boxes.max())  # NaN wins
        score_error = np.maximum(fused[:, 4:].max(), scores.max())
        is_small = box_error <= BOX_TOLERANCE[half] and score_error <= SCORE_TOLERANCE[half]
        return f"{box_error:.1e} px, score {score_error:.1e}", bool(is_small)
