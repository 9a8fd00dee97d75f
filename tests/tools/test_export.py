"""What is exported is the detector: read back by readers that are not the writer."""

import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from kdmini.checkpoint import save_best
from kdmini.classification.wide_resnet import WideResNet
from kdmini.contracts import UserError
from kdmini.detection.yolo11.model import YOLO11, decode_maps
from kdmini.segmentation.fast_scnn import FastSCNN
from kdmini.tools import export as tool
from kdmini.tools.export import main, to_onnx, to_safetensors
from kdmini.tools.export_boxes import Decoded
from kdmini.tools.export_classes import Scored
from kdmini.tools.export_masks import Upsampled
from tests.conftest import ROOT

NAMES = ["cup", "잔", 'a "b"']
IMGSZ = 64
ANCHORS = 8 * 8 + 4 * 4 + 2 * 2  # of IMGSZ


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
    save_best(path, model, IMGSZ, 0, 0.5)
    return path


@pytest.fixture(scope="module")
def safetensors(weights: Path) -> bytes:
    main([str(weights), "--to", "safetensors"])
    return weights.with_suffix(".safetensors").read_bytes()


def read_safetensors(content: bytes) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """By the specification: every byte of the file belongs to the header or to one tensor."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    body = content[8 + length :]
    metadata = header.pop("__metadata__")
    position = 0
    tensors = {}
    for key, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, end = entry["data_offsets"]
        assert start == position <= end
        layout = {"F32": "<f4", "I64": "<i8"}[entry["dtype"]]
        array = np.frombuffer(body[start:end], layout)
        tensors[key] = torch.tensor(array).reshape(entry["shape"])
        position = end
    assert position == len(body)
    return tensors, metadata


def test_safetensors_hold_the_state_under_its_own_keys(model: YOLO11, safetensors: bytes) -> None:
    tensors, _ = read_safetensors(safetensors)
    other = YOLO11(NAMES, model.scale).eval()
    other.load_state_dict(tensors, strict=True)
    for key, value in model.state_dict().items():
        assert tensors[key].dtype == value.dtype
    images = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        assert all(map(torch.equal, other(images), model(images)))


def test_safetensors_say_what_the_detector_is(model: YOLO11, safetensors: bytes) -> None:
    _, metadata = read_safetensors(safetensors)
    assert json.loads(metadata["names"]) == NAMES
    assert json.loads(metadata["scale"]) == model.scale
    assert metadata["sppf_act"] == "true"
    assert metadata["license"] == "AGPL-3.0"
    assert metadata["imgsz"] == str(IMGSZ)
    assert {type(value) for value in metadata.values()} == {str}


def test_safetensors_are_laid_out_as_specified() -> None:
    state = {"a": torch.tensor([[1.0, -2.0]]).T, "n": torch.tensor(3)}
    content = to_safetensors(state, {"k": "v"})
    length = int.from_bytes(content[:8], "little")
    assert length % 8 == 0
    assert content[8:9] == b"{"
    assert json.loads(content[8 : 8 + length]) == {
        "__metadata__": {"format": "pt", "k": "v"},
        "a": {"dtype": "F32", "shape": [2, 1], "data_offsets": [0, 8]},
        "n": {"dtype": "I64", "shape": [], "data_offsets": [8, 16]},
    }
    assert content[8 + length :] == bytes.fromhex("0000803f 000000c0 0300000000000000")


class Exported(NamedTuple):
    path: Path
    out: str  # what was printed
    err: str


@pytest.fixture(scope="module")
def onnx(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """In a process of its own, so that all is caught that libraries print."""
    pytest.importorskip("onnxscript", reason="kdmini[export] is not installed")
    pytest.importorskip("onnxruntime", reason="kdmini[export] is not installed")
    path = tmp_path_factory.mktemp("onnx") / "new" / "model.onnx"
    command = [sys.executable, "-m", "kdmini.tools.export", weights, "--to", "onnx", "--out", path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return Exported(path, done.stdout, done.stderr)


def onnx_session(path: Path):
    import onnxruntime

    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


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
    with torch.no_grad():
        fused, boxes_xyxy, scores = Decoded(model)(images)
    content = onnx.path.read_bytes()
    tool.compare(content, images, [fused, boxes_xyxy, scores], Decoded(model))
    spoilt = torch.cat([fused[:, :4] * spoil_boxes, fused[:, 4:] + spoil_scores], 1)
    for expected in (
        [fused, boxes_xyxy * spoil_boxes, scores + spoil_scores],
        [spoilt, boxes_xyxy, scores],
    ):
        with pytest.raises(UserError, match="not the network"):
            tool.compare(content, images, expected, Decoded(model))


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_a_package_that_is_missing_is_named(
    model: YOLO11, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    for name in ("onnx", "onnxscript"):  # whatever is installed, the other one is there
        monkeypatch.setitem(sys.modules, name, sys)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"{package}: pip install -e '\.\[export\]'"):
        to_onnx(model, Decoded(model), IMGSZ, {})


def refusal(*args: object) -> str:
    """The line that an export to safetensors ends with."""
    with pytest.raises(SystemExit) as left:
        main([*map(str, args), "--to", "safetensors"])
    line = left.value.code
    assert isinstance(line, str)
    assert line.startswith("error: ")
    assert "\n" not in line
    return line


def test_weights_are_not_written_over(weights: Path) -> None:
    before = weights.read_bytes()
    assert "name a file that ends in .safetensors" in refusal(weights, "--out", weights)
    assert weights.read_bytes() == before


def test_wrong_input_is_one_line(weights: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file")
    (tmp_path / "taken.safetensors").mkdir()
    assert "cannot be made" in refusal(weights, "--out", tmp_path / "file" / "a.safetensors")
    assert "cannot write" in refusal(weights, "--out", tmp_path / "taken.safetensors")
    assert "missing.pt" in refusal(tmp_path / "missing.pt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "taken.safetensors"]


@pytest.mark.parametrize("imgsz", ["0", "-32", "100", "1000000000", "many"])
def test_an_image_size_out_of_range_is_refused_by_the_command_line(
    weights: Path, imgsz: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([str(weights), "--to", "safetensors", f"--imgsz={imgsz}"])
    assert capsys.readouterr().err.splitlines()[-1].find("argument --imgsz: ") > 0


# --- networks for segmentation


@pytest.fixture(scope="module")
def segmenter() -> FastSCNN:
    """BatchNorm has statistics of its own."""
    torch.manual_seed(0)
    network = FastSCNN(NAMES)
    with torch.no_grad():
        for _ in range(20):
            network.train()(torch.rand(8, 3, IMGSZ, IMGSZ))
    return network.eval()


def test_onnx_gives_the_logits_of_every_pixel(
    segmenter: FastSCNN, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxscript", reason="kdmini[export] is not installed")
    pytest.importorskip("onnxruntime", reason="kdmini[export] is not installed")
    save_best(tmp_path / "best.pt", segmenter, IMGSZ, 0, 0.5)
    main([str(tmp_path / "best.pt"), "--to", "onnx"])
    assert "another class in 0.00% of pixels" in capsys.readouterr().out

    session = onnx_session(tmp_path / "best.onnx")
    images = torch.rand(3, 3, IMGSZ, IMGSZ)
    (logits,) = session.run(["logits"], {"images": images.numpy()})
    with torch.no_grad():
        coarse = segmenter(images)[0]
    expected = torch.nn.functional.interpolate(coarse, (IMGSZ, IMGSZ), mode="bilinear")
    np.testing.assert_allclose(logits, expected, atol=1e-4)

    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["names"]) == NAMES
    assert json.loads(metadata["palette"]) == [[0, 0, 0], [128, 0, 0], [0, 128, 0]]
    assert metadata["network"] == "Fast-SCNN"
    assert metadata["imgsz"] == str(IMGSZ)


@pytest.mark.parametrize("spoil", [1.01, torch.nan])
def test_logits_that_are_not_those_of_the_network_are_told(
    segmenter: FastSCNN, spoil: float
) -> None:
    with torch.no_grad():
        logits = Upsampled(segmenter)(torch.rand(2, 3, IMGSZ, IMGSZ)).numpy()
    form = Upsampled(segmenter)
    assert form.difference([logits], [logits])[1]
    assert not form.difference([logits], [logits * spoil])[1]


def test_safetensors_of_a_segmenter_hold_its_state(segmenter: FastSCNN, tmp_path: Path) -> None:
    save_best(tmp_path / "best.pt", segmenter, IMGSZ, 0, 0.5)
    main([str(tmp_path / "best.pt"), "--to", "safetensors"])
    tensors, metadata = read_safetensors((tmp_path / "best.safetensors").read_bytes())
    assert tensors.keys() == segmenter.state_dict().keys()
    for key, value in segmenter.state_dict().items():
        assert torch.equal(tensors[key], value)
    assert json.loads(metadata["names"]) == NAMES


# --- classifiers


def test_onnx_gives_logits_and_scores_of_classes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxscript", reason="kdmini[export] is not installed")
    pytest.importorskip("onnxruntime", reason="kdmini[export] is not installed")
    torch.manual_seed(0)
    network = WideResNet(NAMES, 10)
    with torch.no_grad():
        for _ in range(20):
            network.train()(torch.rand(8, 3, 32, 32))
    save_best(tmp_path / "best.pt", network.eval(), 32, 0, 0.5)
    main([str(tmp_path / "best.pt"), "--to", "onnx"])
    assert "largest difference from PyTorch" in capsys.readouterr().out

    session = onnx_session(tmp_path / "best.onnx")
    for count in (1, 3):
        images = torch.rand(count, 3, 32, 32)
        logits, scores = session.run(["logits", "scores"], {"images": images.numpy()})
        with torch.no_grad():
            expected = network(images)
        np.testing.assert_allclose(logits, expected, atol=1e-4)
        decoded = [prediction["scores"] for prediction in network.decode(expected)]
        np.testing.assert_allclose(scores, np.stack(decoded), atol=1e-5)
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["names"]) == NAMES
    assert metadata["network"] == "WRN"


@pytest.mark.parametrize("which", [0, 1])
def test_classes_that_are_not_those_of_the_network_are_told(which: int) -> None:
    form = Scored(WideResNet(NAMES, 10).eval())
    with torch.no_grad():
        outputs = [output.numpy() for output in form(torch.rand(2, 3, 32, 32))]
    assert form.difference(outputs, outputs)[1]
    for spoil in (1.01, np.nan):
        spoilt = list(outputs)
        spoilt[which] = outputs[which] * spoil
        assert not form.difference(spoilt, outputs)[1]
