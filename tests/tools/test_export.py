"""What is exported is the detector: read back by readers that are not the writer."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from kdmini.contracts import UserError
from kdmini.detection.yolo11.model import YOLO11, decode_maps
from kdmini.tools import export as tool
from kdmini.tools.export import main, to_onnx, to_safetensors
from train import save_best

NAMES = ["cup", "잔", 'a "b"']


@pytest.fixture(scope="module")
def model() -> YOLO11:
    """BatchNorm has statistics of its own, so that folding it wrongly would show."""
    torch.manual_seed(0)
    model = YOLO11(NAMES, [0.5, 0.0625, 1024])
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, 0, 0.1)
    for level in range(3):
        torch.nn.init.normal_(model.get_parameter(f"model.23.cv3.{level}.2.bias"), -1)
    with torch.no_grad():
        model.train()(torch.rand(8, 3, 128, 128))
    model.license = "AGPL-3.0"
    return model.eval()


@pytest.fixture(scope="module")
def weights(model: YOLO11, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "best.pt"
    save_best(path, model, NAMES, 64, 0, 0.5)
    return path


def read_safetensors(content: bytes) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """By the specification: every byte of the file belongs to the header or to one tensor."""
    length = int.from_bytes(content[:8], "little")
    header, body = json.loads(content[8 : 8 + length]), content[8 + length :]
    about = header.pop("__metadata__")
    at, tensors = 0, {}
    for key, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, end = entry["data_offsets"]
        assert start == at <= end
        array = np.frombuffer(body[start:end], {"F32": "<f4", "I64": "<i8"}[entry["dtype"]])
        tensors[key], at = torch.tensor(array).reshape(entry["shape"]), end
    assert at == len(body)
    return tensors, about


def test_safetensors_hold_the_state_under_its_own_keys(model: YOLO11, weights: Path) -> None:
    main([str(weights), "--to", "safetensors"])
    tensors, about = read_safetensors(weights.with_suffix(".safetensors").read_bytes())
    other = YOLO11(NAMES, model.scale).eval()
    other.load_state_dict(tensors, strict=True)
    assert all(tensors[key].dtype == value.dtype for key, value in model.state_dict().items())
    images = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        assert all(map(torch.equal, other(images), model(images)))
    assert json.loads(about["names"]) == NAMES
    assert json.loads(about["scale"]) == model.scale and about["sppf_act"] == "true"
    assert (about["license"], about["imgsz"]) == ("AGPL-3.0", "64")
    assert {type(value) for value in about.values()} == {str}


def test_safetensors_are_laid_out_as_specified() -> None:
    content = to_safetensors({"a": torch.tensor([[1.0, -2.0]]).T, "n": torch.tensor(3)}, {"k": "v"})
    length = int.from_bytes(content[:8], "little")
    assert length % 8 == 0 and content[8:9] == b"{"
    assert json.loads(content[8 : 8 + length]) == {
        "__metadata__": {"format": "pt", "k": "v"},
        "a": {"dtype": "F32", "shape": [2, 1], "data_offsets": [0, 8]},
        "n": {"dtype": "I64", "shape": [], "data_offsets": [8, 16]},
    }
    assert content[8 + length :] == bytes.fromhex("0000803f 000000c0 0300000000000000")


def test_onnx_gives_the_outputs_of_the_detector_at_any_batch(
    model: YOLO11, weights: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxscript", reason="kdmini[export] is not installed")
    onnxruntime = pytest.importorskip("onnxruntime", reason="kdmini[export] is not installed")
    path = tmp_path / "new" / "model.onnx"
    main([str(weights), "--to", "onnx", "--out", str(path)])
    told = capfd.readouterr()
    assert (
        told.err == "" and len(told.out.splitlines()) == 3
    )  # the weights, the comparison, the file
    assert "largest difference" in told.out and [p.name for p in path.parent.iterdir()] == [
        "model.onnx"
    ]

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    about = session.get_modelmeta().custom_metadata_map
    assert (
        json.loads(about["names"]) == NAMES
        and about["imgsz"] == "64"
        and about["license"] == "AGPL-3.0"
    )
    anchors = 8 * 8 + 4 * 4 + 2 * 2
    for count in (1, 3):
        images = torch.rand(count, 3, 64, 64)
        boxes_xyxy, scores = session.run(["boxes_xyxy", "scores"], {"images": images.numpy()})
        with torch.no_grad():
            wanted_boxes, wanted_scores = decode_maps(model(images))
        assert boxes_xyxy.shape == (count, anchors, 4) and scores.shape == (count, anchors, 3)
        np.testing.assert_allclose(boxes_xyxy, wanted_boxes, atol=1e-3)
        np.testing.assert_allclose(scores, wanted_scores, atol=1e-5)

    with pytest.raises(UserError, match="not the detector"):
        tool.compare(path.read_bytes(), images, (wanted_boxes, wanted_scores + 0.01))
    with pytest.raises(UserError, match="not the detector"):
        tool.compare(path.read_bytes(), images, (wanted_boxes * torch.nan, wanted_scores))


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_a_package_that_is_missing_is_named(
    model: YOLO11, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(
        sys.modules, "onnx", sys
    )  # so that the test does not depend on what is installed
    monkeypatch.setitem(sys.modules, "onnxscript", sys)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"{package}: pip install 'kdmini\[export\]'"):
        to_onnx(model, 64, {})


def test_wrong_input_is_told_in_one_line(weights: Path, tmp_path: Path) -> None:
    def refused(*args: object) -> str:
        with pytest.raises(SystemExit) as left:
            main([*map(str, args), "--to", "safetensors"])
        assert isinstance(left.value.code, str) and left.value.code.startswith("error: ")
        assert "\n" not in left.value.code
        return left.value.code

    before = weights.read_bytes()
    assert ".safetensors" in refused(weights, "--out", weights)
    assert weights.read_bytes() == before
    (tmp_path / "file").write_text("a file")
    assert "cannot be made" in refused(weights, "--out", tmp_path / "file" / "a.safetensors")
    (tmp_path / "taken.safetensors").mkdir()
    assert "cannot write" in refused(weights, "--out", tmp_path / "taken.safetensors")
    assert "missing.pt" in refused(tmp_path / "missing.pt")
    assert "--imgsz: 100" in refused(weights, "--imgsz", 100)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "taken.safetensors"]
