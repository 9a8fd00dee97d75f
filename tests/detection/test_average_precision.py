"""The metric against pycocotools, against the VOC procedure written out in loops, and against
paper.
"""

import json
import math

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from kdmini.contracts import Detections, Target, UserError
from kdmini.detection.average_precision import SCORES, DetectionMetric

NAMES = ["cat", "dog", "bird", "boat"]
Scene = tuple[list[Detections], list[Target]]


def detections(boxes, scores, labels) -> Detections:
    return {
        "boxes_xyxy": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "scores": torch.tensor(scores, dtype=torch.float32),
        "labels": torch.tensor(labels, dtype=torch.int64),
    }


def target(name, boxes, labels, difficult=None) -> Target:
    return {
        "boxes_xyxy": np.array(boxes, np.float32).reshape(-1, 4),
        "labels": np.array(labels, np.int64),
        "difficult": np.zeros(len(labels), bool)
        if difficult is None
        else np.array(difficult, bool),
        "id": name,
    }


def measure(scene: Scene, names=NAMES, batch: int = 3) -> DetectionMetric:
    metric = DetectionMetric(names)
    for i in range(0, len(scene[1]), batch):
        metric.update(scene[0][i : i + batch], scene[1][i : i + batch])
    return metric


def random_scene(
    seed: int, images: int = 12, per_object: float = 3, noise: int = 60, grid: bool = False
) -> Scene:
    """Detections scattered about the objects, and noise. `grid`: whole pixels and four scores, so
    that boxes, IoUs and scores tie all over and IoUs fall exactly on thresholds.
    """
    rng = np.random.default_rng(seed)
    found, targets = [], []
    for image in range(images):
        count = int(rng.integers(0, 9))
        corner = rng.uniform(0, 60, (count, 2))
        boxes = np.hstack([corner, corner + rng.uniform(8, 40, (count, 2))])
        labels = rng.integers(0, len(NAMES) - 1, count)  # the last class has no objects
        copies = np.repeat(np.arange(count), rng.poisson(per_object, count))
        guesses = boxes[copies] + rng.normal(0, 2.5, (len(copies), 4))
        corner = rng.uniform(0, 60, (int(rng.integers(0, noise)), 2))
        guesses = np.vstack(
            [guesses, np.hstack([corner, corner + rng.uniform(4, 40, (len(corner), 2))])]
        )
        guess_labels = np.concatenate([labels[copies], rng.integers(0, len(NAMES), len(corner))])
        guesses[:, 2:] = np.maximum(
            guesses[:, 2:], guesses[:, :2]
        )  # boxes inside out have a test of their own
        scores = rng.uniform(0, 1, len(guesses))
        if grid:
            boxes, guesses = (boxes / 10).round() * 10, (guesses / 10).round() * 10
            scores = (scores * 4).round() / 4
        found.append(detections(guesses, scores, guess_labels))
        targets.append(target(f"{image:06d}", boxes, labels, rng.uniform(size=count) < 0.3))
    return found, targets


def pycocotools_scores(
    scene: Scene, names=NAMES
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """-> overall and per class AP50-95, AP50, AP75; a class without objects is left out."""
    truth, results = [], []
    for image, (found, objects) in enumerate(zip(*scene, strict=True)):
        for (x1, y1, x2, y2), label, hard in zip(
            objects["boxes_xyxy"].tolist(),
            objects["labels"].tolist(),
            objects["difficult"].tolist(),
            strict=True,
        ):
            truth.append(
                {
                    "image_id": image,
                    "category_id": label,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "iscrowd": 0,
                }
            )
            truth[-1].update(id=len(truth), area=1e11 if hard else (x2 - x1) * (y2 - y1))
        for (x1, y1, x2, y2), label, score in zip(
            found["boxes_xyxy"].tolist(),
            found["labels"].tolist(),
            found["scores"].tolist(),
            strict=True,
        ):
            box = [x1, y1, x2 - x1, y2 - y1]
            results.append({"image_id": image, "category_id": label, "bbox": box, "score": score})
    coco = COCO()
    coco.dataset = {
        "images": [{"id": i} for i in range(len(scene[1]))],
        "annotations": truth,
        "categories": [{"id": i} for i in range(len(names))],
    }
    coco.createIndex()
    evaluation = COCOeval(coco, coco.loadRes(results), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    precision = evaluation.eval["precision"][..., 0, 2]  # (T, R, K): all areas, 100 detections
    per_class = {
        name: [precision[:, :, k].mean(), precision[0, :, k].mean(), precision[5, :, k].mean()]
        for k, name in enumerate(names)
        if precision[0, 0, k] >= 0
    }
    return dict(zip(("AP50-95", "AP50", "AP75"), evaluation.stats[:3], strict=True)), per_class


def devkit_scores(scene: Scene, label: int) -> tuple[float, float] | None:
    """VOC07 AP and VOC AP as the development kits describe them: one detection, one object at a
    time.
    """
    objects = {}
    for i, t in enumerate(scene[1]):
        rows = zip(
            t["boxes_xyxy"].tolist(), t["labels"].tolist(), t["difficult"].tolist(), strict=True
        )
        # as an annotation holds them: the first pixel is 1, both corners belong to the box
        objects[i] = [
            {"box": (x1 + 1, y1 + 1, x2, y2), "difficult": hard, "detected": False}
            for (x1, y1, x2, y2), k, hard in rows
            if k == label
        ]
    positives = sum(not o["difficult"] for rows in objects.values() for o in rows)
    if positives == 0:
        return None
    ranked = []
    for i, found in enumerate(scene[0]):
        rows = zip(
            found["boxes_xyxy"].tolist(),
            found["scores"].tolist(),
            found["labels"].tolist(),
            strict=True,
        )
        ranked += [
            (score, i, (x1 + 1, y1 + 1, x2, y2))
            for (x1, y1, x2, y2), score, k in rows
            if k == label
        ]
    ranked.sort(key=lambda row: -row[0])

    tp = fp = 0
    recall, precision = [], []
    for _, i, box in ranked:
        best_overlap, best = -math.inf, None
        for o in objects[i]:
            width = min(box[2], o["box"][2]) - max(box[0], o["box"][0]) + 1
            height = min(box[3], o["box"][3]) - max(box[1], o["box"][1]) + 1
            if width > 0 and height > 0:
                area = (box[2] - box[0] + 1) * (box[3] - box[1] + 1)
                area += (o["box"][2] - o["box"][0] + 1) * (o["box"][3] - o["box"][1] + 1)
                overlap = width * height / (area - width * height)
                if overlap > best_overlap:
                    best_overlap, best = overlap, o
        if best_overlap >= 0.5:
            if not best["difficult"]:
                if not best["detected"]:
                    tp += 1
                    best["detected"] = True
                else:
                    fp += 1
        else:
            fp += 1
        recall.append(tp / positives)
        precision.append(tp / (tp + fp) if tp + fp else 0.0)

    eleven = 0.0
    for step in range(11):
        eleven += (
            max([p for p, r in zip(precision, recall, strict=True) if r >= step / 10], default=0.0)
            / 11
        )

    recall, precision = [0.0, *recall, 1.0], [0.0, *precision, 0.0]
    for i in range(len(precision) - 2, -1, -1):
        precision[i] = max(precision[i], precision[i + 1])
    area = 0.0
    for i in range(1, len(recall)):
        if recall[i] != recall[i - 1]:
            area += (recall[i] - recall[i - 1]) * precision[i]
    return eleven, area


SCENES = {
    **{f"random {seed}": random_scene(seed) for seed in range(6)},
    **{f"ties {seed}": random_scene(100 + seed, grid=True) for seed in range(6)},
    **{
        f"crowded {seed}": random_scene(200 + seed, images=3, per_object=70, grid=seed > 0)
        for seed in range(2)
    },
    "sparse": random_scene(300, images=20, per_object=0.2, noise=2),
}


@pytest.mark.parametrize("name", SCENES)
def test_coco_scores_equal_pycocotools(name):
    scene = SCENES[name]
    metric = measure(scene)
    overall, per_class = pycocotools_scores(scene)
    computed, computed_per_class = metric.compute(), metric.per_class()
    for key, value in overall.items():
        assert computed[key] == pytest.approx(value, abs=1e-12)
    for label in NAMES:
        row = [computed_per_class[label][key] for key in overall]
        assert row == pytest.approx(per_class.get(label, [math.nan] * 3), abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("name", SCENES)
def test_voc_scores_equal_the_devkit_procedure(name):
    scene = SCENES[name]
    per_class = measure(scene).per_class()
    for k, label in enumerate(NAMES):
        expected = devkit_scores(scene, k) or (math.nan, math.nan)
        assert (per_class[label]["VOC07"], per_class[label]["VOC"]) == pytest.approx(
            expected, abs=1e-12, nan_ok=True
        )


def test_the_scenes_are_as_hard_as_they_claim():
    def most_per_class(scene):
        return max(int(torch.bincount(d["labels"]).max()) for d in scene[0] if len(d["labels"]))

    assert most_per_class(SCENES["crowded 0"]) > 100 and most_per_class(SCENES["crowded 1"]) > 100
    values = [measure(scene).compute()["AP50-95"] for scene in SCENES.values()]
    assert (
        len({round(v, 6) for v in values}) == len(values)
        and min(values) > 0.02
        and max(values) < 0.9
    )


def test_a_case_computed_on_paper():
    # Three objects and a difficult one. By falling score: 0.9  IoU 1    with the first object
    # hit 0.8  IoU 1    with the difficult object            ignored 0.7  IoU 0.8  with the first
    # object, taken         miss 0.6  IoU 0.62 with the second object               hit at 0.50,
    # 0.55, 0.60; miss at 0.65 and above The third object is never found. IoU 0.5: recall 1/3 at
    # precision 1/1, recall 2/3 at precision 2/3.
    found = [
        detections([[0, 0, 10, 10], [50, 50, 60, 60], [0, 0, 10, 8]], [0.9, 0.8, 0.7], [0, 0, 0]),
        detections([[0, 0, 10, 6.2]], [0.6], [0]),
    ]
    targets = [
        target("a", [[0, 0, 10, 10], [50, 50, 60, 60]], [0, 0], [False, True]),
        target("b", [[0, 0, 10, 10], [30, 0, 40, 10]], [0, 0]),
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


def test_an_overlap_of_exactly_one_half_is_a_hit():
    scores = measure(
        ([detections([[0, 0, 10, 5]], [0.9], [0])], [target("a", [[0, 0, 10, 10]], [0])])
    ).compute()
    assert scores == pytest.approx(
        {"AP50-95": 0.1, "AP50": 1.0, "AP75": 0.0, "VOC07": 1.0, "VOC": 1.0}
    )


def test_coco_sees_one_hundred_detections_of_an_image_and_voc_all():
    # Image a: 99 misses, then a hit at place 100 and one at place 101. Image b: a hit, below them
    # all.
    boxes = [[50, 50, 60, 60]] * 99 + [[0, 0, 10, 10], [20, 0, 30, 10]]
    scene = (
        [
            detections(boxes, np.linspace(0.9, 0.5, 101), [0] * 101),
            detections([[0, 0, 10, 10]], [0.1], [0]),
        ],
        [
            target("a", [[0, 0, 10, 10], [20, 0, 30, 10]], [0, 0]),
            target("b", [[0, 0, 10, 10]], [0]),
        ],
    )
    scores = measure(scene).compute()
    # COCO: two hits of three objects in 101 detections, so levels 0 .. .66 read 2/101; VOC: three
    # hits in 102
    assert scores["AP50"] == pytest.approx(67 / 101 * 2 / 101, abs=1e-12)
    assert scores["AP50"] == pytest.approx(pycocotools_scores(scene)[0]["AP50"], abs=1e-12)
    assert scores["VOC"] == pytest.approx(3 / 102, abs=1e-12)


def test_voc_looks_at_one_object_only_and_coco_at_the_next():
    # Both detections overlap the wide object most; the second also overlaps the narrow one, by
    # 8/11.
    found = [detections([[0, 0, 10, 10], [0, 0, 9.5, 10]], [0.9, 0.8], [0, 0])]
    targets = [target("a", [[0, 0, 10, 10], [0, 0, 7, 10]], [0, 0])]
    scores = measure((found, targets)).compute()
    assert scores["AP50"] == 1.0
    assert scores["VOC"] == 0.5


@pytest.mark.parametrize("box", [[30, 30, 20, 40], [10, 10, 0, 0], [5, 5, 5, 5], [0, 0, 0, 10]])
def test_a_box_without_area_is_a_miss(box):
    metric = measure(
        (
            [detections([box, [0, 0, 10, 10]], [0.9, 0.8], [0, 0])],
            [target("a", [[0, 0, 10, 10]], [0])],
        )
    )
    assert metric.compute() == dict.fromkeys(SCORES, 0.5)
    assert metric.official()["AP50-95"] == pytest.approx(0.5, abs=1e-12)


def test_perfect_detections_score_one():
    _, targets = random_scene(7)
    found = [detections(t["boxes_xyxy"], np.ones(len(t["labels"])), t["labels"]) for t in targets]
    # Without difficult objects: two objects may overlap, and a detection of one must not be lost to
    # the other.
    for t in targets:
        t["difficult"][:] = False
    assert measure((found, targets)).compute() == dict.fromkeys(SCORES, 1.0)


@pytest.mark.parametrize("box", [[50, 50, 60, 60], [50, 50, 60, 59.8]])
def test_a_detection_of_a_difficult_object_is_neither_hit_nor_miss(box):
    targets = [target("a", [[0, 0, 10, 10], [50, 50, 60, 60]], [0, 0], [False, True])]
    found = [detections([box, [0, 0, 10, 10]], [0.9, 0.8], [0, 0])]
    metric = measure((found, targets))
    assert metric.compute() == dict.fromkeys(SCORES, 1.0)  # as a miss it would halve the precision
    assert metric.per_class()["cat"]["objects"] == 1
    found = [detections([box], [0.9], [0])]
    assert measure((found, targets)).compute() == dict.fromkeys(
        SCORES, 0.0
    )  # as a hit it would count


def test_zero_detections_score_zero():
    _, targets = random_scene(8)
    metric = measure(([detections([], [], []) for _ in targets], targets))
    assert metric.compute() == dict.fromkeys(SCORES, 0.0)
    assert metric.official()["AP50-95"] == 0.0
    assert metric.detections_json() == []


def test_no_objects_at_all_score_zero_and_classes_say_so():
    for scene in [([], []), ([detections([[0, 0, 9, 9]], [0.5], [1])], [target("a", [], [])])]:
        metric = measure(scene)
        assert metric.compute() == dict.fromkeys(SCORES, 0.0)
        assert metric.official()["AP50-95"] == -1
        assert all(
            math.isnan(row["VOC"]) and row["objects"] == 0 for row in metric.per_class().values()
        )


def test_a_class_without_objects_is_left_out_of_the_mean():
    found = [
        detections([[0, 0, 10, 10], [0, 0, 10, 10], [0, 0, 10, 10]], [0.9, 0.8, 0.7], [0, 1, 2])
    ]
    metric = measure(
        (found, [target("a", [[0, 0, 10, 10], [0, 0, 10, 10]], [0, 1], [False, True])])
    )
    assert metric.compute() == dict.fromkeys(SCORES, 1.0)
    assert math.isnan(metric.per_class()["dog"]["AP50"])  # only a difficult object
    assert math.isnan(metric.per_class()["bird"]["AP50"])


def test_official_table_agrees_and_is_silent(capsys):
    for name in ("random 0", "ties 0", "crowded 1"):
        metric = measure(SCENES[name])
        official, computed = metric.official(), metric.compute()
        assert [official[k] for k in ("AP50-95", "AP50", "AP75")] == pytest.approx(
            [computed[k] for k in ("AP50-95", "AP50", "AP75")], abs=1e-12
        )
        assert official["AR1"] <= official["AR10"] <= official["AR100"]
    assert capsys.readouterr().out == ""


def test_official_sizes_follow_the_area_of_the_box():
    # small: 20 x 20 found; medium: 60 x 60 missed; no large object
    found = [detections([[0, 0, 20, 20]], [0.9], [0])]
    table = measure(
        (found, [target("a", [[0, 0, 20, 20], [100, 100, 160, 160]], [0, 0])])
    ).official()
    assert (table["APs"], table["APm"], table["APl"]) == pytest.approx((1.0, 0.0, -1.0))


def test_batches_do_not_matter():
    scene = random_scene(9)
    one, many = measure(scene, batch=1), measure(scene, batch=12)
    many.update([], [])
    assert one.compute() == many.compute()
    assert one.detections_json() == many.detections_json()


def test_half_precision_and_inference_tensors_are_accepted():
    with torch.inference_mode():
        found = {
            k: v.to(torch.bfloat16) if v.is_floating_point() else v
            for k, v in SCENES["ties 0"][0][0].items()
        }
    metric = DetectionMetric(NAMES)
    metric.update([found], [SCENES["ties 0"][1][0]])
    exact = measure((SCENES["ties 0"][0][:1], SCENES["ties 0"][1][:1]))
    assert metric.compute() == exact.compute()  # whole pixels and quarters survive bfloat16


def test_detections_as_json():
    found = [detections([], [], []), detections([[0.123, 1, 2.5, 3]], [0.75], [2])]
    records = measure((found, [target("a", [], []), target("b", [], [])])).detections_json()
    assert json.loads(json.dumps(records)) == [
        {"image_id": "b", "label": "bird", "score": 0.75, "bbox_xyxy": [0.12, 1.0, 2.5, 3.0]}
    ]


def test_wrong_input_is_refused():
    metric = DetectionMetric(NAMES)
    with pytest.raises(UserError, match="detector gives label 4, but the metric knows 4 names"):
        metric.update([detections([[0, 0, 1, 1]], [0.5], [4])], [target("a", [], [])])
    with pytest.raises(UserError, match="dataset gives label -1"):
        metric.update([detections([], [], [])], [target("a", [[0, 0, 1, 1]], [-1])])
    with pytest.raises(ValueError, match="1 detections for 0 targets"):
        metric.update([detections([], [], [])], [])
    assert metric.image_ids == []
