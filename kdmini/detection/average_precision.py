"""One set of detections, scored three ways: VOC07 AP, VOC AP and COCO AP.

All three walk through the detections of a class by falling score, call each a hit, a
miss or ignored, and average the precision over recall. They differ in who is matched
and where precision is read:

         IoU          a detection is compared with       precision is read at
  VOC07  0.5          the object it overlaps most        11 recall levels
  VOC    0.5          the object it overlaps most        all: the area under the curve
  COCO   0.5 .. 0.95  the best object not taken yet      101 recall levels

Sources: Everingham et al., "The PASCAL Visual Object Classes Challenge", IJCV 2010,
section 4.2, with the development kits of 2007 and 2010; Lin et al., "Microsoft COCO",
ECCV 2014, with pycocotools, area = all.

Boxes are continuous corners. The VOC kits measure inclusive pixels, xmax - xmin + 1;
boxes read as (xmin - 1, ymin - 1, xmax, ymax) have exactly those sides, so one IoU
serves all three.

Legend: D detections of one class, best score first; G objects of that class; T COCO
thresholds; B detections or objects of a batch.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from kdmini.contracts import UserError
from kdmini.detection import breakdown
from kdmini.detection.coco_stats import coco_stats
from kdmini.detection.kinds import judge, kinds_of_error
from kdmini.detection.matching import match_coco, match_voc, overlapping_pairs
from kdmini.detection.precision import COCO_RECALL, VOC07_RECALL, precision_curve, read_at
from kdmini.detection.truth import Detections, Target
from kdmini.files import write_whole

AT_50 = 0  # of the T thresholds
AT_75 = 5

SCORES = ("AP50-95", "AP50", "AP75", "VOC07", "VOC")
COCO_TABLE = (
    "AP50-95",
    "AP50",
    "AP75",
    "APs",  # objects below 32 x 32 pixels, by the area of the box
    "APm",  # up to 96 x 96
    "APl",  # above
    "AR1",  # average recall with one detection an image
    "AR10",
    "AR100",
    "ARs",
    "ARm",
    "ARl",
)

DETECTION = np.dtype(
    [
        ("image", "i8"),  # its number
        ("labels", "i8"),
        ("scores", "f8"),
        ("boxes_xyxy", "f8", 4),
    ]
)
OBJECT = np.dtype(
    [
        ("image", "i8"),
        ("labels", "i8"),
        ("difficult", "?"),
        ("boxes_xyxy", "f8", 4),
    ]
)


class Batch(NamedTuple):
    """Of some images, numbered from 0."""

    ids: list[str]
    detections: np.ndarray  # DETECTION rows
    objects: np.ndarray  # OBJECT rows


def numbered_from(first: int, rows: np.ndarray) -> np.ndarray:
    """The rows, their images numbered from `first` on."""
    moved = rows.copy()
    moved["image"] += first
    return moved


class DetectionMetric:
    """Collects detections batch by batch; start afresh with a new object.

    names: of the K classes.
    """

    fitness = "AP50-95"
    summary = ("VOC07", "VOC", "AP50-95")
    figures = "kdmini.tools.detections:figures"
    official_by = "pycocotools"

    def __init__(self, names: list[str]):
        self.names = list(names)
        self.records: list[Batch] = []

    def update(self, detections: list[Detections], targets: list[Target]) -> None:
        """One batch, in pixels of the original images; tensors on any device.

        Raises ValueError if the lists differ in length, UserError for a label without
        a name.
        """
        if len(detections) != len(targets):
            raise ValueError(
                f"{len(detections)} detections for {len(targets)} targets: one of each per image"
            )
        if not targets:
            return

        images = np.arange(len(targets))
        detection_rows = rows_of_detections(detections, images)
        object_rows = rows_of_objects(targets, images)
        self._check_labels(detection_rows, "detector")
        self._check_labels(object_rows, "dataset")
        ids = [target["id"] for target in targets]
        self.records.append(Batch(ids, detection_rows, object_rows))

    def whole(self) -> "Batch":
        """All batches in one, the images numbered through."""
        ids: list[str] = []
        detections = [np.empty(0, DETECTION)]
        objects = [np.empty(0, OBJECT)]
        for batch in self.records:
            detections.append(numbered_from(len(ids), batch.detections))
            objects.append(numbered_from(len(ids), batch.objects))
            ids += batch.ids
        return Batch(ids, np.concatenate(detections), np.concatenate(objects))

    def _check_labels(self, rows: np.ndarray, owner: str) -> None:
        labels = rows["labels"]
        unnamed = labels[(labels < 0) | (labels >= len(self.names))]
        if len(unnamed):
            known = f"the metric knows {len(self.names)} names"
            raise UserError(
                f"the {owner} gives label {unnamed[0]}, but {known}: give both the same names"
            )

    def compute(self) -> dict[str, float]:
        """-> SCORES, each the mean of the classes with objects; 0.0 if none has any."""
        scored = [row for row in self.per_class().values() if row["objects"]]
        if not scored:
            return dict.fromkeys(SCORES, 0.0)
        return {key: float(np.mean([row[key] for row in scored])) for key in SCORES}

    def per_class(self) -> dict[str, dict[str, float]]:
        """-> name -> SCORES and `objects`, their number without the difficult ones.

        The scores are NaN where that is 0.
        """
        table = {}
        for name, detections, objects in self.by_class():
            table[name] = score_class(detections, objects)
        return table

    def by_class(self) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        """-> name, DETECTION rows (D,), best score first, OBJECT rows (G,) by image."""
        _, all_detections, all_objects = self.whole()
        for label, name in enumerate(self.names):
            detections = all_detections[all_detections["labels"] == label]
            # stable: equal scores keep the order of the images, as in pycocotools
            best_first = np.argsort(-detections["scores"], kind="stable")
            objects = all_objects[all_objects["labels"] == label]
            yield name, detections[best_first], objects

    def official(self) -> dict[str, float]:
        """-> COCO_TABLE by pycocotools itself; -1 where nothing can be scored."""
        ids, detections, objects = self.whole()
        stats = coco_stats(detections, objects, len(ids), self.names)
        return dict(zip(COCO_TABLE, stats, strict=True))

    def analysis(self) -> dict[str, breakdown.Table]:
        """-> tables by title: AP by size and by IoU, the kinds of error, the calibration."""
        _, detections, objects = self.whole()
        judged = judge(detections, objects)
        classes = [(found, there) for _, found, there in self.by_class()]
        return {
            "size": breakdown.by_size(classes),
            "IoU": breakdown.by_iou(classes),
            "kinds of error": kinds_of_error(judged),
            "calibration": breakdown.calibration(judged),
        }

    def confusion(self) -> np.ndarray:
        """-> (K + 1, K + 1) int64, objects by true and predicted class; the last is none."""
        _, detections, objects = self.whole()
        return breakdown.confusion(detections, objects, len(self.names))

    def per_image(self) -> dict[str, float]:
        """-> id -> F1 of the detections that are shown."""
        ids, detections, objects = self.whole()
        scores = breakdown.by_image(judge(detections, objects), len(ids))
        return dict(zip(ids, scores.tolist(), strict=True))

    def save(self, path: Path) -> Path:
        """Writes the detections to PATH.json, and returns that; to PATH_analysis.json the
        analysis, with null for NaN, and the confusion.
        """
        file = path.with_suffix(".json")
        write_whole(file, json.dumps(self.detections_json()))
        tables = {
            title: {row: without_nan(numbers) for row, numbers in table.items()}
            for title, table in self.analysis().items()
        }
        content = {**tables, "names": self.names, "confusion": self.confusion().tolist()}
        write_whole(path.with_name(f"{path.name}_analysis.json"), json.dumps(content, indent=1))
        return file

    def detections_json(self) -> list[dict]:
        """-> {image_id, label, score, bbox_xyxy} per detection, ready for json.dump.

        Pixels to 0.01.
        """
        ids, rows, _ = self.whole()
        records = zip(
            rows["image"].tolist(),
            rows["labels"].tolist(),
            rows["scores"].round(6).tolist(),
            rows["boxes_xyxy"].round(2).tolist(),
            strict=True,
        )
        return [
            {
                "image_id": ids[image],
                "label": self.names[label],
                "score": score,
                "bbox_xyxy": box,
            }
            for image, label, score, box in records
        ]


def without_nan(numbers: dict[str, float]) -> dict[str, float | None]:
    """For JSON, which has none."""
    return {key: None if np.isnan(value) else value for key, value in numbers.items()}


def rows_of_detections(detections: list[Detections], images: np.ndarray) -> np.ndarray:
    """-> DETECTION (B,) of a batch; images: the number of each image."""
    # joined before they are copied: one wait for the device a field, not one an image
    labels = torch.cat([one["labels"] for one in detections])
    scores = torch.cat([one["scores"] for one in detections])
    boxes_xyxy = torch.cat([one["boxes_xyxy"] for one in detections])

    rows = np.empty(len(labels), DETECTION)
    rows["image"] = np.repeat(images, [len(one["labels"]) for one in detections])
    rows["labels"] = labels.cpu().numpy()
    rows["scores"] = scores.double().cpu().numpy()
    rows["boxes_xyxy"] = boxes_xyxy.double().cpu().numpy()
    return rows


def rows_of_objects(targets: list[Target], images: np.ndarray) -> np.ndarray:
    """-> OBJECT (B,) of a batch; images: the number of each image."""
    counts = [len(target["labels"]) for target in targets]
    rows = np.empty(sum(counts), OBJECT)
    rows["image"] = np.repeat(images, counts)
    for field in ("labels", "difficult", "boxes_xyxy"):
        rows[field] = np.concatenate([target[field] for target in targets])
    return rows


def score_class(detections: np.ndarray, objects: np.ndarray) -> dict[str, float]:
    """Of one class -> SCORES and `objects`, as per_class().

    DETECTION rows (D,), best score first, and OBJECT rows (G,) by image.
    """
    difficult = objects["difficult"]
    count = int((~difficult).sum())
    if count == 0:
        return {**dict.fromkeys(SCORES, np.nan), "objects": 0}

    pairs = overlapping_pairs(detections, objects)
    hit, ignored = match_voc(*pairs, difficult, len(detections))  # (D,)
    voc = precision_curve(hit, ignored, count)  # (count,)

    hit, ignored = match_coco(*pairs, difficult, detections["image"])  # (T, D)
    curves = [precision_curve(h, i, count) for h, i in zip(hit, ignored, strict=True)]
    coco = read_at(COCO_RECALL, np.stack(curves))  # (T,)
    return {
        "AP50-95": float(coco.mean()),
        "AP50": float(coco[AT_50]),
        "AP75": float(coco[AT_75]),
        "VOC07": float(read_at(VOC07_RECALL, voc)),
        # the mean is the area: each object found is a step of 1 / count in recall
        "VOC": float(voc.mean()),
        "objects": count,
    }
