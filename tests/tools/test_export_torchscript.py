"""TorchScript is the network: loaded and run without the classes that it was made of."""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from kdmini.checkpoint import save_best
from kdmini.detection.yolo11.model import YOLO11, decode_maps
from kdmini.segmentation.fast_scnn import FastSCNN
from kdmini.tools.export import How, export
from kdmini.tools.export_boxes import Decoded
from tests.tools.exports import IMGSZ, NAMES, detector, refusal

# it is deprecated, and what many programs load
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit")


@pytest.fixture(scope="module")
def model() -> YOLO11:
    return detector()


@pytest.fixture(scope="module")
def weights(model: YOLO11, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "best.pt"
    save_best(path, model, IMGSZ, 0, 0.5)
    return path


@pytest.mark.parametrize("half, box, score", [(False, 1e-2, 1e-4), (True, 5, 0.05)])
def test_it_gives_the_outputs_of_the_detector_at_any_batch(
    model: YOLO11, weights: Path, half: bool, box: float, score: float
) -> None:
    path = export(str(weights), "torchscript", how=How(half=half))
    facts = {"config.txt": ""}
    read = torch.jit.load(path, _extra_files=facts)
    for count in (1, 3):
        images = torch.rand(count, 3, IMGSZ, IMGSZ)
        with torch.no_grad():
            fused, boxes_xyxy, scores = read(images)
            expected_boxes, expected_scores = decode_maps(model(images))
        assert fused.shape[1] == 4 + len(NAMES)
        np.testing.assert_allclose(boxes_xyxy, expected_boxes, atol=box)
        np.testing.assert_allclose(scores, expected_scores, atol=score)
        assert ((scores - expected_scores).abs().max() > 1e-4) == half
    with zipfile.ZipFile(path) as archive:
        code = [archive.read(name) for name in archive.namelist() if name.endswith(".py")]
    assert b"arange" in b"".join(code)
    assert b'device("' not in b"".join(code)  # it goes wherever its images are
    metadata = json.loads(facts["config.txt"])
    assert json.loads(metadata["names"]) == NAMES
    assert metadata["imgsz"] == str(IMGSZ)
    assert metadata["task"] == "detect"


def test_it_gives_the_logits_of_every_pixel(tmp_path: Path) -> None:
    torch.manual_seed(0)
    segmenter = FastSCNN(NAMES)
    with torch.no_grad():
        for _ in range(20):
            segmenter.train()(torch.rand(8, 3, IMGSZ, IMGSZ))
    save_best(tmp_path / "best.pt", segmenter.eval(), IMGSZ, 0, 0.5)
    read = torch.jit.load(export(str(tmp_path / "best.pt"), "torchscript"))
    images = torch.rand(3, 3, IMGSZ, IMGSZ)
    with torch.no_grad():
        coarse = segmenter(images)[0]
        logits = read(images)
    expected = torch.nn.functional.interpolate(coarse, (IMGSZ, IMGSZ), mode="bilinear")
    np.testing.assert_allclose(logits, expected, atol=1e-4)


def test_what_is_not_the_network_is_not_written(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Decoded, "difference", lambda *_: ("9.9e+01 px", False))
    line = refusal(weights, "--to", "torchscript", "--out", tmp_path / "new" / "a.torchscript")
    assert "not the network" in line
    assert "9.9e+01 px" in line
    assert not list(tmp_path.iterdir())
