"""A detector with non-maximum suppression inside gives the detections of its decode."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from kdmini.checkpoint import save_best
from kdmini.detection.yolo11.model import YOLO11
from kdmini.tools.export import How, export
from kdmini.tools.export_nms import MAX_DET, Suppressed
from tests.tools.exports import IMGSZ, NAMES, detector, needs_onnx, onnx_session

IOU = 0.5


@pytest.fixture(scope="module")
def model() -> YOLO11:
    """Scores are about the least of decode: above and below it."""
    return detector(bias=-6)


@pytest.fixture(scope="module")
def onnx(model: YOLO11, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of free sides."""
    needs_onnx()
    folder = tmp_path_factory.mktemp("nms")
    save_best(folder / "best.pt", model, IMGSZ, 0, 0.5)
    return export(str(folder / "best.pt"), "onnx", how=How(free="all", nms=True, iou=IOU))


@pytest.mark.parametrize("shape", [(1, 64, 64), (3, 96, 64), (2, 160, 192)])
def test_onnx_gives_the_detections_of_decode(
    model: YOLO11, onnx: Path, shape: tuple[int, int, int]
) -> None:
    count, height, width = shape
    seeded = torch.Generator().manual_seed(height)
    images = torch.rand(count, 3, height, width, generator=seeded)
    outputs = ["boxes_xyxy", "scores", "labels"]
    boxes_xyxy, scores, labels = onnx_session(onnx).run(outputs, {"images": images.numpy()})
    assert boxes_xyxy.shape == (count, MAX_DET, 4)
    with torch.no_grad():
        preds = model(images)
    for image, expected in enumerate(model.decode(preds, iou=IOU)):
        many = len(expected["scores"])
        assert many > 5
        np.testing.assert_allclose(scores[image, :many], expected["scores"], atol=1e-4)
        apart = np.abs(
            rows(boxes_xyxy[image, :many], scores[image, :many], labels[image, :many])[:, None]
            - rows(expected["boxes_xyxy"], expected["scores"], expected["labels"])[None]
        )
        # where scores are equal, such as 1.0, any order is right
        alike = (apart <= [0.05, 0.05, 0.05, 0.05, 1e-4, 0]).all(2)
        assert alike.any(0).all()
        assert alike.any(1).all()
        assert (labels[image, many:] == -1).all()
        assert not scores[image, many:].any()
        assert not boxes_xyxy[image, many:].any()


def rows(*parts: np.ndarray | torch.Tensor) -> np.ndarray:
    """Boxes, scores and labels of D detections -> (D, 6)."""
    return np.column_stack([np.asarray(part) for part in parts])


def test_the_first_output_has_corners_score_and_class(onnx: Path) -> None:
    session = onnx_session(onnx)
    images = torch.rand(2, 3, IMGSZ, IMGSZ).numpy()
    fused, boxes_xyxy, scores, labels = session.run(None, {"images": images})
    assert session.get_outputs()[0].name == "output0"
    expected = np.concatenate([boxes_xyxy, scores[..., None], labels[..., None]], 2)
    np.testing.assert_array_equal(fused, expected.astype(np.float32))


def test_the_model_is_of_standard_operators(onnx: Path) -> None:
    import onnx as package

    read = package.load(onnx)
    domains = {node.domain for node in read.graph.node}
    assert domains <= {"", "ai.onnx"}
    assert [node.op_type for node in read.graph.node].count("NonMaxSuppression") == 1
    package.checker.check_model(read, full_check=True)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda rows: rows + np.array([1, 0, 0, 0, 0, 0]),
        lambda rows: rows + np.array([0, 0, 0, 0, 0.01, 0]),
        lambda rows: rows + np.array([0, 0, 0, 0, 0, 1]),
        lambda rows: rows * np.nan,
        lambda rows: rows[:, : MAX_DET // 2],
    ],
)
def test_detections_that_are_not_those_of_the_detector_are_told(
    spoil: Callable[[np.ndarray], np.ndarray],
) -> None:
    form = Suppressed(YOLO11(NAMES, [0.5, 0.0625, 1024]), IOU)
    seeded = np.random.default_rng(0)
    corners = seeded.uniform(0, 640, (2, MAX_DET, 4))
    scores = seeded.uniform(0.01, 1, (2, MAX_DET, 1))
    labels = seeded.integers(0, 3, (2, MAX_DET, 1))
    rows = np.concatenate([corners, scores, labels], 2)
    outputs = [rows, corners, scores[..., 0], labels[..., 0]]
    assert form.difference(outputs, outputs)[1]
    spoilt = spoil(rows)
    parts = [spoilt, spoilt[..., :4], spoilt[..., 4], spoilt[..., 5]]
    assert not form.difference(parts, outputs)[1]
    assert not form.difference([spoilt, *outputs[1:]], outputs)[1]
    assert not form.difference([rows, *parts[1:]], outputs)[1]
