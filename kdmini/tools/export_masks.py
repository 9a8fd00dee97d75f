"""What an exported network for segmentation gives: logits of every pixel of its image.

Legend: N images, S image size, K classes.
"""

import json
from collections.abc import Sequence

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

from kdmini.data.palette import PALETTE
from kdmini.segmentation.maps import Segmenter

# by how much another program may differ from PyTorch, as a share of the largest logit: in
# float32, which it sums in another order, and in fp16
TOLERANCE = (1e-3, 0.05)


class Upsampled(nn.Module):
    """A `kdmini.tools.export_form.Form`: a network whose output are logits at the images' size,
    whose largest is the class of a pixel.
    """

    outputs = ("logits",)  # (N, K, S, S)

    def __init__(self, segmenter: Segmenter):
        super().__init__()
        self.segmenter = segmenter
        palette = PALETTE[: len(segmenter.names)].tolist()
        self.facts = {"palette": json.dumps(palette), "stride": str(segmenter.stride)}

    def forward(self, images: Tensor) -> Tensor:
        """images (N, 3, S, S) -> `outputs`."""
        logits = self.segmenter(images)[0].float()
        return F.interpolate(logits, images.shape[2:], mode="bilinear", align_corners=False)

    def difference(
        self, found: Sequence[np.ndarray], expected: Sequence[np.ndarray], half: bool = False
    ) -> tuple[str, bool]:
        error = np.abs(found[0] - expected[0]).max()
        largest = np.abs(expected[0]).max()
        changed = float(np.mean(found[0].argmax(1) != expected[0].argmax(1)))
        words = (
            f"{error:.1e} in logits up to {largest:.1f}, another class in {changed:.2%} of pixels"
        )
        return words, bool(error <= TOLERANCE[half] * largest)
