"""The twelve numbers of COCO's table by pycocotools itself: slow, and authoritative.

Legend: D detections and G objects of all classes.
"""

import contextlib
import io

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

BEYOND_ALL_AREAS = 1e11  # square pixels; outside every range of pycocotools


def coco_stats(
    detections: np.ndarray,
    objects: np.ndarray,
    image_count: int,
    names: list[str],
) -> list[float]:
    """DETECTION rows (D,), OBJECT rows (G,) -> the table; -1 where nothing is scored.

    pycocotools overwrites `ignore` with `iscrowd`, and measures a crowd by another IoU.
    An area outside every range is what makes an object ignored under the plain one.
    """
    truth = annotations(objects)
    for annotation, difficult in zip(truth, objects["difficult"].tolist(), strict=True):
        if difficult:
            annotation["area"] = BEYOND_ALL_AREAS
    results = annotations(detections)
    for annotation, score in zip(results, detections["scores"].tolist(), strict=True):
        annotation["score"] = score

    with contextlib.redirect_stdout(io.StringIO()):
        truth_set = coco_set(truth, image_count, names)
        result_set = coco_set(results, image_count, names)
        evaluation = COCOeval(truth_set, result_set, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats.tolist()


def annotations(rows: np.ndarray) -> list[dict]:
    """DETECTION or OBJECT rows in COCO's form.

    Ids start at 1: pycocotools takes 0 for `no match`. A box inside out has area 0 and
    is a miss; pycocotools would ignore it if its area were negative.
    """
    corner = rows["boxes_xyxy"][:, :2]
    sides = rows["boxes_xyxy"][:, 2:] - corner
    xywh = np.hstack([corner, sides])
    areas = sides.clip(min=0).prod(1)
    columns = (rows["image"], rows["labels"], xywh, areas)
    values = zip(*(column.tolist() for column in columns), strict=True)
    return [
        {
            "id": number,
            "image_id": image,
            "category_id": label,
            "bbox": bbox,
            "area": area,
            "iscrowd": 0,
        }
        for number, (image, label, bbox, area) in enumerate(values, start=1)
    ]


def coco_set(rows: list[dict], image_count: int, names: list[str]) -> COCO:
    """Not COCO.loadRes, which raises IndexError where there are no detections."""
    coco = COCO()
    coco.dataset = {
        "images": [{"id": image} for image in range(image_count)],
        "categories": [{"id": label, "name": name} for label, name in enumerate(names)],
        "annotations": rows,
    }
    coco.createIndex()
    return coco
