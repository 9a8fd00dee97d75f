"""The metric on paper, against pycocotools, and against the VOC procedure in loops."""

import json
import math

import numpy as np
import pytest
import torch

from kdmini.contracts import UserError
from kdmini.detection.average_precision import DETECTION, OBJECT, SCORES, DetectionMetric
from kdmini.detection.boxes import intersection
from kdmini.detection.matching import MOST_PAIRS, overlapping_pairs
from kdmini.detection.truth import Detections, Target
from tests.detection.reference_scores import COCO_SCORES, devkit_scores, pycocotools_scores
from tests.detection.scenes import (
    NAMES,
    SCENES,
    Scene,
    detections,
    measure,
    random_scene,
    target,
)

CAT = 0
DOG = 1
BIRD = 2
SQUARE = [0, 0, 10, 10]
RIGHT = [20, 0, 30, 10]
FAR = [50, 50, 60, 60]


def all_scores(value: float) -> dict[str, float]:
    return dict.fromkeys(SCORES, value)


def measure_one(found: Detections, truth: Target) -> DetectionMetric:
    """Of a single image."""
    return measure(([found], [truth]))


# --- on paper


def test_a_case_computed_on_paper() -> None:
    # Three objects and a difficult one. By falling score:
    #   0.9  IoU 1 with the first object            hit
    #   0.8  IoU 1 with the difficult object        ignored
    #   0.7  IoU 0.8 with the first object, taken   miss
    #   0.6  IoU 0.62 with the second object        hit at 0.50, 0.55, 0.60; miss above
    # The third object is never found.
    # IoU 0.5: recall 1/3 at precision 1/1, recall 2/3 at precision 2/3.
    found = [
        detections([SQUARE, FAR, [0, 0, 10, 8]], [0.9, 0.8, 0.7], [CAT] * 3),
        detections([[0, 0, 10, 6.2]], [0.6], [CAT]),
    ]
    targets = [
        target("a", [SQUARE, FAR], [CAT, CAT], [False, True]),
        target("b", [SQUARE, [30, 0, 40, 10]], [CAT, CAT]),
    ]
    scores = measure((found, targets)).compute()
    # area: 1/3 * 1 + 1/3 * 2/3
    assert scores["VOC"] == pytest.approx(5 / 9, abs=1e-12)
    # levels 0, .1, .2, .3 read 1; .4, .5, .6 read 2/3; four read 0
    assert scores["VOC07"] == pytest.approx((4 + 3 * 2 / 3) / 11, abs=1e-12)
    # levels 0 .. .33 (34 of them) read 1; .34 .. .66 (33) read 2/3
    assert scores["AP50"] == pytest.approx((34 + 33 * 2 / 3) / 101, abs=1e-12)
    assert scores["AP75"] == pytest.approx(34 / 101, abs=1e-12)
    assert scores["AP50-95"] == pytest.approx((3 * 56 + 7 * 34) / 1010, abs=1e-12)


def test_an_overlap_of_exactly_one_half_is_a_hit() -> None:
    found = detections([[0, 0, 10, 5]], [0.9], [CAT])
    metric = measure_one(found, target("a", [SQUARE], [CAT]))
    expected = {
        "AP50-95": 0.1,
        "AP50": 1.0,
        "AP75": 0.0,
        "VOC07": 1.0,
        "VOC": 1.0,
    }
    assert metric.compute() == pytest.approx(expected)


def test_coco_sees_one_hundred_detections_of_an_image_and_voc_all() -> None:
    # Image a: 99 misses, then a hit at place 100 and one at place 101.
    # Image b: a hit, below them all.
    boxes = [FAR] * 99 + [SQUARE, RIGHT]
    found = [
        detections(boxes, np.linspace(0.9, 0.5, 101), [CAT] * 101),
        detections([SQUARE], [0.1], [CAT]),
    ]
    targets = [
        target("a", [SQUARE, RIGHT], [CAT, CAT]),
        target("b", [SQUARE], [CAT]),
    ]
    scores = measure((found, targets)).compute()
    overall, _ = pycocotools_scores((found, targets))
    # COCO: two hits of three objects in 101 detections, so levels 0 .. .66 read 2/101
    assert scores["AP50"] == pytest.approx(67 / 101 * 2 / 101, abs=1e-12)
    assert scores["AP50"] == pytest.approx(overall["AP50"], abs=1e-12)
    # VOC: three hits in 102
    assert scores["VOC"] == pytest.approx(3 / 102, abs=1e-12)


def test_voc_looks_at_one_object_only_and_coco_at_the_next() -> None:
    # Both detections overlap the wide object most; the second also overlaps the narrow
    # one, by 8/11.
    found = detections([SQUARE, [0, 0, 9.5, 10]], [0.9, 0.8], [CAT, CAT])
    truth = target("a", [SQUARE, [0, 0, 7, 10]], [CAT, CAT])
    scores = measure_one(found, truth).compute()
    assert scores["AP50"] == 1.0
    assert scores["VOC"] == 0.5


WITHOUT_AREA = [
    [30, 30, 20, 40],
    [10, 10, 0, 0],
    [5, 5, 5, 5],
    [0, 0, 0, 10],
]


@pytest.mark.parametrize("box", WITHOUT_AREA)
def test_a_box_without_area_is_a_miss(box: list[float]) -> None:
    found = detections([box, SQUARE], [0.9, 0.8], [CAT, CAT])
    metric = measure_one(found, target("a", [SQUARE], [CAT]))
    assert metric.compute() == all_scores(0.5)
    assert metric.official()["AP50-95"] == pytest.approx(0.5, abs=1e-12)


# --- difficult objects, and none


SQUARE_AND_A_DIFFICULT_ONE = target("a", [SQUARE, FAR], [CAT, CAT], [False, True])


@pytest.mark.parametrize("box", [FAR, [50, 50, 60, 59.8]])
def test_a_detection_of_a_difficult_object_is_no_miss(box: list[float]) -> None:
    found = detections([box, SQUARE], [0.9, 0.8], [CAT, CAT])
    metric = measure_one(found, SQUARE_AND_A_DIFFICULT_ONE)
    assert metric.compute() == all_scores(1.0)  # as a miss it would halve the precision
    assert metric.per_class()["cat"]["objects"] == 1


@pytest.mark.parametrize("box", [FAR, [50, 50, 60, 59.8]])
def test_a_detection_of_a_difficult_object_is_no_hit(box: list[float]) -> None:
    found = detections([box], [0.9], [CAT])
    metric = measure_one(found, SQUARE_AND_A_DIFFICULT_ONE)
    assert metric.compute() == all_scores(0.0)


def test_zero_detections_score_zero() -> None:
    _, targets = random_scene(8)
    nothing = detections([], [], [])
    metric = measure(([nothing] * len(targets), targets))
    assert metric.compute() == all_scores(0.0)
    assert metric.official()["AP50-95"] == 0.0
    assert metric.detections_json() == []


NO_IMAGES: Scene = ([], [])
NO_OBJECTS: Scene = ([detections([[0, 0, 9, 9]], [0.5], [DOG])], [target("a", [], [])])


@pytest.mark.parametrize("scene", [NO_IMAGES, NO_OBJECTS], ids=["no images", "no objects"])
def test_no_objects_at_all_score_zero_and_classes_say_so(scene: Scene) -> None:
    metric = measure(scene)
    assert metric.compute() == all_scores(0.0)
    assert metric.official()["AP50-95"] == -1
    for row in metric.per_class().values():
        assert math.isnan(row["VOC"])
        assert row["objects"] == 0


def test_a_class_without_objects_is_left_out_of_the_mean() -> None:
    found = detections([SQUARE] * 3, [0.9, 0.8, 0.7], [CAT, DOG, BIRD])
    truth = target("a", [SQUARE, SQUARE], [CAT, DOG], [False, True])
    metric = measure_one(found, truth)
    table = metric.per_class()
    assert metric.compute() == all_scores(1.0)
    assert math.isnan(table["dog"]["AP50"])  # only a difficult object
    assert math.isnan(table["bird"]["AP50"])


# --- random scenes


def test_the_scenes_are_as_hard_as_they_claim() -> None:
    scores = set()
    for scene in SCENES.values():
        scores.add(round(measure(scene).compute()["AP50-95"], 6))
    assert len(scores) == len(SCENES)
    assert min(scores) > 0.02
    assert max(scores) < 0.9


@pytest.mark.parametrize("name", ["crowded 0", "crowded 1"])
def test_crowded_scenes_are_beyond_the_limit_of_coco(name: str) -> None:
    found, _ = SCENES[name]
    counts = []
    for one in found:
        if len(one["labels"]):
            counts.append(torch.bincount(one["labels"]).max())
    assert max(counts) > 100


@pytest.mark.parametrize("name", SCENES)
def test_coco_scores_equal_pycocotools(name: str) -> None:
    metric = measure(SCENES[name])
    overall, per_class = pycocotools_scores(SCENES[name])
    scores = metric.compute()
    table = metric.per_class()
    for key, value in overall.items():
        assert scores[key] == pytest.approx(value, abs=1e-12)
    for label in NAMES:
        ours = [table[label][key] for key in COCO_SCORES]
        theirs = per_class.get(label, [math.nan] * 3)
        assert ours == pytest.approx(theirs, abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("name", SCENES)
def test_voc_scores_equal_the_devkit_procedure(name: str) -> None:
    table = measure(SCENES[name]).per_class()
    for label, row in enumerate(table.values()):
        ours = (row["VOC07"], row["VOC"])
        theirs = devkit_scores(SCENES[name], label)
        if theirs is None:
            theirs = (math.nan, math.nan)
        assert ours == pytest.approx(theirs, abs=1e-12, nan_ok=True)


def test_perfect_detections_score_one() -> None:
    _, targets = random_scene(7)
    found = []
    for truth in targets:
        # where two overlap, the detection of one must not be lost to a difficult one
        truth["difficult"][:] = False
        labels = truth["labels"]
        found.append(detections(truth["boxes_xyxy"], np.ones(len(labels)), labels))
    assert measure((found, targets)).compute() == all_scores(1.0)


# --- the official table


@pytest.mark.parametrize("name", ["random 0", "ties 0", "crowded 1"])
def test_official_table_agrees_and_is_silent(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    metric = measure(SCENES[name])
    official = metric.official()
    scores = metric.compute()
    for key in COCO_SCORES:
        assert official[key] == pytest.approx(scores[key], abs=1e-12)
    assert official["AR1"] <= official["AR10"] <= official["AR100"]
    assert capsys.readouterr().out == ""


def test_official_sizes_follow_the_area_of_the_box() -> None:
    # the small object is found, the medium one missed; there is no large one
    small = [0, 0, 20, 20]
    medium = [100, 100, 160, 160]
    found = detections([small], [0.9], [CAT])
    truth = target("a", [small, medium], [CAT, CAT])
    table = measure_one(found, truth).official()
    assert table["APs"] == pytest.approx(1.0)
    assert table["APm"] == pytest.approx(0.0)
    assert table["APl"] == pytest.approx(-1.0)


# --- what goes in and out


def test_batches_do_not_matter() -> None:
    scene = random_scene(9)
    one = measure(scene, batch=1)
    many = measure(scene, batch=12)
    many.update([], [])
    assert one.compute() == many.compute()
    assert one.detections_json() == many.detections_json()


def test_half_precision_and_inference_tensors_are_accepted() -> None:
    found, targets = SCENES["ties 0"]
    exact = found[0]
    with torch.inference_mode():
        half = {
            "boxes_xyxy": exact["boxes_xyxy"].bfloat16(),
            "scores": exact["scores"].bfloat16(),
            "labels": exact["labels"],
        }
    scores = measure_one(half, targets[0]).compute()
    # whole pixels and quarters survive bfloat16
    assert scores == measure_one(exact, targets[0]).compute()


def test_detections_as_json() -> None:
    found = [
        detections([], [], []),
        detections([[0.123, 1, 2.5, 3]], [0.75], [BIRD]),
    ]
    targets = [target("a", [], []), target("b", [], [])]
    records = measure((found, targets)).detections_json()
    expected = {
        "image_id": "b",
        "label": "bird",
        "score": 0.75,
        "bbox_xyxy": [0.12, 1.0, 2.5, 3.0],
    }
    assert json.loads(json.dumps(records)) == [expected]


def test_the_metric_names_its_scores_and_its_pictures() -> None:
    assert DetectionMetric.fitness in SCORES
    assert set(DetectionMetric.summary) <= set(SCORES)
    module, _, function = DetectionMetric.figures.partition(":")
    assert module.startswith("kdmini.tools.")
    assert function.isidentifier()


def test_a_label_without_a_name_is_refused() -> None:
    metric = DetectionMetric(NAMES)
    nothing = detections([], [], [])
    empty = target("a", [], [])
    fifth = detections([SQUARE], [0.5], [4])
    padding = target("a", [SQUARE], [-1])
    message = "detector gives label 4, but the metric knows 4 names"
    with pytest.raises(UserError, match=message):
        metric.update([fifth], [empty])
    with pytest.raises(UserError, match="dataset gives label -1"):
        metric.update([nothing], [padding])
    assert metric.records == []


def test_detections_without_their_target_are_refused() -> None:
    metric = DetectionMetric(NAMES)
    with pytest.raises(ValueError, match="1 detections for 0 targets"):
        metric.update([detections([], [], [])], [])
    assert metric.records == []


# --- dense images


@pytest.mark.parametrize("most", [1, 7, 64])
def test_pairs_by_parts_are_the_same_pairs(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    metric = measure(random_scene(1, images=9, per_object=4))
    classes = [(detected, objects) for _, detected, objects in metric.by_class()]
    whole = [overlapping_pairs(*both) for both in classes]
    assert sum(len(pairs.iou) for pairs in whole) > 100
    monkeypatch.setattr("kdmini.detection.matching.MOST_PAIRS", most)
    for both, expected in zip(classes, whole, strict=True):
        for part, values in zip(overlapping_pairs(*both), expected, strict=True):
            assert part.dtype == values.dtype
            assert np.array_equal(part, values)


def test_pairs_of_dense_images_are_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """300 detections and 1,000 objects an image: 6 million pairs of 150 bytes, compared in
    six parts.
    """
    rng = np.random.default_rng(0)
    rows = {}
    for kind, count in ((DETECTION, 300), (OBJECT, 1000)):
        rows[kind] = np.zeros(20 * count, kind)
        rows[kind]["image"] = np.repeat(np.arange(20), count)
        corner = rng.uniform(0, 600, (20 * count, 2))
        sides = rng.uniform(4, 24, (20 * count, 2))
        rows[kind]["boxes_xyxy"] = np.concatenate([corner, corner + sides], 1)
    sizes = []

    def counted(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        sizes.append(len(a))
        return intersection(a, b)

    monkeypatch.setattr("kdmini.detection.matching.intersection", counted)
    overlapping_pairs(rows[DETECTION], rows[OBJECT])
    assert sum(sizes) == 6_000_000
    assert max(sizes) < 1.01 * MOST_PAIRS
