"""The pictures of detections: where boxes lie, and what they are called."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from kdmini.data.store import Store
from kdmini.detection.average_precision import DetectionMetric
from kdmini.detection.truth import Boxes
from kdmini.tools.photographs import Photographs

pytest.importorskip("matplotlib")
from kdmini.tools import detections
from kdmini.tools.scenes import Material, spread_scenes

CIRCLE = 0
SQUARE = 1
SIZE = 64  # pixels, of the letterboxed images


class Object(NamedTuple):
    box_xyxy: Sequence[float]
    label: int
    difficult: bool = False


class Detection(NamedTuple):
    box_xyxy: Sequence[float]  # input pixels
    score: float
    label: int


class Fixed:
    """A detector that detects the same in every image."""

    names = ("circle", "square")

    def __init__(self, *rows: Detection):
        self.rows = rows

    def eval(self) -> "Fixed":
        return self

    def __call__(self, images: torch.Tensor) -> int:
        return len(images)

    def decode(self, preds: int, score: float, iou: float, max_det: int) -> list[dict]:
        rows = [row for row in self.rows if row.score > score]
        return [prediction(*rows)] * preds


def prediction(*rows: Detection) -> dict[str, torch.Tensor]:
    boxes_xyxy = torch.tensor([row.box_xyxy for row in rows], dtype=torch.float32)
    return {
        "boxes_xyxy": boxes_xyxy.reshape(-1, 4),
        "scores": torch.tensor([row.score for row in rows]),
        "labels": torch.tensor([row.label for row in rows], dtype=torch.int64),
    }


def target(*rows: Object) -> dict:
    boxes_xyxy = np.array([row.box_xyxy for row in rows], np.float32)
    return {
        "boxes_xyxy": boxes_xyxy.reshape(-1, 4),
        "labels": np.array([row.label for row in rows], int),
        "difficult": np.array([row.difficult for row in rows], bool),
        "id": "a",
    }


def rectangles(axis) -> list[list[float]]:
    boxes = [patch.get_bbox().extents.tolist() for patch in axis.patches]
    return sorted([round(side, 3) for side in box] for box in boxes)


def test_hits_misses_and_false_alarms_are_told_apart() -> None:
    objects = target(
        Object([0, 0, 10, 10], CIRCLE),
        Object([20, 0, 30, 10], CIRCLE, difficult=True),
        Object([40, 0, 50, 10], SQUARE),
        Object([60, 0, 70, 10], SQUARE),
    )
    rows = [
        ([0, 0, 10, 9], CIRCLE, "hit"),
        ([0, 0, 10, 10], CIRCLE, "false alarm"),  # that object is found already
        ([20, 0, 30, 10], CIRCLE, "difficult"),
        ([21, 0, 30, 10], CIRCLE, "difficult"),  # as often as it likes
        ([40, 0, 50, 10], CIRCLE, "false alarm"),  # another class
        ([44, 0, 54, 10], SQUARE, "false alarm"),  # IoU 0.43
        ([63, 0, 73, 10], SQUARE, "hit"),  # 0.54
    ]
    scores = np.linspace(0.9, 0.3, len(rows))
    detected = [
        Detection(box, score, label) for (box, label, _), score in zip(rows, scores, strict=True)
    ]
    judged = detections.judge(prediction(*detected), objects)
    assert judged.detections == [kind for _, _, kind in rows]
    assert judged.objects == ["hit", "difficult", "missed", "hit"]


def test_nothing_found_and_nothing_there() -> None:
    none = prediction()
    one = prediction(Detection([0, 0, 9, 9], 0.9, CIRCLE))
    assert detections.judge(none, target()) == ([], [])
    assert detections.judge(one, target()) == (["false alarm"], [])
    assert detections.judge(none, target(Object([0, 0, 9, 9], CIRCLE))) == ([], ["missed"])


def test_detections_lie_where_they_are_in_the_file(tmp_path: Path) -> None:
    """A picture of 100 x 50 is letterboxed to 64 x 32, 16 below the top of the square."""
    path = tmp_path / "wide.png"
    Image.new("RGB", (100, 50)).save(path)
    store = Store(Photographs([path], ["wide"], Boxes), SIZE)
    scenes = spread_scenes(store, 1)
    objects = target(Object([0, 0, 50, 50], CIRCLE), Object([60, 0, 99, 50], CIRCLE))
    scenes = scenes._replace(targets=[objects])
    detector = Fixed(
        Detection([0, 16, 32, 48], 0.91, CIRCLE),
        Detection([0, 16, 16, 32], 0.4, SQUARE),
        Detection([0, 0, 9, 9], 0.2, CIRCLE),  # of too low a score
    )
    figure = detections.detections(detector, scenes, "x")
    truth, detected, *_ = figure.axes
    assert rectangles(truth) == [[0, 0, 50, 50], [60, 0, 99, 50]]
    assert rectangles(detected) == [[0, 0, 25, 25], [0, 0, 50, 50]]
    assert {text.get_text() for text in detected.texts} == {"circle 0.91", "square 0.40"}

    # hit, missed and false alarm: each kind has a colour and a line style of its own
    patches = [*truth.patches, *detected.patches]
    looks = {(patch.get_edgecolor(), patch.get_linestyle()) for patch in patches}
    colours = {colour for colour, _ in looks}
    line_styles = {line_style for _, line_style in looks}
    assert len(looks) == len(colours) == len(line_styles) == 3
    figure.draw_without_rendering()
    (legend,) = figure.legends
    extent = legend.get_window_extent()
    assert figure.bbox.x0 <= extent.x0 < extent.x1 <= figure.bbox.x1

    assert detected.get_xlim() == (0, 100)
    assert detected.get_ylim() == (50, 0)
    assert detected.images[0].get_extent() == [0, 100, 75, -25]

    unknown = scenes._replace(annotated=False)
    alone, *others = detections.detections(detector, unknown, "x").axes
    assert not others
    assert rectangles(alone) == rectangles(detected)


def test_the_area_under_a_curve_is_the_average_precision() -> None:
    rng = np.random.default_rng(0)
    metric = DetectionMetric(["circle", "square", "triangle", "nothing"])
    for n in range(20):
        corners = rng.uniform(0, 50, (6, 2))
        boxes_xyxy = np.hstack([corners, corners + rng.uniform(10, 30, (6, 2))]).astype(np.float32)
        labels = rng.integers(0, 3, 6)
        difficult = rng.uniform(size=6) < 0.2
        truth = {"boxes_xyxy": boxes_xyxy, "labels": labels, "difficult": difficult, "id": str(n)}
        moved = boxes_xyxy + rng.normal(0, 2.5, (6, 4)).astype(np.float32)
        scores = np.sort(rng.uniform(size=6))[::-1].copy()
        detected = {
            "boxes_xyxy": torch.from_numpy(moved),
            "scores": torch.from_numpy(scores),
            "labels": torch.from_numpy(labels),
        }
        metric.update([detected], [truth])

    figure = detections.precision_recall(metric)
    assert f"{metric.compute()['VOC']:.3f}" in figure.get_suptitle()
    for axis, (name, scores) in zip(figure.axes, metric.per_class().items(), strict=False):
        if name == "nothing":
            assert axis.get_title() == "nothing: no objects"
            assert not axis.lines
            continue
        recall, precision = axis.lines[0].get_data()
        area = (np.diff(recall) * precision[1:]).sum()
        assert area == pytest.approx(scores["VOC"])
        assert 0.2 < scores["VOC"] < 0.95
        assert axis.get_title() == f"{name}: AP {scores['VOC']:.2f}, {scores['objects']} objects"


def test_the_confusion_has_a_row_and_a_column_for_nothing() -> None:
    metric = DetectionMetric(["circle", "square"])
    found = prediction(Detection([0, 0, 9, 9], 0.9, SQUARE), Detection([50, 0, 59, 9], 0.8, CIRCLE))
    metric.update([found], [target(Object([0, 0, 9, 9], CIRCLE), Object([0, 50, 9, 59], CIRCLE))])
    figure = detections.confusion(metric)
    axis = figure.axes[0]
    assert axis.images[0].get_array().tolist() == [[0, 0.5, 0.5], [0, 0, 0], [1, 0, 0]]
    assert [text.get_text() for text in axis.get_xticklabels()] == ["circle", "square", "not found"]
    rows = [text.get_text() for text in axis.get_yticklabels()]
    assert rows == ["circle, 2", "square, 0", "nothing"]


def test_what_is_not_there_is_not_drawn() -> None:
    assert not list(detections.figures(Material()))
    metric = DetectionMetric(["circle"])
    drawn = [name for name, _ in detections.figures(Material(metric=metric))]
    assert drawn == ["precision_recall", "confusion"]
