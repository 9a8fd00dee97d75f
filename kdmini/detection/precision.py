"""Precision along recall, and its mean.

Legend: D detections of one class, best score first.
"""

import numpy as np

VOC07_RECALL = np.arange(11) / 10
COCO_RECALL = np.linspace(0.0, 1.0, 101)


def precision_curve(hit: np.ndarray, ignored: np.ndarray, count: int) -> np.ndarray:
    """hit, ignored (D,) -> (count,): precision at recall 1 / count, 2 / count, ... 1.

    The best at that recall or beyond; 0 where it is not reached. Precision rises at
    hits only, so nothing is lost by looking nowhere else.
    """
    seen = np.cumsum(~ignored)[hit]  # detections that count, up to and including each hit
    precision = np.arange(1, len(seen) + 1) / seen
    curve = np.zeros(count)
    curve[: len(seen)] = np.maximum.accumulate(precision[::-1])[::-1]
    return curve


def read_at(recall: np.ndarray, curves: np.ndarray) -> np.ndarray:
    """Mean of the precision at these recall levels: curves (..., count) -> (...)."""
    count = curves.shape[-1]
    recall_of_curve = np.arange(1, count + 1) / count
    return curves[..., np.searchsorted(recall_of_curve, recall)].mean(-1)
