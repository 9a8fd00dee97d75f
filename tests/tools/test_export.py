"""What is exported is the detector: read back by readers that are not the writer."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from kdmini.checkpoint import save_best
from kdmini.classification.wide_resnet import WideResNet
from kdmini.detection.yolo11.model import YOLO11
from kdmini.segmentation.fast_scnn import FastSCNN
from kdmini.tools.export import main
from kdmini.tools.export_classes import Scored
from kdmini.tools.export_masks import Upsampled
from kdmini.tools.export_safetensors import to_safetensors
from tests.tools.exports import IMGSZ, NAMES, detector, needs_onnx, onnx_session, refusal


@pytest.fixture(scope="module")
def model() -> YOLO11:
    return detector()


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


TENSORS = ("--to", "safetensors")


def test_weights_are_not_written_over(weights: Path) -> None:
    before = weights.read_bytes()
    line = refusal(weights, *TENSORS, "--out", weights)
    assert "name a file that ends in .safetensors" in line
    line = refusal(weights, "--to", "ultralytics", "--out", weights)
    assert "these are the weights themselves" in line
    assert weights.read_bytes() == before


def test_wrong_input_is_one_line(weights: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file")
    (tmp_path / "taken.safetensors").mkdir()
    below_a_file = tmp_path / "file" / "a.safetensors"
    assert "cannot be made" in refusal(weights, *TENSORS, "--out", below_a_file)
    taken = tmp_path / "taken.safetensors"
    assert "cannot write" in refusal(weights, *TENSORS, "--out", taken)
    assert "missing.pt" in refusal(tmp_path / "missing.pt", *TENSORS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "taken.safetensors"]


@pytest.mark.parametrize(
    "to, option, named",
    [
        ("safetensors", ["--half"], "--half is for --to onnx or torchscript"),
        ("ultralytics", ["--nms"], "--nms is for --to onnx"),
        ("torchscript", ["--nms"], "--nms is for --to onnx"),
        ("torchscript", ["--free", "all"], "--free is for --to onnx"),
        ("onnx", ["--iou", "0.5"], "give --nms too"),
    ],
)
def test_an_option_that_would_change_nothing_is_refused(
    weights: Path, to: str, option: list[str], named: str
) -> None:
    before = sorted(weights.parent.iterdir())
    assert named in refusal(weights, "--to", to, *option)
    assert sorted(weights.parent.iterdir()) == before


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
    needs_onnx()
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
    assert "for detectors" in refusal(tmp_path / "best.pt", "--to", "onnx", "--nms")
    assert "for a YOLO11" in refusal(tmp_path / "best.pt", "--to", "ultralytics")
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
    needs_onnx()
    torch.manual_seed(0)
    network = WideResNet(NAMES, 10)
    with torch.no_grad():
        for _ in range(20):
            network.train()(torch.rand(8, 3, 32, 32))
    save_best(tmp_path / "best.pt", network.eval(), 32, 0, 0.5)
    main([str(tmp_path / "best.pt"), "--to", "onnx", "--free", "all"])
    assert "largest difference from PyTorch" in capsys.readouterr().out

    session = onnx_session(tmp_path / "best.onnx")
    for shape in ((1, 3, 32, 32), (3, 3, 64, 32), (2, 3, 64, 96)):
        images = torch.rand(shape)
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
