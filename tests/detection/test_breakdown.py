"""Where scores come from: on paper, by pycocotools, and in loops."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from kdmini.detection.breakdown import SHOWN
from tests.detection.kinds_in_loops import iou, judged, things_of
from tests.detection.reference_scores import detections_of
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
SQUARE = [0, 0, 10, 10]
FAR = [50, 50, 60, 60]
NOTHING = len(NAMES)


def enlarged(scene: Scene, factor: float) -> Scene:
    """Sides of the boxes are 8 to 40 pixels before."""
    found = [{**one, "boxes_xyxy": one["boxes_xyxy"] * factor} for one in scene[0]]
    targets = [{**one, "boxes_xyxy": one["boxes_xyxy"] * np.float32(factor)} for one in scene[1]]
    return found, targets


SIZED = {f"{seed}": enlarged(random_scene(seed), 3.2) for seed in range(4)}
SIZED["bounds"] = enlarged(random_scene(9, grid=True), 3.2)  # sides of 32, 64, 96 pixels


# --- size and IoU


@pytest.mark.parametrize("name", SIZED)
def test_ap_by_size_is_pycocotools(name: str) -> None:
    metric = measure(SIZED[name])
    official = metric.official()
    table = metric.analysis()["size"]
    for size, key in (("small", "APs"), ("medium", "APm"), ("large", "APl")):
        expected = official[key] if official[key] >= 0 else math.nan
        assert table[size]["AP50-95"] == pytest.approx(expected, abs=1e-9, nan_ok=True), size
    assert 0 < table["medium"]["AP50-95"] < 1


@pytest.mark.parametrize("name", SCENES)
def test_the_mean_over_iou_is_the_score(name: str) -> None:
    metric = measure(SCENES[name])
    table = metric.analysis()["IoU"]
    scores = metric.compute()
    assert list(table) == [f"{0.5 + 0.05 * step:.2f}" for step in range(10)]
    aps = [row["AP"] for row in table.values()]
    assert aps[0] == pytest.approx(scores["AP50"])
    assert aps[5] == pytest.approx(scores["AP75"])
    assert np.mean(aps) == pytest.approx(scores["AP50-95"])


def test_without_objects_there_is_no_ap() -> None:
    table = measure(([detections([SQUARE], [0.9], [CAT])], [target("a", [], [])])).analysis()
    assert all(math.isnan(row["AP"]) for row in table["IoU"].values())
    assert all(math.isnan(row["AP50-95"]) for row in table["size"].values())


# --- confusion


def test_confusion_on_paper() -> None:
    # the dog is surer and takes the cat's place; the cat's detection, of nothing left, is stray
    found = detections(
        [SQUARE, [0, 0, 10, 9], FAR, [80, 80, 90, 90]],
        [0.9, 0.8, SHOWN, 0.2],
        [DOG, CAT, CAT, CAT],
    )
    truth = target("a", [SQUARE, FAR, [0, 80, 10, 90]], [CAT, CAT, DOG])
    matrix = measure(([found], [truth])).confusion()
    assert matrix.sum() == 4
    assert matrix[CAT, DOG] == 1
    assert matrix[CAT, CAT] == 1  # a score of SHOWN is shown, one below is not
    assert matrix[DOG, NOTHING] == 1
    assert matrix[NOTHING, CAT] == 1


def test_difficult_objects_are_not_confused() -> None:
    found = detections([SQUARE, FAR], [0.9, 0.8], [DOG, CAT])
    truth = target("a", [SQUARE, FAR], [CAT, CAT], [True, True])
    assert measure(([found], [truth])).confusion().sum() == 0


def confusion_in_loops(scene: Scene) -> np.ndarray:
    things = things_of(scene)
    matrix = np.zeros((NOTHING + 1, NOTHING + 1), int)
    for image, label, score, box in sorted(detections_of(scene), key=lambda row: -row[2]):
        if score < SHOWN:
            continue
        near = [t for t in things if t.image == image and not t.found and iou(box, t.box) >= 0.5]
        if not near:
            matrix[NOTHING, label] += 1
            continue
        best = max(near, key=lambda thing: (not thing.difficult, iou(box, thing.box)))
        best.found = True
        if not best.difficult:
            matrix[best.label, label] += 1
    for thing in things:
        if not thing.found and not thing.difficult:
            matrix[thing.label, NOTHING] += 1
    return matrix


@pytest.mark.parametrize("name", SCENES)
def test_confusion_in_loops(name: str) -> None:
    matrix = measure(SCENES[name]).confusion()
    assert matrix.tolist() == confusion_in_loops(SCENES[name]).tolist()
    assert np.trace(matrix) > 0


# --- calibration


def test_calibration_on_paper() -> None:
    # 0.95 and 0.85 are right, another 0.95 and 0.35 are wrong, 0.05 is in the lowest range
    boxes = [SQUARE, FAR, SQUARE, [80, 80, 90, 90], [80, 80, 90, 90]]
    found = detections(boxes, [0.95, 0.85, 0.95, 0.35, 0.05], [CAT] * 5)
    table = measure(([found], [target("a", [SQUARE, FAR], [CAT, CAT])])).analysis()["calibration"]
    row = table["0.9 to 1.0"]
    assert (row["score"], row["precision"]) == (pytest.approx(0.95), 0.5)
    assert table["0.8 to 0.9"]["apart"] == pytest.approx(0.15)
    assert table["0.3 to 0.4"]["apart"] == pytest.approx(0.35)
    assert table["0.0 to 0.1"]["number"] == 1
    assert math.isnan(table["0.5 to 0.6"]["precision"])
    assert table["all from 0.1"] == {
        "score": pytest.approx(0.775),
        "precision": 0.5,
        "apart": pytest.approx((2 * 0.45 + 0.15 + 0.35) / 4),
        "number": 4,
    }


@pytest.mark.parametrize("name", SCENES)
def test_calibration_in_loops(name: str) -> None:
    guesses, _ = judged(SCENES[name])
    bins: dict[int, list[tuple[float, bool]]] = {}
    for guess in guesses:
        hit = guess.kind == "hit"
        if hit and guess.thing and guess.thing.difficult:
            continue
        bins.setdefault(min(math.floor(guess.score * 10), 9), []).append((guess.score, hit))
    table = measure(SCENES[name]).analysis()["calibration"]
    total = 0.0
    number = 0
    for place, members in bins.items():
        row = list(table.values())[place]
        score = sum(score for score, _ in members) / len(members)
        precision = sum(hit for _, hit in members) / len(members)
        assert row["number"] == len(members)
        assert row["score"] == pytest.approx(score)
        assert row["precision"] == pytest.approx(precision)
        if place:
            total += abs(score - precision) * len(members)
            number += len(members)
    assert table["all from 0.1"]["apart"] == pytest.approx(total / number)


# --- images


def test_the_score_of_an_image_is_f1_of_what_is_shown() -> None:
    # a: one hit, one stray, one missed: 2 / (2 + 2); b: nothing there, nothing said;
    # c: nothing there, something said; d: the difficult object and its detection do not count
    stray = [80, 80, 90, 90]
    found = [
        detections([SQUARE, stray, stray], [0.9, 0.8, 0.1], [CAT] * 3),
        detections([SQUARE], [0.2], [CAT]),
        detections([SQUARE], [0.9], [CAT]),
        detections([SQUARE, FAR], [0.9, 0.8], [CAT, CAT]),
    ]
    targets = [
        target("a", [SQUARE, FAR], [CAT, CAT]),
        target("b", [], []),
        target("c", [], []),
        target("d", [SQUARE, FAR], [CAT, CAT], [True, False]),
    ]
    scores = measure((found, targets)).per_image()
    assert scores == {"a": pytest.approx(0.5), "b": 1, "c": 0, "d": 1}


def test_what_is_saved_is_plain_json(tmp_path: Path) -> None:
    metric = measure(SCENES["sparse"])
    metric.save(tmp_path / "student")
    text = (tmp_path / "student_analysis.json").read_text()
    saved = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert saved["confusion"] == metric.confusion().tolist()
    assert saved["names"] == NAMES
    assert saved["kinds of error"] == metric.analysis()["kinds of error"]
    assert saved["size"]["large"] == {"AP50-95": None, "objects": 0}
