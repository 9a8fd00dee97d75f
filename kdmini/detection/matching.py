"""Which detection is a hit, a miss or ignored, by pycocotools and by the VOC kits.

Both begin with the pairs of a detection and an object of one image that overlap by half
or more: no pair below that is a match in any of the measures, and few are above, so all
that follows is cheap.

Legend: D detections of one class, best score first; G objects of that class, by image;
P pairs of the two; T COCO thresholds.
"""

from typing import NamedTuple

import numpy as np
import torch

from kdmini.detection.boxes import box_area, intersection

# As pycocotools computes them, to the last bit: with 0.6 and with 0.6000000000000001
# other boxes match.
IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)  # (T,)
HALF = IOU_THRESHOLDS[0]
MAX_DETECTIONS = 100  # COCO: of an image and class; VOC sets no limit
MOST_PAIRS = 1 << 20  # whose overlap is computed at a time, 150 bytes for each


class Pairs(NamedTuple):
    detection_of: np.ndarray  # (P,) its place among the D, ascending
    object_of: np.ndarray  # (P,) its place among the G
    iou: np.ndarray  # (P,) `least` or more


def overlapping_pairs(detections: np.ndarray, objects: np.ndarray, least: float = HALF) -> Pairs:
    """DETECTION rows (D,) and OBJECT rows (G,), those by image -> their pairs.

    Few of them overlap, but all are looked at: of images with a thousand objects hundreds
    of millions, MOST_PAIRS at a time.
    """
    first = np.searchsorted(objects["image"], detections["image"], side="left")  # (D,)
    end = np.searchsorted(objects["image"], detections["image"], side="right")
    partners = end - first  # (D,) objects in the image of each detection
    group = np.cumsum(partners) // MOST_PAIRS  # (D,) ascending
    bounds = np.flatnonzero(np.diff(group)) + 1
    parts = []
    for rows in np.split(np.arange(len(detections)), bounds):
        pairs = pairs_of(detections, objects, rows, first[rows], partners[rows])
        near = pairs.iou >= least
        parts.append([column[near] for column in pairs])
    return Pairs(*map(np.concatenate, zip(*parts, strict=True)))


def pairs_of(
    detections: np.ndarray,
    objects: np.ndarray,
    rows: np.ndarray,
    first: np.ndarray,
    partners: np.ndarray,
) -> Pairs:
    """Of the detections `rows` (D',): each with `partners` objects from `first` on, (D',).

    The IoU of two empty boxes is NaN.
    """
    detection_of = np.repeat(rows, partners)
    # first, first + 1, ... first + partners - 1 of each detection
    start = np.cumsum(partners) - partners  # (D',) of the first pair
    object_of = np.arange(len(detection_of)) + np.repeat(first - start, partners)

    boxes_d = torch.from_numpy(detections["boxes_xyxy"][detection_of])  # (P, 4)
    boxes_g = torch.from_numpy(objects["boxes_xyxy"][object_of])  # (P, 4)
    inter = intersection(boxes_d, boxes_g)
    union = box_area(boxes_d) + box_area(boxes_g) - inter
    return Pairs(detection_of, object_of, (inter / union).numpy())


def match_coco(
    detection_of: np.ndarray,
    object_of: np.ndarray,
    iou: np.ndarray,
    difficult: np.ndarray,
    image: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """As pycocotools: pairs (P,), difficult (G,), image (D,) -> hit, ignored (T, D).

    At each threshold, by falling score, a detection takes the object of highest IoU
    that nobody has taken, a difficult one only if there is no other. A difficult
    object, too, is taken once: a second detection of it is a miss. What lies beyond the
    limit of detections is ignored.
    """
    shape = (len(IOU_THRESHOLDS), len(image))
    beyond_limit = index_in_image(image) >= MAX_DETECTIONS  # (D,)
    hit = np.zeros(shape, bool)
    ignored = np.broadcast_to(beyond_limit, shape).copy()

    # in order of preference; pycocotools gives a tie in IoU to the later object
    order = np.lexsort((-object_of, -iou, difficult[object_of], detection_of))
    order = order[~beyond_limit[detection_of[order]]]
    for t, threshold in enumerate(IOU_THRESHOLDS):
        near = order[iou[order] >= threshold]
        d, g = claim(detection_of[near].tolist(), object_of[near].tolist())
        hit[t, d] = ~difficult[g]
        ignored[t, d] = difficult[g]
    return hit, ignored


def index_in_image(image: np.ndarray) -> np.ndarray:
    """image (D,) -> (D,): how many earlier detections are of the same image."""
    by_image = np.argsort(image, kind="stable")
    first = np.searchsorted(image[by_image], image[by_image])
    index = np.empty(len(image), np.int64)
    index[by_image] = np.arange(len(image)) - first
    return index


def claim(detections: list[int], objects: list[int]) -> tuple[list[int], list[int]]:
    """Of pairs in order of preference, those that are left when each is in one only."""
    partner: dict[int, int] = {}  # detection -> object
    taken: set[int] = set()
    for d, g in zip(detections, objects, strict=True):
        if d not in partner and g not in taken:
            partner[d] = g
            taken.add(g)
    return list(partner.keys()), list(partner.values())


def match_voc(
    detection_of: np.ndarray,
    object_of: np.ndarray,
    iou: np.ndarray,
    difficult: np.ndarray,
    count: int,
) -> tuple[np.ndarray, np.ndarray]:
    """As the VOC kits: pairs (P,), difficult (G,), count D -> hit, ignored (D,).

    A detection looks at the one object it overlaps most. If that is difficult it is
    ignored, and if an earlier detection has claimed it the detection is a miss,
    whatever else it overlaps.
    """
    # a tie in IoU goes to the earlier object
    order = np.lexsort((object_of, -iou, detection_of))
    d, best = np.unique(detection_of[order], return_index=True)  # those with a pair
    g = object_of[order][best]  # the object that each overlaps most
    _, first_claim = np.unique(g, return_index=True)

    hit = np.zeros(count, bool)
    ignored = np.zeros(count, bool)
    hit[d[first_claim]] = ~difficult[g[first_claim]]
    ignored[d] = difficult[g]
    return hit, ignored
