"""What is wrong with detections: six kinds of error, and what each of them costs.

A detection that is no hit is of the first kind that fits it:

  place        it overlaps an object of its class by NEAR, and none of them by half
  class        it overlaps an object of another class by half
  double       it overlaps an object of its class by half, which a surer one has found
  both         it overlaps an object of another class by NEAR
  background   it overlaps no object by NEAR

and an object is missed if it is not found, and is not the one that a detection of the first
two kinds is about. To mend a kind is to give its detections the right place or class, the
surest of those about one object being its hit and the others left out; to leave out those
of the last three kinds; not to count the objects that were missed. What AP50 gains is what
the kind costs. The costs do not add up: another kind may hide behind one that is mended.

Difficult objects are found and overlapped like others, but a detection of one is ignored,
mended or not.

Source: Bolya et al., "TIDE: A General Toolbox for Identifying Object Detection Errors",
ECCV 2020, section 2. Their program, tidecv 1.0.1, leaves a mended detection out where its
object is found already, also by one that is less sure; place and class cost less there.

Legend: D detections and G objects of all classes, P pairs of the two, K classes.
"""

from typing import NamedTuple

import numpy as np

from kdmini.detection.matching import (
    HALF,
    MAX_DETECTIONS,
    Pairs,
    claim,
    index_in_image,
    overlapping_pairs,
)
from kdmini.detection.precision import COCO_RECALL, precision_curve, read_at

NEAR = 0.1  # IoU
LEFT_OUT = ("double", "both", "background")
KINDS = ("place", "class", *LEFT_OUT, "missed")
NONE = -1  # no object


class Judged(NamedTuple):
    """Each detection by falling score, and what it is."""

    detections: np.ndarray  # DETECTION rows (D,), without those beyond COCO's limit
    objects: np.ndarray  # OBJECT rows (G,) by image
    kind: np.ndarray  # (D,) text: a kind, or "hit"
    about: np.ndarray  # (D,) the object it is a hit of, or would be if mended, or NONE

    def of_difficult(self) -> np.ndarray:
        """(D,) whether it is about a difficult object."""
        return np.append(self.objects["difficult"], False)[self.about]

    def missed(self) -> np.ndarray:
        """(G,) whether nothing found the object or is about it; never of a difficult one."""
        missed = ~self.objects["difficult"]
        missed[self.about[self.about != NONE]] = False
        return missed


def judge(detections: np.ndarray, objects: np.ndarray) -> Judged:
    """DETECTION rows (D,), OBJECT rows (G,) by image, of all classes."""
    best_first = np.argsort(-detections["scores"], kind="stable")
    detections = detections[best_first]
    most = detections["labels"].max(initial=0) + 1
    class_in_image = detections["image"] * most + detections["labels"]
    detections = detections[index_in_image(class_in_image) < MAX_DETECTIONS]

    pairs = overlapping_pairs(detections, objects, NEAR)
    own = detections["labels"][pairs.detection_of] == objects["labels"][pairs.object_of]
    count = len(detections)
    found = found_by(chosen(pairs, own & (pairs.iou >= HALF)), objects["difficult"], count)
    own_object, own_iou = nearest(chosen(pairs, own), count)
    other_object, other_iou = nearest(chosen(pairs, ~own), count)

    first_that_fits = {
        "hit": found != NONE,
        "place": (own_iou >= NEAR) & (own_iou < HALF),
        "class": other_iou >= HALF,
        "double": own_iou >= HALF,
        "both": other_iou >= NEAR,
    }
    kind = np.select([*first_that_fits.values()], [*first_that_fits], "background")
    about = np.select(
        [kind == "hit", kind == "place", kind == "class"],
        [found, own_object, other_object],
        NONE,
    )
    return Judged(detections, objects, kind, about)


def chosen(pairs: Pairs, those: np.ndarray) -> Pairs:
    """Some of the pairs; those: (P,) bool."""
    return Pairs(*(column[those] for column in pairs))


def found_by(pairs: Pairs, difficult: np.ndarray, count: int) -> np.ndarray:
    """The object that each detection takes, (count,), as in match_coco at an IoU of half.

    pairs: of one class and of half or more. difficult: (G,).
    """
    by_preference = (-pairs.object_of, -pairs.iou, difficult[pairs.object_of], pairs.detection_of)
    order = np.lexsort(by_preference)
    d, g = claim(pairs.detection_of[order].tolist(), pairs.object_of[order].tolist())
    found = np.full(count, NONE)
    found[d] = g
    return found


def nearest(pairs: Pairs, count: int) -> tuple[np.ndarray, np.ndarray]:
    """-> the object that each detection overlaps most, and the IoU; NONE and 0 where none."""
    order = np.lexsort((-pairs.iou, pairs.detection_of))
    d, first = np.unique(pairs.detection_of[order], return_index=True)
    nearest_object = np.full(count, NONE)
    nearest_object[d] = pairs.object_of[order][first]
    iou = np.zeros(count)
    iou[d] = pairs.iou[order][first]
    return nearest_object, iou


def kinds_of_error(judged: Judged) -> dict[str, dict[str, float]]:
    """-> kind -> `cost`, what AP50 gains if it is mended, and `number` of such errors."""
    before = ap_of(judged, "")
    table = {}
    for kind in KINDS:
        errors = judged.missed() if kind == "missed" else judged.kind == kind
        table[kind] = {"cost": ap_of(judged, kind) - before, "number": int(errors.sum())}
    return table


def ap_of(judged: Judged, mended: str) -> float:
    """AP50 with one kind of error mended, or none: the mean over classes with objects.

    A class of which every object was missed is perfect without them.
    """
    detections, objects, kind, about = judged
    counted = ~objects["difficult"]
    present = np.unique(objects["labels"][counted])
    if mended == "missed":
        counted &= ~judged.missed()

    standing = np.flatnonzero((kind == "hit") | ((kind == mended) & (about != NONE)))
    _, surest = np.unique(about[standing], return_index=True)
    hit = np.zeros(len(detections), bool)
    hit[standing[surest]] = True
    left_out = (kind == mended) & ~hit
    left_out[standing] = ~hit[standing]
    left_out |= judged.of_difficult() & hit
    hit &= ~left_out
    labels = detections["labels"].copy()
    labels[standing] = objects["labels"][about[standing]]

    averages = []
    for label in present:
        count = int((counted & (objects["labels"] == label)).sum())
        own = labels == label
        curve = precision_curve(hit[own], left_out[own], count)
        averages.append(float(read_at(COCO_RECALL, curve)) if count else 1.0)
    return float(np.mean(averages)) if averages else 0.0
