"""Where the scores of detections come from: by size, by IoU, by score, by what is taken for what.

Legend: D detections and G objects, of one class or of all; T COCO thresholds; K classes.
"""

from collections.abc import Sequence

import numpy as np

from kdmini.detection.kinds import Judged
from kdmini.detection.matching import (
    HALF,
    IOU_THRESHOLDS,
    claim,
    match_coco,
    overlapping_pairs,
)
from kdmini.detection.precision import COCO_RECALL, precision_curve, read_at

# square pixels of the file, both ends included, as in pycocotools
SIZES = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, 1e10)}

SHOWN = 0.25  # the score from which predictions are looked at, as predict does
BINS = 10  # of scores from 0 to 1

Rows = tuple[np.ndarray, np.ndarray]  # DETECTION rows, best score first, OBJECT rows by image
Table = dict[str, dict[str, float]]  # row -> column -> number


def by_size(classes: Sequence[Rows]) -> Table:
    """-> size -> `AP50-95` of the objects whose box is of that size, and how many `objects`.

    COCO's APs, APm and APl: objects of other sizes are as difficult ones, and a detection of
    another size that finds nothing is no miss. NaN of no object.
    """
    table = {}
    for name, (least, most) in SIZES.items():
        averages, objects = ap_within(classes, least, most)
        mean = float(averages.mean()) if objects else np.nan
        table[name] = {"AP50-95": mean, "objects": objects}
    return table


def by_iou(classes: Sequence[Rows]) -> Table:
    """-> IoU from which a detection is a hit -> COCO's `AP`; NaN of no object."""
    averages, objects = ap_within(classes, 0, np.inf)
    means = averages.mean(0) if objects else np.full(len(IOU_THRESHOLDS), np.nan)
    return {
        f"{threshold:.2f}": {"AP": float(ap)}
        for threshold, ap in zip(IOU_THRESHOLDS, means, strict=True)
    }


def ap_within(classes: Sequence[Rows], least: float, most: float) -> tuple[np.ndarray, int]:
    """-> AP of each class with such objects, at each threshold (K', T), and their number."""
    averages = []
    total = 0
    for detections, objects in classes:
        ignorable = objects["difficult"] | outside(objects, least, most)
        count = int((~ignorable).sum())
        if not count:
            continue
        total += count
        pairs = overlapping_pairs(detections, objects)
        hit, ignored = match_coco(*pairs, ignorable, detections["image"])
        ignored |= ~hit & outside(detections, least, most)
        curves = [precision_curve(h, i, count) for h, i in zip(hit, ignored, strict=True)]
        averages.append(read_at(COCO_RECALL, np.stack(curves)))
    return np.array(averages), total


def outside(rows: np.ndarray, least: float, most: float) -> np.ndarray:
    """-> whether the area of each box is none of these."""
    sides = rows["boxes_xyxy"][:, 2:] - rows["boxes_xyxy"][:, :2]
    area = sides.clip(min=0).prod(1)
    return (area < least) | (area > most)


def confusion(detections: np.ndarray, objects: np.ndarray, count: int) -> np.ndarray:
    """-> (K + 1, K + 1) int64, objects by their class and that of the detection on them.

    Last are, in the row, detections of nothing, and in the column objects without one. Of
    detections with a score of SHOWN, the surest first, each takes the object that it overlaps
    most, by half at least, and that is not taken, whatever its class. Difficult objects, and
    detections that take one, are not counted.

    count: K.
    """
    shown = detections[detections["scores"] >= SHOWN]
    shown = shown[np.argsort(-shown["scores"], kind="stable")]
    detection_of, object_of, iou = overlapping_pairs(shown, objects, HALF)
    order = np.lexsort((-iou, objects["difficult"][object_of], detection_of))
    taking, taken = claim(detection_of[order].tolist(), object_of[order].tolist())

    predicted = np.full(len(objects), count)
    predicted[taken] = shown["labels"][taking]
    stray = np.ones(len(shown), bool)
    stray[taking] = False
    counted = ~objects["difficult"]
    matrix = np.zeros((count + 1, count + 1), np.int64)
    np.add.at(matrix, (objects["labels"][counted], predicted[counted]), 1)
    matrix[count, :count] = np.bincount(shown["labels"][stray], minlength=count)
    return matrix


def calibration(judged: Judged) -> Table:
    """-> range of scores -> of its detections how far `apart` are the mean `score` and the
    `precision` at an IoU of half, and their `number`. NaN of nothing.

    In the last row, "all from 0.1", `apart` is the expected calibration error (Naeini et al.,
    "Obtaining Well Calibrated Probabilities Using Bayesian Binning", AAAI 2015): the mean over
    these detections. The lowest range is left out of it: most detections are there, none of
    which is ever shown.
    """
    counted = ~(judged.of_difficult() & (judged.kind == "hit"))
    scores = judged.detections["scores"][counted]
    hit = (judged.kind == "hit")[counted]
    place = np.minimum((scores * BINS).astype(int), BINS - 1)

    table = {}
    for number in range(BINS):
        inside = place == number
        name = f"{number / BINS:.1f} to {(number + 1) / BINS:.1f}"
        table[name] = reliability(scores[inside], hit[inside])
    rest = reliability(scores[place > 0], hit[place > 0])
    if rest["number"]:
        ranges = [row for row in [*table.values()][1:] if row["number"]]
        weights = [row["number"] for row in ranges]
        rest["apart"] = float(np.average([row["apart"] for row in ranges], weights=weights))
    table[f"all from {1 / BINS:.1f}"] = rest
    return table


def reliability(scores: np.ndarray, hit: np.ndarray) -> dict[str, float]:
    """Of some detections."""
    if not len(scores):
        return {"apart": np.nan, "score": np.nan, "precision": np.nan, "number": 0}
    score = float(scores.mean())
    precision = float(hit.mean())
    apart = abs(score - precision)
    return {"apart": apart, "score": score, "precision": precision, "number": len(scores)}


def by_image(judged: Judged, images: int) -> np.ndarray:
    """-> (images,) 0..1: of detections with a score of SHOWN and of objects, the share that
    is a hit, F1. 1 where there are neither.
    """
    right = judged.kind == "hit"
    counted = (judged.detections["scores"] >= SHOWN) & ~(judged.of_difficult() & right)
    objects = judged.objects[~judged.objects["difficult"]]
    hits = np.bincount(judged.detections["image"][counted & right], minlength=images)
    both = np.bincount(judged.detections["image"][counted], minlength=images)
    both = both + np.bincount(objects["image"], minlength=images)
    return np.where(both, 2 * hits / np.maximum(both, 1), 1.0)
