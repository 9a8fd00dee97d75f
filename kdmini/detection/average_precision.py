"""One set of detections, scored three ways: VOC07 and VOC average precision, and COCO AP.

All three walk through the detections of a class by falling score, call each a hit, a miss or
ignored, and average the precision over recall. They differ in who is matched and where precision is
read:

           IoU          a detection is compared with                precision is read at
  VOC07    0.5          the object it overlaps most                 11 recall levels
  VOC      0.5          the object it overlaps most                 every recall level (area under the curve)
  COCO     0.5 .. 0.95  the best object that is not taken yet       101 recall levels

Sources: Everingham et al., "The PASCAL Visual Object Classes Challenge", IJCV 2010, section 4.2,
with the development kits of 2007 and 2010; Lin et al., "Microsoft COCO", ECCV 2014, with
pycocotools, area = all.

Boxes are continuous corners. The VOC kits measure inclusive pixels, xmax - xmin + 1; boxes read as
(xmin - 1, ymin - 1, xmax, ymax) have exactly those sides, so one IoU serves all three.

Legend: D detections and G objects of one class, best score first; P pairs of the two; T COCO
thresholds."""

import contextlib
import io
from collections.abc import Iterator

import numpy as np
import torch

from kdmini.contracts import Detections, Target, UserError
from kdmini.detection.boxes import box_area, intersection

# As pycocotools computes them, to the last bit: 0.6 and 0.6000000000000001 match different boxes.
IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)  # (T,)
COCO_RECALL = np.linspace(0.0, 1.0, 101)
VOC07_RECALL = np.arange(11) / 10
MAX_DETECTIONS = 100  # COCO: per image and class; VOC sets no limit

SCORES = ("AP50-95", "AP50", "AP75", "VOC07", "VOC")
COCO_TABLE = (
    "AP50-95",
    "AP50",
    "AP75",
    "APs",
    "APm",
    "APl",
    "AR1",
    "AR10",
    "AR100",
    "ARs",
    "ARm",
    "ARl",
)

DETECTION = np.dtype([("image", "i8"), ("labels", "i8"), ("scores", "f8"), ("boxes_xyxy", "f8", 4)])
OBJECT = np.dtype([("image", "i8"), ("labels", "i8"), ("difficult", "?"), ("boxes_xyxy", "f8", 4)])


class DetectionMetric:
    """Collects detections batch by batch. `names` are the K class names; start afresh with a new
    object.
    """

    fitness = "AP50-95"

    def __init__(self, names: list[str]):
        self.names = list(names)
        self.image_ids: list[str] = []
        self._detections = [np.empty(0, DETECTION)]
        self._objects = [np.empty(0, OBJECT)]

    def update(self, detections: list[Detections], targets: list[Target]) -> None:
        """One batch, in pixels of the original images; tensors on any device.

        Raises ValueError if the lists differ in length, UserError if a label has no name.
        """
        if len(detections) != len(targets):
            raise ValueError(
                f"{len(detections)} detections for {len(targets)} targets: one of each per image"
            )
        if not targets:
            return
        images = np.arange(len(targets)) + len(self.image_ids)

        found = np.empty(sum(len(d["scores"]) for d in detections), DETECTION)
        found["image"] = np.repeat(images, [len(d["scores"]) for d in detections])
        # Joined before they are copied: one wait for the device per field instead of one per image.
        found["labels"] = torch.cat([d["labels"] for d in detections]).cpu().numpy()
        found["scores"] = torch.cat([d["scores"] for d in detections]).double().cpu().numpy()
        found["boxes_xyxy"] = (
            torch.cat([d["boxes_xyxy"] for d in detections]).double().cpu().numpy()
        )

        objects = np.empty(sum(len(t["labels"]) for t in targets), OBJECT)
        objects["image"] = np.repeat(images, [len(t["labels"]) for t in targets])
        objects["labels"] = np.concatenate([t["labels"] for t in targets])
        objects["difficult"] = np.concatenate([t["difficult"] for t in targets])
        objects["boxes_xyxy"] = np.concatenate([t["boxes_xyxy"] for t in targets])

        for rows, owner in ((found, "detector"), (objects, "dataset")):
            outside = rows["labels"][(rows["labels"] < 0) | (rows["labels"] >= len(self.names))]
            if len(outside):
                known = f"the metric knows {len(self.names)} names"
                raise UserError(
                    f"the {owner} gives label {outside[0]}, but {known}: give both the same names"
                )

        self.image_ids += [target["id"] for target in targets]
        self._detections.append(found)
        self._objects.append(objects)

    def compute(self) -> dict[str, float]:
        """-> SCORES, each the mean over the classes that have objects; 0.0 if none has."""
        scored = [scores for scores in self.per_class().values() if scores["objects"]]
        return {key: float(np.mean([s[key] for s in scored])) if scored else 0.0 for key in SCORES}

    def per_class(self) -> dict[str, dict[str, float]]:
        """-> name -> SCORES and `objects`, their number without the difficult ones; scores NaN
        where that is 0.
        """
        return {
            name: score_class(detections, objects) for name, detections, objects in self.by_class()
        }

    def by_class(self) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        """-> name, its DETECTION rows (D,), best score first, and its OBJECT rows (G,) by image."""
        detections, objects = np.concatenate(self._detections), np.concatenate(self._objects)
        for label, name in enumerate(self.names):
            mine = detections[detections["labels"] == label]
            # Stable: equal scores keep the order of the images, as in pycocotools.
            mine = mine[np.argsort(-mine["scores"], kind="stable")]
            yield name, mine, objects[objects["labels"] == label]

    def official(self) -> dict[str, float]:
        """-> COCO_TABLE by pycocotools itself: slow, and the word of authority. -1 where nothing
        can be scored.

        s, m, l are objects below 32 x 32 pixels, up to 96 x 96, and above, by the area of the box.
        """
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        detections, objects = np.concatenate(self._detections), np.concatenate(self._objects)
        truth, found = _annotations(objects), _annotations(detections)
        # pycocotools overwrites `ignore` with `iscrowd`, and measures a crowd by another IoU. An
        # area outside every range is what makes an object ignored under the plain one.
        for annotation, difficult in zip(truth, objects["difficult"].tolist(), strict=True):
            annotation["area"] = 1e11 if difficult else annotation["area"]
        for annotation, score in zip(found, detections["scores"].tolist(), strict=True):
            annotation["score"] = score

        images = [{"id": image} for image in range(len(self.image_ids))]
        categories = [{"id": label, "name": name} for label, name in enumerate(self.names)]
        with contextlib.redirect_stdout(io.StringIO()):
            sides = []
            for annotations in (truth, found):  # not loadRes: it raises IndexError on an empty list
                side = COCO()
                side.dataset = {
                    "images": images,
                    "categories": categories,
                    "annotations": annotations,
                }
                side.createIndex()
                sides.append(side)
            evaluation = COCOeval(*sides, "bbox")
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        return dict(zip(COCO_TABLE, evaluation.stats.tolist(), strict=True))

    def detections_json(self) -> list[dict]:
        """-> {image_id, label, score, bbox_xyxy} per detection, ready for json.dump; pixels to
        0.01.
        """
        rows = np.concatenate(self._detections)
        columns = (
            rows["image"],
            rows["labels"],
            rows["scores"].round(6),
            rows["boxes_xyxy"].round(2),
        )
        return [
            {
                "image_id": self.image_ids[image],
                "label": self.names[label],
                "score": score,
                "bbox_xyxy": box,
            }
            for image, label, score, box in zip(
                *(column.tolist() for column in columns), strict=True
            )
        ]


def score_class(detections: np.ndarray, objects: np.ndarray) -> dict[str, float]:
    """Scores of one class from its DETECTION rows (D,), best score first, and its OBJECT rows (G,)
    by image.
    """
    count = int((~objects["difficult"]).sum())
    if count == 0:
        return {**dict.fromkeys(SCORES, np.nan), "objects": 0}

    pairs = overlapping_pairs(detections, objects)
    hit, ignored = match_coco(*pairs, objects["difficult"], detections["image"])  # (T, D)
    curves = np.stack(
        [precision_curve(h, i, count) for h, i in zip(hit, ignored, strict=True)]
    )  # (T, count)
    coco = read_at(COCO_RECALL, curves)  # (T,)
    voc = precision_curve(
        *match_voc(*pairs, objects["difficult"], len(detections)), count
    )  # (count,)
    # the mean of VOC's curve is its area: each object found is a step of 1 / count in recall
    scores = (coco.mean(), coco[0], coco[5], read_at(VOC07_RECALL, voc), voc.mean())
    return {**dict(zip(SCORES, map(float, scores), strict=True)), "objects": count}


def overlapping_pairs(
    detections: np.ndarray, objects: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs of one image with IoU of 0.5 or more: index of the detection, of the object, IoU; (P,)
    each, by detection.

    No pair below 0.5 is a match in any of the three measures, and few are above: all that follows
    is cheap."""
    first = np.searchsorted(objects["image"], detections["image"], side="left")  # (D,)
    partners = np.searchsorted(objects["image"], detections["image"], side="right") - first  # (D,)
    d = np.repeat(np.arange(len(detections)), partners)  # (P,)
    g = np.arange(len(d)) + np.repeat(
        first - (np.cumsum(partners) - partners), partners
    )  # (P,) first, first + 1, ...

    boxes_d = torch.from_numpy(detections["boxes_xyxy"][d])  # (P, 4)
    boxes_g = torch.from_numpy(objects["boxes_xyxy"][g])  # (P, 4)
    inter = intersection(boxes_d, boxes_g)
    iou = (
        inter / (box_area(boxes_d) + box_area(boxes_g) - inter)
    ).numpy()  # NaN for two empty boxes: no pair
    near = iou >= IOU_THRESHOLDS[0]
    return d[near], g[near], iou[near]


def match_coco(
    d: np.ndarray, g: np.ndarray, iou: np.ndarray, difficult: np.ndarray, image: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """pycocotools' greedy matching: pairs (P,), difficult (G,), image (D,) -> hit, ignored, (T, D)
    bool each.

    By falling score each detection takes the object of highest IoU that nobody has taken, a
    difficult one only if there is no other. A difficult object, too, is taken once: a second
    detection of it is a miss."""
    by_image = np.argsort(image, kind="stable")
    rank = np.empty(len(image), np.int64)  # (D,) place of a detection within its image
    rank[by_image] = np.arange(len(image)) - np.searchsorted(image[by_image], image[by_image])
    beyond_limit = rank >= MAX_DETECTIONS

    # In order of preference; pycocotools gives a tie in IoU to the later object.
    order = np.lexsort((-g, -iou, difficult[g], d))
    order = order[~beyond_limit[d[order]]]
    # The thresholds are matched independently of each other, but all at once: bit t of an integer
    # is threshold t.
    reached = (1 << np.searchsorted(IOU_THRESHOLDS, iou[order], side="right")) - 1
    taken, hits, ignored = [0] * len(difficult), [0] * len(image), [0] * len(image)
    hard = difficult.tolist()
    for i, j, bits in zip(d[order].tolist(), g[order].tolist(), reached.tolist(), strict=True):
        won = bits & ~taken[j] & ~hits[i] & ~ignored[i]
        taken[j] |= won
        if hard[j]:
            ignored[i] |= won
        else:
            hits[i] |= won

    bit = 1 << np.arange(len(IOU_THRESHOLDS))[:, None]  # (T, 1)
    hit, ignore = (np.array(hits, np.int64) & bit) > 0, (np.array(ignored, np.int64) & bit) > 0
    return hit, ignore | beyond_limit


def match_voc(
    d: np.ndarray, g: np.ndarray, iou: np.ndarray, difficult: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """The VOC kits' matching: pairs (P,), difficult (G,), count = D -> hit, ignored, (D,) bool
    each.

    A detection looks at the one object it overlaps most. If that is difficult it is ignored, and if
    an earlier detection has claimed it the detection is a miss, whatever else it overlaps."""
    order = np.lexsort((g, -iou, d))  # a tie in IoU goes to the earlier object
    d, best = np.unique(d[order], return_index=True)
    g = g[order][best]  # (number of detections with a pair,)
    _, first_claim = np.unique(g, return_index=True)

    hit, ignored = np.zeros(count, bool), np.zeros(count, bool)
    hit[d[first_claim]] = ~difficult[g[first_claim]]
    ignored[d] = difficult[g]
    return hit, ignored


def precision_curve(hit: np.ndarray, ignored: np.ndarray, count: int) -> np.ndarray:
    """hit, ignored (D,) -> (count,): the best precision at recall 1/count, 2/count, ... 1 or
    beyond; 0 if not reached.

    Precision rises at hits only, so nothing is lost by looking nowhere else.
    """
    seen = np.cumsum(~ignored)[hit]  # detections that count, up to and including each hit
    precision = np.arange(1, len(seen) + 1) / seen
    curve = np.zeros(count)
    curve[: len(seen)] = np.maximum.accumulate(precision[::-1])[::-1]
    return curve


def read_at(recall: np.ndarray, curves: np.ndarray) -> np.ndarray:
    """Mean of the precision at these recall levels: curves (..., count) -> (...)."""
    count = curves.shape[-1]
    return curves[..., np.searchsorted(np.arange(1, count + 1) / count, recall)].mean(-1)


def _annotations(rows: np.ndarray) -> list[dict]:
    """DETECTION or OBJECT rows in COCO's form.

    Ids start at 1: pycocotools takes 0 for `no match`. A box inside out has area 0 and is a miss;
    pycocotools would ignore it if its area were negative.
    """
    corner, sides = rows["boxes_xyxy"][:, :2], rows["boxes_xyxy"][:, 2:] - rows["boxes_xyxy"][:, :2]
    columns = (rows["image"], rows["labels"], np.hstack([corner, sides]), sides.clip(min=0).prod(1))
    return [
        {"id": i, "image_id": image, "category_id": label, "bbox": xywh, "area": area, "iscrowd": 0}
        for i, (image, label, xywh, area) in enumerate(
            zip(*(c.tolist() for c in columns), strict=True), start=1
        )
    ]
