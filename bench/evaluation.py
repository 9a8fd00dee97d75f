"""What an evaluation costs beside the network: average precision, and NMS.

python -m bench.evaluation [--images 500] [--rounds 9]

Against pycocotools and ultralytics. Simulated outputs of a trained detector at 640,
K = 20 classes, seed 0: 8,400 boxes with scores go through NMS, and the detections of all
images through each evaluation. No object is difficult: ultralytics does not know
difficult objects. With `PYTHONPATH=.oracle/newest`, where `make parity` installs it,
ultralytics takes its turns too.

kdmini's time covers all three: VOC 2007, VOC area and COCO. Not in the time of the
others: pycocotools' summarize; the per-image figures and the target tensors of
ultralytics' validator.
Legend: A boxes of an image, B boxes or objects, V boxes that see an object, K classes,
T thresholds of IoU, R recall levels.
"""

import argparse
import contextlib
import io
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from bench import measure
from bench.peer import PeerMetric, PeerNMS
from kdmini.bounds import Count
from kdmini.detection.average_precision import AT_50, AT_75, DetectionMetric
from kdmini.detection.boxes import select
from kdmini.detection.truth import Detections, Target
from kdmini.detection.voc import VOC_NAMES
from kdmini.typed import argument

K = len(VOC_NAMES)
ANCHORS = 8400
SIZE = 640  # pixels
BATCH = 32  # images in an update of the metric
NMS_IMAGES = 64  # all inputs of NMS at once would fill the memory
TOLERANCE = 1e-12  # of the scores, against pycocotools'

# of NMS
SCORE = 0.001
IOU = 0.7
MAX_DET = 300
LIMITS = (SCORE, IOU, MAX_DET)

Works = dict[str, Callable[[], object]]


class Simulated(NamedTuple):
    """What a detector sees in one image, and what is there."""

    boxes_xyxy: Tensor  # (A, 4)
    scores: Tensor  # (A, K)
    target: Target

    def detections(self) -> Detections:
        return select(self.boxes_xyxy, self.scores, *LIMITS)


class Loaded(NamedTuple):
    """As pycocotools wants them."""

    objects: COCO
    detections: COCO


def simulate(rng: np.random.Generator, name: str) -> Simulated:
    """Three objects on average: one in four crowds the one before."""
    count = 1 + rng.poisson(2)
    labels = rng.integers(0, K, count)
    sides = rng.uniform(30, 300, (count, 2))
    centre = rng.uniform(0, SIZE, (count, 2))
    for i in range(1, count):
        if rng.random() < 0.25:
            labels[i] = labels[i - 1]
            sides[i] = sides[i - 1]
            centre[i] = centre[i - 1] + 0.3 * sides[i - 1]
    target: Target = {
        "boxes_xyxy": corners(centre, sides),
        "labels": labels,
        "difficult": np.zeros(count, bool),
        "id": name,
    }

    # Dozens of cells see an object; the better they place it, the surer they are, of
    # its class and of another.
    seen = np.repeat(np.arange(count), rng.integers(10, 60, count))  # (V,)
    off = rng.normal(0, 0.15, (len(seen), 4))
    sure = rng.beta(3, 2, count)[seen] * np.exp(-4 * np.abs(off).mean(1))
    stray = rng.integers(40, 160)  # cells that see what is not there
    background = ANCHORS - len(seen)
    seen_centre = centre[seen] + off[:, :2] * sides[seen]
    seen_sides = sides[seen] * np.exp(off[:, 2:])
    all_centre = np.vstack([seen_centre, rng.uniform(0, SIZE, (background, 2))])
    all_sides = np.vstack([seen_sides, rng.uniform(10, 300, (background, 2))])

    scores = np.zeros((K, ANCHORS), np.float32).T  # in memory as decode_maps leaves them
    seers = np.arange(len(seen))
    scores[seers, rng.integers(0, K, len(seen))] = 0.1 * sure
    scores[seers, labels[seen]] = sure
    stray_scores = 0.001 + 0.5 * rng.random(stray) ** 4
    scores[len(seen) + np.arange(stray), rng.integers(0, K, stray)] = stray_scores

    boxes_xyxy = corners(all_centre, all_sides)
    return Simulated(torch.from_numpy(boxes_xyxy), torch.from_numpy(scores), target)


def corners(centre: np.ndarray, sides: np.ndarray) -> np.ndarray:
    """(B, 2), (B, 2) -> (B, 4) float32, inside the image."""
    boxes_xyxy = np.hstack([centre - sides / 2, centre + sides / 2])
    return boxes_xyxy.clip(0, SIZE).astype(np.float32)


def kdmini_scores(detections: list[Detections], targets: list[Target]) -> dict[str, float]:
    metric = DetectionMetric(list(VOC_NAMES))
    for i in range(0, len(targets), BATCH):
        metric.update(detections[i : i + BATCH], targets[i : i + BATCH])
    return metric.compute()


def load_coco(detections: list[Detections], targets: list[Target]) -> Loaded:
    annotations: list[dict[str, Any]] = []
    for image, target in enumerate(targets):
        boxes_xyxy = target["boxes_xyxy"].tolist()
        labels = target["labels"].tolist()
        for box_xyxy, label in zip(boxes_xyxy, labels, strict=True):
            box_xywh = xywh(box_xyxy)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": label,
                    "bbox": box_xywh,
                    "area": box_xywh[2] * box_xywh[3],
                    "iscrowd": 0,
                }
            )
    results = []
    for image, seen in enumerate(detections):
        boxes_xyxy = seen["boxes_xyxy"].tolist()
        labels = seen["labels"].tolist()
        scores = seen["scores"].tolist()
        for box_xyxy, label, score in zip(boxes_xyxy, labels, scores, strict=True):
            results.append(
                {
                    "image_id": image,
                    "category_id": label,
                    "bbox": xywh(box_xyxy),
                    "score": score,
                }
            )
    objects = COCO()
    objects.dataset = {
        "images": [{"id": image} for image in range(len(targets))],
        "categories": [{"id": label} for label in range(K)],
        "annotations": annotations,
    }
    with contextlib.redirect_stdout(io.StringIO()):
        objects.createIndex()
        return Loaded(objects, objects.loadRes(results))


def xywh(box_xyxy: list[float]) -> list[float]:
    x1, y1, x2, y2 = box_xyxy
    return [x1, y1, x2 - x1, y2 - y1]


def pycocotools_scores(loaded: Loaded, all_areas: bool = True) -> dict[str, float]:
    """all_areas: four areas and maxDets 1, 10, 100, as it stands; else those of AP."""
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(loaded.objects, loaded.detections, "bbox")
        if not all_areas:
            parameters = evaluation.params
            parameters.areaRng = parameters.areaRng[:1]
            parameters.areaRngLbl = parameters.areaRngLbl[:1]
            parameters.maxDets = parameters.maxDets[-1:]
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][..., 0, -1]  # (T, R, K)
    precision = precision[..., precision[0, 0] >= 0]  # classes with objects
    return {
        "AP50-95": float(precision.mean()),
        "AP50": float(precision[AT_50].mean()),
        "AP75": float(precision[AT_75].mean()),
    }


class Bench:
    """The images, their detections, and who takes part."""

    def __init__(self, images: int):
        rng = np.random.default_rng(0)
        self.inputs: list[Simulated] = []  # of NMS
        self.detections: list[Detections] = []
        self.targets: list[Target] = []
        for image in range(images):
            simulated = simulate(rng, str(image))
            self.detections.append(simulated.detections())
            self.targets.append(simulated.target)
            if image < NMS_IMAGES:
                self.inputs.append(simulated)
        loaded = load_coco(self.detections, self.targets)
        self.expected = pycocotools_scores(loaded)
        self.mean_ap: Works = {
            "kdmini": lambda: kdmini_scores(self.detections, self.targets),
            "pycocotools": lambda: pycocotools_scores(loaded),
            "pycocotools, loading included": lambda: pycocotools_scores(
                load_coco(self.detections, self.targets)
            ),
            "pycocotools, one area and limit": lambda: pycocotools_scores(loaded, all_areas=False),
        }
        self.nms: Works = {"kdmini": lambda: [image.detections() for image in self.inputs]}

    def check(self) -> str:
        """Raises AssertionError unless kdmini's scores are pycocotools'."""
        ours = kdmini_scores(self.detections, self.targets)
        for name, value in self.expected.items():
            apart = abs(ours[name] - value)
            assert apart < TOLERANCE, f"{name}: {ours[name]} is not pycocotools' {value}"
        return (
            f"kdmini equals pycocotools to {TOLERANCE:g}: AP50-95 {self.expected['AP50-95']:.4f}, "
            f"AP50 {self.expected['AP50']:.4f}"
        )

    def add_peer(self, scratch: Path) -> Iterator[str]:
        """ultralytics takes part -> how it differs. Raises ImportError without it."""
        metric = PeerMetric(scratch)
        nms = PeerNMS(scratch)
        objects = [
            (torch.from_numpy(target["boxes_xyxy"]), torch.from_numpy(target["labels"]))
            for target in self.targets
        ]
        predictions = [nms.prediction(image.boxes_xyxy, image.scores) for image in self.inputs]
        self.mean_ap[metric.name] = lambda: metric.compute(self.detections, objects)
        self.nms[nms.name] = lambda: [nms.select(image, *LIMITS) for image in predictions]

        theirs = metric.compute(self.detections, objects)
        apart = ", ".join(
            f"{theirs[name] - value:+.2g} in {name}" for name, value in self.expected.items()
        )
        yield f"{metric.name} differs from pycocotools by {apart}"
        same = 0
        for image, ours in zip(predictions, self.detections, strict=False):
            same += torch.equal(nms.select(image, *LIMITS)[:, 4], ours["scores"])
        yield f"NMS: both keep the same scores in {same} of {len(predictions)} images"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=argument(Count), default=500)
    parser.add_argument("--rounds", type=argument(Count), default=9)
    args = parser.parse_args()

    bench = Bench(args.images)
    remarks = [bench.check()]
    with tempfile.TemporaryDirectory() as scratch:
        try:
            remarks += bench.add_peer(Path(scratch))
        except ImportError as error:
            remarks.append(measure.no_peer(error))
        seconds = measure.take_turns(bench.mean_ap, args.rounds)
        nms_seconds = measure.take_turns(bench.nms, args.rounds)

    kept = np.mean([len(seen["scores"]) for seen in bench.detections])
    print(
        f"{measure.machine()}, {args.rounds} rounds; {args.images} images with {kept:.0f} "
        "detections each\n"
    )
    for name in seconds:
        if name != "kdmini":
            pair = {"kdmini": seconds["kdmini"], name: seconds[name]}
            print(measure.table(pair, name, args.images, "image") + "\n")
    last = list(nms_seconds)[-1]
    print("NMS:\n\n" + measure.table(nms_seconds, last, len(bench.inputs), "image"))
    print("\n" + "\n".join(remarks))


if __name__ == "__main__":
    main()
