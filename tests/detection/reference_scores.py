"""The scores of a scene by pycocotools, and by the VOC kits' procedure in loops."""

import math
from dataclasses import dataclass

from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from kdmini.detection.truth import Target
from tests.detection.scenes import NAMES, Scene

COCO_SCORES = ("AP50-95", "AP50", "AP75")
AP_50 = 0  # of pycocotools' thresholds
AP_75 = 5
ALL_AREAS = 0
HUNDRED_DETECTIONS = 2  # of its limits 1, 10, 100
IGNORED = 1e11  # an area outside every range


# --- pycocotools


def pycocotools_scores(scene: Scene) -> tuple[dict[str, float], dict[str, list[float]]]:
    """-> overall and by class COCO_SCORES; a class without objects is left out."""
    truth = COCO()
    truth.dataset = {
        "images": [{"id": image} for image in range(len(scene[1]))],
        "annotations": coco_objects(scene),
        "categories": [{"id": label} for label in range(len(NAMES))],
    }
    truth.createIndex()
    evaluation = COCOeval(truth, truth.loadRes(coco_detections(scene)), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()

    per_class = {}
    precision = evaluation.eval["precision"][..., ALL_AREAS, HUNDRED_DETECTIONS]  # (T, R, K)
    for label, name in enumerate(NAMES):
        curves = precision[:, :, label]
        if curves[0, 0] >= 0:
            per_class[name] = [curves.mean(), curves[AP_50].mean(), curves[AP_75].mean()]
    overall = dict(zip(COCO_SCORES, evaluation.stats[:3], strict=True))
    return overall, per_class


def coco_objects(scene: Scene) -> list[dict]:
    rows = []
    for image, target in enumerate(scene[1]):
        for box_xyxy, label, difficult in objects_of(target):
            bbox = xywh_of(box_xyxy)
            row = {
                "id": len(rows) + 1,
                "image_id": image,
                "category_id": label,
                "bbox": bbox,
                "iscrowd": 0,
                "area": IGNORED if difficult else bbox[2] * bbox[3],
            }
            rows.append(row)
    return rows


def coco_detections(scene: Scene) -> list[dict]:
    rows = []
    for image, label, score, box_xyxy in detections_of(scene):
        row = {
            "image_id": image,
            "category_id": label,
            "score": score,
            "bbox": xywh_of(box_xyxy),
        }
        rows.append(row)
    return rows


def xywh_of(box_xyxy: list[float]) -> list[float]:
    x1, y1, x2, y2 = box_xyxy
    return [x1, y1, x2 - x1, y2 - y1]


def objects_of(target: Target) -> list[tuple[list[float], int, bool]]:
    """-> box, label, difficult of each."""
    columns = (target["boxes_xyxy"], target["labels"], target["difficult"])
    return list(zip(*(column.tolist() for column in columns), strict=True))


def detections_of(scene: Scene) -> list[tuple[int, int, float, list[float]]]:
    """-> number of the image, label, score, box of each."""
    rows = []
    for image, found in enumerate(scene[0]):
        columns = (found["labels"], found["scores"], found["boxes_xyxy"])
        for row in zip(*(column.tolist() for column in columns), strict=True):
            rows.append((image, *row))
    return rows


# --- the VOC kits


@dataclass
class Object:
    box: tuple[float, float, float, float]
    difficult: bool
    detected: bool = False


def devkit_scores(scene: Scene, label: int) -> tuple[float, float] | None:
    """VOC07 AP and VOC AP of a class, one detection and one object at a time.

    None where the class has no objects.
    """
    objects = [devkit_objects(target, label) for target in scene[1]]  # of each image
    positives = sum(not item.difficult for items in objects for item in items)
    if positives == 0:
        return None
    ranked = [
        (score, image, inclusive(box_xyxy))
        for image, its_label, score, box_xyxy in detections_of(scene)
        if its_label == label
    ]
    ranked.sort(key=lambda row: -row[0])

    hits = 0
    misses = 0
    recall = []
    precision = []
    for _, image, box in ranked:
        best, overlap = best_object(box, objects[image])
        if best is None or overlap < 0.5:
            misses += 1
        elif best.difficult:
            pass  # neither
        elif best.detected:
            misses += 1
        else:
            hits += 1
            best.detected = True
        recall.append(hits / positives)
        precision.append(hits / (hits + misses) if hits + misses else 0.0)
    return eleven_points(recall, precision), area_under(recall, precision)


def devkit_objects(target: Target, label: int) -> list[Object]:
    return [
        Object(inclusive(box_xyxy), difficult)
        for box_xyxy, its_label, difficult in objects_of(target)
        if its_label == label
    ]


def inclusive(box_xyxy: list[float]) -> tuple[float, float, float, float]:
    """As an annotation has it: the first pixel is 1, both corners are of the box."""
    x1, y1, x2, y2 = box_xyxy
    return x1 + 1, y1 + 1, x2, y2


def best_object(box: tuple, objects: list[Object]) -> tuple[Object | None, float]:
    best = None
    best_overlap = -math.inf
    for item in objects:
        width = min(box[2], item.box[2]) - max(box[0], item.box[0]) + 1
        height = min(box[3], item.box[3]) - max(box[1], item.box[1]) + 1
        if width > 0 and height > 0:
            both = width * height
            overlap = both / (inclusive_area(box) + inclusive_area(item.box) - both)
            if overlap > best_overlap:
                best_overlap = overlap
                best = item
    return best, best_overlap


def inclusive_area(box: tuple) -> float:
    return (box[2] - box[0] + 1) * (box[3] - box[1] + 1)


def eleven_points(recall: list[float], precision: list[float]) -> float:
    total = 0.0
    for step in range(11):
        reached = [p for p, r in zip(precision, recall, strict=True) if r >= step / 10]
        total += max(reached, default=0.0) / 11
    return total


def area_under(recall: list[float], precision: list[float]) -> float:
    recall = [0.0, *recall, 1.0]
    precision = [0.0, *precision, 0.0]
    for i in reversed(range(len(precision) - 1)):
        precision[i] = max(precision[i], precision[i + 1])
    area = 0.0
    for i in range(1, len(recall)):
        if recall[i] != recall[i - 1]:
            area += (recall[i] - recall[i - 1]) * precision[i]
    return area
