"""What an evaluation costs beside the network: mAP against pycocotools and ultralytics, and NMS.

python -m bench.evaluation [--images 500] [--rounds 9]

Simulated outputs of a trained detector at 640, K = 20 classes, seed 0: 8,400 boxes with scores go
through NMS, and the
detections of all images through each evaluation. No object is difficult: ultralytics does not know
difficult objects. With `PYTHONPATH=.oracle/newest`, where `make parity` installs it, ultralytics
takes its turns too.

kdmini's time covers all three: VOC 2007, VOC area and COCO. Not in the time of the others:
pycocotools' summarize; the per-image figures and the target tensors of ultralytics' validator.
"""

import argparse
import contextlib
import io
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from bench import measure
from bench.peer import PeerMetric, PeerNMS
from kdmini.contracts import Detections, Target
from kdmini.detection import average_precision as metrics
from kdmini.detection.average_precision import DetectionMetric
from kdmini.detection.boxes import select
from kdmini.detection.voc import VOC_NAMES

K, ANCHORS, SIZE = len(VOC_NAMES), 8400, 640
BATCH = 32  # images in an update of the metric
NMS_IMAGES = 64  # all inputs of NMS at once would fill the memory
SCORE, IOU, MAX_DET = LIMITS = 0.001, 0.7, 300


def simulate(rng: np.random.Generator, name: str) -> tuple[Tensor, Tensor, Target]:
    """-> boxes_xyxy (A, 4), scores (A, K), and the objects, three on average: one in four crowds
    the one before.
    """
    count = 1 + rng.poisson(2)
    labels = rng.integers(0, K, count)
    sides, centre = rng.uniform(30, 300, (count, 2)), rng.uniform(0, SIZE, (count, 2))
    for i in range(1, count):
        if rng.random() < 0.25:
            labels[i], sides[i], centre[i] = (
                labels[i - 1],
                sides[i - 1],
                centre[i - 1] + 0.3 * sides[i - 1],
            )

    # Dozens of cells see an object; the better they place it, the surer they are, of its class and
    # of another.
    seen = np.repeat(np.arange(count), rng.integers(10, 60, count))  # (S,)
    off = rng.normal(0, 0.15, (len(seen), 4))
    sure = rng.beta(3, 2, count)[seen] * np.exp(-4 * np.abs(off).mean(1))
    stray = rng.integers(40, 160)  # cells that see what is not there
    background = ANCHORS - len(seen)
    all_centre = np.vstack(
        [centre[seen] + off[:, :2] * sides[seen], rng.uniform(0, SIZE, (background, 2))]
    )
    all_sides = np.vstack([sides[seen] * np.exp(off[:, 2:]), rng.uniform(10, 300, (background, 2))])
    scores = np.zeros((K, ANCHORS), np.float32).T  # in memory as decode_maps leaves them
    scores[np.arange(len(seen)), rng.integers(0, K, len(seen))] = 0.1 * sure
    scores[np.arange(len(seen)), labels[seen]] = sure
    scores[len(seen) + np.arange(stray), rng.integers(0, K, stray)] = (
        0.001 + 0.5 * rng.random(stray) ** 4
    )

    target: Target = {
        "boxes_xyxy": corners(centre, sides),
        "labels": labels,
        "difficult": np.zeros(count, bool),
        "id": name,
    }
    return torch.from_numpy(corners(all_centre, all_sides)), torch.from_numpy(scores), target


def corners(centre: np.ndarray, sides: np.ndarray) -> np.ndarray:
    """(B, 2), (B, 2) -> (B, 4) float32, inside the image."""
    return np.hstack([centre - sides / 2, centre + sides / 2]).clip(0, SIZE).astype(np.float32)


def kdmini_scores(found: list[Detections], targets: list[Target]) -> dict[str, float]:
    metric = DetectionMetric(list(VOC_NAMES))
    for i in range(0, len(targets), BATCH):
        metric.update(found[i : i + BATCH], targets[i : i + BATCH])
    return metric.compute()


def load_coco(found: list[Detections], targets: list[Target]) -> tuple[COCO, COCO]:
    """Objects and detections as pycocotools wants them."""
    objects = [
        {"image_id": image, "category_id": label, "bbox": [x1, y1, x2 - x1, y2 - y1], "iscrowd": 0}
        for image, t in enumerate(targets)
        for (x1, y1, x2, y2), label in zip(
            t["boxes_xyxy"].tolist(), t["labels"].tolist(), strict=True
        )
    ]
    for number, annotation in enumerate(objects, start=1):
        annotation |= {"id": number, "area": annotation["bbox"][2] * annotation["bbox"][3]}
    results = [
        {
            "image_id": image,
            "category_id": label,
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "score": score,
        }
        for image, d in enumerate(found)
        for (x1, y1, x2, y2), label, score in zip(
            d["boxes_xyxy"].tolist(), d["labels"].tolist(), d["scores"].tolist(), strict=True
        )
    ]
    truth = COCO()
    truth.dataset = {
        "images": [{"id": image} for image in range(len(targets))],
        "categories": [{"id": label} for label in range(K)],
        "annotations": objects,
    }
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        return truth, truth.loadRes(results)


def pycocotools_scores(loaded: tuple[COCO, COCO], all_areas: bool = True) -> dict[str, float]:
    """Four areas and maxDets 1, 10, 100, as it stands; otherwise the one area and the one limit AP
    is read at.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(*loaded, "bbox")
        if not all_areas:
            parameters = evaluation.params
            parameters.areaRng, parameters.areaRngLbl = (
                parameters.areaRng[:1],
                parameters.areaRngLbl[:1],
            )
            parameters.maxDets = parameters.maxDets[-1:]
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][..., 0, -1]  # (T, R, K)
    precision = precision[..., precision[0, 0] >= 0]  # classes with objects
    return {
        name: float(part.mean())
        for name, part in zip(
            metrics.COCO_TABLE[:3], (precision, precision[0], precision[5]), strict=True
        )
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()

    rng = np.random.default_rng(0)
    inputs, found, targets = [], [], []
    for image in range(args.images):
        boxes_xyxy, scores, target = simulate(rng, str(image))
        found.append(select(boxes_xyxy, scores, *LIMITS))
        targets.append(target)
        if image < NMS_IMAGES:
            inputs.append((boxes_xyxy, scores))
    loaded = load_coco(found, targets)
    expected = pycocotools_scores(loaded)
    ours = kdmini_scores(found, targets)
    for name, value in expected.items():
        assert abs(ours[name] - value) < 1e-12, f"{name}: {ours[name]} is not pycocotools' {value}"

    mean_ap: dict[str, Callable[[], object]] = {
        "kdmini": lambda: kdmini_scores(found, targets),
        "pycocotools": lambda: pycocotools_scores(loaded),
        "pycocotools, loading included": lambda: pycocotools_scores(load_coco(found, targets)),
        "pycocotools, one area and limit": lambda: pycocotools_scores(loaded, all_areas=False),
    }
    nms: dict[str, Callable[[], object]] = {
        "kdmini": lambda: [select(*pair, *LIMITS) for pair in inputs]
    }
    remarks = [
        f"kdmini equals pycocotools to 1e-12: AP50-95 {expected['AP50-95']:.4f}, AP50 {expected['AP50']:.4f}"
    ]
    with tempfile.TemporaryDirectory() as scratch:
        try:
            metric, peer = PeerMetric(Path(scratch)), PeerNMS(Path(scratch))
        except ImportError as error:
            remarks.append(
                f"ultralytics takes no part ({error}): PYTHONPATH=.oracle/newest, after `make parity`"
            )
        else:
            objects = [
                (torch.from_numpy(t["boxes_xyxy"]), torch.from_numpy(t["labels"])) for t in targets
            ]
            predictions = [peer.prediction(*pair) for pair in inputs]
            mean_ap[metric.name] = lambda: metric.compute(found, objects)
            nms[peer.name] = lambda: [peer.select(p, *LIMITS) for p in predictions]
            theirs = metric.compute(found, objects)
            apart = ", ".join(
                f"{theirs[name] - value:+.2g} in {name}" for name, value in expected.items()
            )
            same = sum(
                torch.equal(peer.select(p, *LIMITS)[:, 4], d["scores"])
                for p, d in zip(predictions, found, strict=False)
            )
            remarks += [
                f"{metric.name} differs from pycocotools by {apart}",
                f"NMS: both keep the same scores in {same} of {len(predictions)} images",
            ]
        seconds, nms_seconds = (
            measure.take_turns(mean_ap, args.rounds),
            measure.take_turns(nms, args.rounds),
        )

    kept = [len(d["scores"]) for d in found]
    print(
        f"{measure.machine()}, {args.rounds} rounds; {args.images} images with {np.mean(kept):.0f} detections each\n"
    )
    for name in [name for name in seconds if name != "kdmini"]:
        print(
            measure.table(
                {"kdmini": seconds["kdmini"], name: seconds[name]}, name, args.images, "image"
            )
            + "\n"
        )
    print("NMS:\n\n" + measure.table(nms_seconds, list(nms_seconds)[-1], len(inputs), "image"))
    print("\n" + "\n".join(remarks))


if __name__ == "__main__":
    main()
