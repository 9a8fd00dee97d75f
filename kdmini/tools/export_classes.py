"""What an exported classifier gives: logits and scores of its classes.

Legend: N images, S image size, K classes.
"""

from collections.abc import Sequence

import numpy as np
from torch import Tensor, nn

from kdmini.classification.classifier import Classifier

# by how much another program may differ from PyTorch, in float32, which it sums in another
# order, and in fp16
LOGIT_TOLERANCE = (1e-3, 0.05)  # as a share of the largest
SCORE_TOLERANCE = (1e-3, 0.05)


class Scored(nn.Module):
    """A `kdmini.tools.export_form.Form`: a classifier that gives logits and their softmax."""

    outputs = ("logits", "scores")  # (N, K) both
    facts = {"task": "classify"}  # noqa: RUF012 - a constant

    def __init__(self, classifier: Classifier):
        super().__init__()
        self.classifier = classifier

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images (N, 3, S, S) -> `outputs`."""
        logits = self.classifier(images).float()
        return logits, logits.softmax(1)

    def difference(
        self, found: Sequence[np.ndarray], expected: Sequence[np.ndarray], half: bool = False
    ) -> tuple[str, bool]:
        logit_error, score_error = (
            np.abs(a - b).max() for a, b in zip(found, expected, strict=True)
        )
        largest = np.abs(expected[0]).max()
        is_small = (
            logit_error <= LOGIT_TOLERANCE[half] * largest and score_error <= SCORE_TOLERANCE[half]
        )
        words = f"{logit_error:.1e} in logits up to {largest:.1f}, score {score_error:.1e}"
        return words, bool(is_small)
