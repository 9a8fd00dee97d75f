"""A weight file by itself is enough: scale, classes and image size are in it."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kdmini import checkpoint
from kdmini.checkpoint import save_best
from kdmini.classification.resnet import ResNet
from kdmini.classification.truth import Labels
from kdmini.classification.wide_resnet import WideResNet
from kdmini.contracts import UserError
from kdmini.detection.truth import Boxes
from kdmini.detection.yolo11.model import YOLO11
from kdmini.files import write_whole
from kdmini.segmentation.fast_scnn import FastSCNN
from kdmini.segmentation.mamba import VMamba
from kdmini.segmentation.segformer import SegFormer
from kdmini.segmentation.truth import Masks
from kdmini.tools.load import load_detector, load_network, usable_imgsz

NAMES = ["cup", "잔"]


@pytest.mark.parametrize("scale, sppf_act", [([0.5, 0.0625, 1024], True), ("n", False)])
def test_a_saved_detector_comes_back_as_it_was(
    tmp_path: Path, scale: str | list[float], sppf_act: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    model = YOLO11(NAMES, scale).eval()
    if not sppf_act:
        model.get_submodule("model.9.cv1").act = nn.Identity()
        model.sppf_act = False
    save_best(tmp_path / "best.pt", model, 96, 0, 0.5)

    loaded, imgsz = load_detector(tmp_path / "best.pt")

    assert loaded.names == NAMES
    assert loaded.scale == scale
    assert not loaded.training
    assert imgsz == 96
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert all(map(torch.equal, loaded(images), model(images)))
    assert capsys.readouterr().out.count("\n") == 1  # though the file is read more than once


@pytest.mark.parametrize(
    "stated, imgsz",
    [
        (320, 320),
        (None, 640),
        ([320, 640], 640),
        (100, 640),
        (0, 640),
        (1 << 40, 640),
        (True, 640),
        ("320", 640),
    ],
)
def test_the_image_size_is_one_to_work_with(stated: object, imgsz: int) -> None:
    assert usable_imgsz(stated) == imgsz


def no_space(*args: object) -> None:
    raise OSError(28, "No space left on device")


def stop(*args: object) -> None:
    raise SystemExit(143)


@pytest.mark.parametrize("fault, error", [(no_space, UserError), (stop, SystemExit)])
def test_a_file_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault, error: type[BaseException]
) -> None:
    path = tmp_path / "a.bin"
    write_whole(path, b"old")

    with monkeypatch.context() as patched, pytest.raises(error):
        patched.setattr(os, "replace", fault)
        write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]

    write_whole(path, b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a.bin"]


# --- networks for segmentation and for classification


@pytest.mark.parametrize(
    "model, truth",
    [
        (FastSCNN(NAMES), Masks),
        (SegFormer(NAMES, "b1", ratios=(8, 8, 4, 4)), Masks),
        (VMamba(NAMES, "pico", width=32), Masks),
        (ResNet(NAMES, 18, stem="cifar"), Labels),
        (WideResNet(NAMES, 16, width=2), Labels),
    ],
    ids=lambda piece: type(piece).__name__,
)
def test_a_saved_network_comes_back_as_it_was(
    tmp_path: Path, model: Any, truth: type, capsys: pytest.CaptureFixture[str]
) -> None:
    save_best(tmp_path / "best.pt", model, 96, 0, 0.5)
    loaded = load_network(tmp_path / "best.pt")
    assert loaded.truth is truth
    assert loaded.imgsz == 96
    assert loaded.network.names == NAMES
    assert loaded.network.card == model.card
    assert not loaded.network.training
    state = loaded.network.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    (line,) = capsys.readouterr().out.splitlines()
    assert f"{model.card['network']}" in line
    assert "2 classes" in line


def test_what_a_network_is_stands_in_its_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    many = [str(number) for number in range(300)]  # more than a mask could hold
    save_best(tmp_path / "best.pt", WideResNet(many, 16, width=2), 32, 0, 0.5)
    assert len(load_network(tmp_path / "best.pt").network.names) == 300
    assert ": WRN 16-2, 300 classes" in capsys.readouterr().out


def test_a_detector_is_loaded_as_one(tmp_path: Path) -> None:
    save_best(tmp_path / "best.pt", YOLO11(NAMES, [0.5, 0.0625, 1024]), 64, 0, 0.5)
    assert load_network(tmp_path / "best.pt").truth is Boxes


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"names": ["cup", 3]}, "names"),
        ({"names": []}, "names"),
        ({"names": [str(n) for n in range(300)]}, "300 classes"),
        ({"card": {"network": "SegFormer", "size": "b9"}}, "size"),
        ({"card": {"network": "SegFormer", "depth": 3}}, "depth"),
        ({"card": {"network": "ResNet", "depth": 19}}, "depth"),
        ({"card": {"network": "Fast-SCNN", "build": "os:remove"}}, "best.pt is of"),
        ({"card": {"network": ["SegFormer"]}}, "YOLO11"),
        ({"card": {"network": "SegFormer", "size": "b0"}, "model": {}}, "best.pt"),
    ],
)
def test_a_file_that_says_nonsense_is_refused_in_one_line(
    tmp_path: Path, changes: dict, named: str
) -> None:
    path = tmp_path / "best.pt"
    save_best(path, FastSCNN(NAMES), 64, 0, 0.5)
    checkpoint.save_atomic({**checkpoint.load(path), **changes}, path)
    with pytest.raises(UserError, match=named) as refused:
        load_network(path)
    assert "\n" not in str(refused.value)
    assert str(path) in str(refused.value)
