"""The metrics against pycocotools, the VOC kits, a VOC package, and paper."""

import json
import math
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from oracle import oracle
from witness import witness

from kdmini.detection.average_precision import DetectionMetric
from kdmini.detection.truth import Detections, Target
from tests.detection.reference_scores import (
    COCO_SCORES,
    detections_of,
    devkit_scores,
    objects_of,
    pycocotools_scores,
)
from tests.detection.scenes import (
    NAMES,
    SCENES,
    Scene,
    detections,
    measure,
    random_scene,
    target,
)

pytestmark = pytest.mark.parity

COCO = "Metrics: COCO AP, overall and by class"
VOC = "Metrics: VOC07 and VOC AP by class"
BIRD = 2
DIGITS = 1e-12  # the bound


# --- awkward scenes: each changes one image of a random scene


def one_score(found: Detections, truth: Target, number: int) -> None:
    found["scores"][:] = 0.5


def all_difficult_but_one_image(found: Detections, truth: Target, number: int) -> None:
    truth["difficult"][:] = number > 0


def boxes_without_area(found: Detections, truth: Target, number: int) -> None:
    found["boxes_xyxy"][::3, 2] = found["boxes_xyxy"][::3, 0]


def every_detection_twice(found: Detections, truth: Target, number: int) -> None:
    found.update({key: value.repeat_interleave(2, 0) for key, value in found.items()})


def no_detections_of_a_class_no_objects_of_another(
    found: Detections, truth: Target, number: int
) -> None:
    seen = found["labels"] != 1
    found.update({key: value[seen] for key, value in found.items()})
    kept = truth["labels"] != 2
    for key in ("boxes_xyxy", "labels", "difficult"):
        truth[key] = truth[key][kept]


def empty_images(found: Detections, truth: Target, number: int) -> None:
    if number % 2:
        found.update(detections([], [], []))


def images_without_objects(found: Detections, truth: Target, number: int) -> None:
    if number % 2:
        truth.update(target(truth["id"], [], []))


AWKWARD = (
    one_score,
    all_difficult_but_one_image,
    boxes_without_area,
    every_detection_twice,
    no_detections_of_a_class_no_objects_of_another,
    empty_images,
    images_without_objects,
)


def changed(seed: int, change: Callable[[Detections, Target, int], None]) -> Scene:
    scene = random_scene(seed, grid=seed % 2 > 0)
    for number, (found, truth) in enumerate(zip(*scene, strict=True)):
        change(found, truth, number)
    return scene


ALL = {
    **SCENES,
    **{f"random {seed}": random_scene(seed) for seed in range(1000, 1012)},
    **{f"ties {seed}": random_scene(seed, grid=True) for seed in range(1100, 1112)},
    **{f"{how.__name__} 1200": changed(1200, how) for how in AWKWARD},
    **{f"{how.__name__} 1201": changed(1201, how) for how in AWKWARD},
}


# --- against others


def difference(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The largest; NaN against NaN is none, and against a number infinite."""
    largest = 0.0
    for a, b in zip(ours, theirs, strict=True):
        if math.isnan(a) != math.isnan(b):
            return math.inf
        if not math.isnan(a):
            largest = max(largest, abs(a - b))
    return largest


def compare_with_pycocotools(scene: Scene) -> None:
    against = f"pycocotools {version('pycocotools')}"
    metric = measure(scene)
    overall, per_class = pycocotools_scores(scene)
    rows = [(metric.compute(), list(overall.values()))]
    for name, row in metric.per_class().items():
        rows.append((row, per_class.get(name, [math.nan] * 3)))
    for row, theirs in rows:
        ours = [row[key] for key in COCO_SCORES]
        witness(COCO, against, difference(ours, theirs), DIGITS, len(COCO_SCORES))


def compare_with_the_kits(scene: Scene) -> None:
    for label, row in enumerate(measure(scene).per_class().values()):
        ours = (row["VOC07"], row["VOC"])
        theirs = devkit_scores(scene, label) or (math.nan, math.nan)
        witness(VOC, "VOC kits' procedure in loops", difference(ours, theirs), DIGITS, 2)


@pytest.mark.parametrize("name", ALL)
def test_random_and_awkward_scenes(name: str) -> None:
    compare_with_pycocotools(ALL[name])
    compare_with_the_kits(ALL[name])


@pytest.mark.parametrize("seed", [1300, 1301, 1302])
def test_more_than_a_hundred_detections_of_an_image(seed: int) -> None:
    scene = random_scene(seed, images=3, per_object=60, grid=seed == 1302)
    found, _ = scene
    assert max(one["labels"].bincount().max() for one in found if len(one["labels"])) > 100
    compare_with_pycocotools(scene)
    compare_with_the_kits(scene)


# argv: file of [[gold boxes], [found boxes]] for each scene, a box being image, label, x1,
# y1, x2, y2 (and score)
VOC_PACKAGE = """
import json, sys
from podm.metrics import BoundingBox, MethodAveragePrecision, get_pascal_voc_metrics

METHODS = (
    MethodAveragePrecision.ElevenPointsInterpolation,
    MethodAveragePrecision.AllPointsInterpolation,
)
results = []
for scene in json.load(open(sys.argv[1])):
    gold, found = ([BoundingBox.of_bbox(*box) for box in boxes] for boxes in scene)
    eleven, area = (get_pascal_voc_metrics(gold, found, 0.5, method) for method in METHODS)
    results.append({label: [float(eleven[label].ap), float(area[label].ap)] for label in area})
print(json.dumps(results))
"""


def scene_for_the_package(seed: int) -> Scene:
    """Without difficult objects, which it does not know; every other one with ties."""
    found, targets = random_scene(seed)
    for truth in targets:
        truth["difficult"][:] = False
    if seed % 2:
        for one in found:
            one["scores"] = (one["scores"] * 4).round() / 4
    return found, targets


def in_the_form_of_the_package(scene: Scene) -> list[list]:
    """-> gold boxes, found boxes."""
    gold = []
    for truth in scene[1]:
        for box_xyxy, label, _ in objects_of(truth):
            gold.append([truth["id"], label, *box_xyxy])
    found = []
    for image, label, score, box_xyxy in detections_of(scene):
        found.append([scene[1][image]["id"], label, *box_xyxy, score])
    return [gold, found]


def test_an_installed_voc_evaluation(tmp_path: Path) -> None:
    # It divides by the area of a box. It reads the precision at 0.6000000000000001 and not
    # at 0.6 (0.3 and 0.7 likewise), so a class with a multiple of five objects is left out.
    scenes = [scene_for_the_package(seed) for seed in range(1400, 1424)]
    given = [in_the_form_of_the_package(scene) for scene in scenes]
    (tmp_path / "given.json").write_text(json.dumps(given))
    printed = oracle(VOC_PACKAGE, tmp_path / "given.json", version="object-detection-metrics")

    against = "object-detection-metrics 0.4.post1"
    compared = 0
    for scene, result in zip(scenes, json.loads(printed), strict=True):
        for label, row in enumerate(measure(scene).per_class().values()):
            if row["objects"] % 5:
                ours = (row["VOC07"], row["VOC"])
                witness(VOC, against, difference(ours, result[str(label)]), DIGITS, 2)
                compared += 1
    assert compared > 50


# --- on paper


def test_on_paper() -> None:
    # Five objects and a difficult one. By falling score, of IoU 1 unless another is given:
    # hit, miss, (difficult: ignored), hit, hit with IoU 0.72, miss (the first object again);
    # two are never found. The precision
    #   up to IoU 0.70: 1, 1/2, 2/3, 3/4, 3/5, so 1 at recall 1/5, 3/4 at 2/5 and 3/5
    #   above:          1, 1/2, 2/3, 2/4, 2/5, so 1 at recall 1/5, 2/3 at 2/5
    objects = [[x, 0, x + 10, 10] for x in (0, 20, 40, 60, 80, 100)]
    found = [
        [0, 0, 10, 10],
        [0, 50, 10, 60],
        [100, 0, 110, 10],
        [20, 0, 30, 10],
        [40, 0, 50, 7.2],
        [0, 0, 10, 10],
    ]
    metric = DetectionMetric(NAMES)
    metric.update(
        [detections(found, np.linspace(0.9, 0.4, 6), [BIRD] * 6)],
        [target("a", objects, [BIRD] * 6, [False] * 5 + [True])],
    )
    expected = {
        "VOC": (1 + 3 / 4 + 3 / 4) / 5,
        "VOC07": (3 * 1 + 4 * 3 / 4) / 11,  # levels 0, .1, .2; .3, .4, .5, .6
        "AP50": (21 * 1 + 40 * 3 / 4) / 101,  # levels 0 .. .20; .21 .. .60
        "AP75": (21 * 1 + 20 * 2 / 3) / 101,  # levels 0 .. .20; .21 .. .40
        "AP50-95": (51 / 101 + 103 / 303) / 2,
    }
    scores = metric.compute()
    for key, value in expected.items():
        off = abs(scores[key] - value)
        witness("Metrics: all five scores", "a case worked out on paper", off, DIGITS)
