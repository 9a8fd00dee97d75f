"""An ONNX model is the network: read and run by onnxruntime."""

import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from kdmini.checkpoint import save_best
from kdmini.contracts import UserError
from kdmini.detection.yolo11.model import YOLO11, decode_maps
from kdmini.tools.export import How, export
from kdmini.tools.export_boxes import Decoded
from kdmini.tools.export_form import Trial, answers
from kdmini.tools.export_onnx import compare, to_onnx
from tests.conftest import ROOT
from tests.tools.exports import ANCHORS, IMGSZ, NAMES, detector, needs_onnx, onnx_session, refusal


@pytest.fixture(scope="module")
def model() -> YOLO11:
    return detector()


@pytest.fixture(scope="module")
def weights(model: YOLO11, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "best.pt"
    save_best(path, model, IMGSZ, 0, 0.5)
    return path


class Exported(NamedTuple):
    path: Path
    out: str  # what was printed
    err: str


@pytest.fixture(scope="module")
def onnx(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """In a process of its own, so that all is caught that libraries print."""
    needs_onnx()
    path = tmp_path_factory.mktemp("onnx") / "new" / "model.onnx"
    command = [sys.executable, "-m", "kdmini.tools.export", weights, "--to", "onnx", "--out", path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return Exported(path, done.stdout, done.stderr)


def test_onnx_gives_the_outputs_of_the_detector_at_any_batch(model: YOLO11, onnx: Exported) -> None:
    session = onnx_session(onnx.path)
    for count in (1, 3):
        images = torch.rand(count, 3, IMGSZ, IMGSZ)
        boxes_xyxy, scores = session.run(["boxes_xyxy", "scores"], {"images": images.numpy()})
        with torch.no_grad():
            expected_boxes, expected_scores = decode_maps(model(images))
        assert boxes_xyxy.shape == (count, ANCHORS, 4)
        assert scores.shape == (count, ANCHORS, len(NAMES))
        np.testing.assert_allclose(boxes_xyxy, expected_boxes, atol=1e-3)
        np.testing.assert_allclose(scores, expected_scores, atol=1e-5)


def test_the_first_output_has_centres_sides_and_scores_in_rows(onnx: Exported) -> None:
    session = onnx_session(onnx.path)
    images = torch.rand(2, 3, IMGSZ, IMGSZ).numpy()
    fused, boxes_xyxy, scores = session.run(None, {"images": images})
    assert session.get_outputs()[0].name == "output0"
    assert fused.shape == (2, 4 + len(NAMES), ANCHORS)
    low, high = np.split(boxes_xyxy, 2, axis=2)
    expected = np.concatenate([(low + high) / 2, high - low, scores], 2)
    np.testing.assert_allclose(fused, expected.transpose(0, 2, 1), rtol=1e-5, atol=1e-4)


def test_onnx_says_what_the_detector_is(onnx: Exported) -> None:
    metadata = onnx_session(onnx.path).get_modelmeta().custom_metadata_map
    assert json.loads(metadata["names"]) == NAMES
    assert metadata["imgsz"] == str(IMGSZ)
    assert metadata["license"] == "AGPL-3.0"


def test_of_the_exporter_nothing_is_heard_or_left_behind(onnx: Exported) -> None:
    assert onnx.err == ""
    of_weights, comparison, of_file = onnx.out.splitlines()
    assert "best.pt: " in of_weights
    assert comparison.startswith("largest difference")
    assert of_file.startswith(f"{onnx.path}: ")
    assert [path.name for path in onnx.path.parent.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize("spoil_boxes, spoil_scores", [(1.0, 0.01), (torch.nan, 0.0)])
def test_a_model_that_is_not_the_detector_is_refused(
    model: YOLO11, onnx: Exported, spoil_boxes: float, spoil_scores: float
) -> None:
    images = torch.rand(3, 3, IMGSZ, IMGSZ)
    trial = Trial("in a batch of 3", [images])
    form = Decoded(model)
    fused, boxes_xyxy, scores = true = answers(form, trial)
    content = onnx.path.read_bytes()
    compare(content, form, [trial], [true])
    spoilt = np.concatenate([fused[:, :4] * spoil_boxes, fused[:, 4:] + spoil_scores], 1)
    for expected in (
        [fused, boxes_xyxy * spoil_boxes, scores + spoil_scores],
        [spoilt, boxes_xyxy, scores],
    ):
        with pytest.raises(UserError, match="not the network"):
            compare(content, form, [trial], [expected])


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_a_package_that_is_missing_is_named(
    model: YOLO11, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    for name in ("onnx", "onnxscript"):  # whatever is installed, the other one is there
        monkeypatch.setitem(sys.modules, name, sys)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"{package}: pip install -e '\.\[export\]'"):
        to_onnx(model, Decoded(model), IMGSZ, {})


def test_one_image_of_one_size_in_half_the_bytes(
    model: YOLO11, weights: Path, onnx: Exported, tmp_path: Path
) -> None:
    path = export(str(weights), "onnx", tmp_path / "a.onnx", how=How(free="none", half=True))
    assert path.stat().st_size < 0.75 * onnx.path.stat().st_size
    session = onnx_session(path)
    (wanted,) = session.get_inputs()
    assert wanted.shape == [1, 3, IMGSZ, IMGSZ]
    assert wanted.type == "tensor(float)"
    images = torch.rand(1, 3, IMGSZ, IMGSZ)
    boxes_xyxy, scores = session.run(["boxes_xyxy", "scores"], {"images": images.numpy()})
    with torch.no_grad():
        expected_boxes, expected_scores = decode_maps(model(images))
    np.testing.assert_allclose(boxes_xyxy, expected_boxes, atol=2)
    np.testing.assert_allclose(scores, expected_scores, atol=0.02)
    assert np.abs(scores - expected_scores.numpy()).max() > 1e-5  # it is fp16


def test_what_the_exporter_cannot_make_is_one_line(
    model: YOLO11, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_onnx()
    error = RuntimeError("Advice for developers")
    error.__cause__ = ValueError("Unsupported operator\nwith many\nlines")
    monkeypatch.setattr(torch.onnx, "export", Mock(side_effect=error))
    line = refusal(weights, "--to", "onnx", "--free", "all", "--out", tmp_path / "a.onnx")
    assert "cannot be made ONNX so ('Unsupported operator')" in line
    assert "leave out --free" in line
    assert not list(tmp_path.iterdir())
