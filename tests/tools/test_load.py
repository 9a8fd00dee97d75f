"""A weight file by itself is enough: scale, classes and image size are in it."""

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from kdmini.contracts import UserError
from kdmini.detection.yolo11.model import YOLO11
from kdmini.runlog import write_whole
from kdmini.tools.load import load_detector, trained_size
from train import save_best


@pytest.mark.parametrize("scale, sppf_act", [([0.5, 0.0625, 1024], True), ("n", False)])
def test_a_saved_detector_comes_back_as_it_was(
    tmp_path: Path, scale: str | list[float], sppf_act: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    model = YOLO11(["cup", "잔"], scale).eval()
    if not sppf_act:
        model.get_submodule("model.9.cv1").act = nn.Identity()
        model.sppf_act = False
    save_best(tmp_path / "best.pt", model, model.names, 96, 0, 0.5)
    loaded, imgsz = load_detector(tmp_path / "best.pt")
    assert (loaded.names, loaded.scale, loaded.training, imgsz) == (["cup", "잔"], scale, False, 96)
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert all(map(torch.equal, loaded(images), model(images)))
    assert capsys.readouterr().out.count("\n") == 1  # though the file is read more than once


@pytest.mark.parametrize(
    "content, size",
    [
        ({"imgsz": 320}, 320),
        ({"train_args": {"imgsz": 1280}}, 1280),  # public files
        ({"imgsz": 320, "train_args": {"imgsz": 1280}}, 320),
        ({}, 640),
        ({"train_args": None}, 640),
        ({"imgsz": [320, 640]}, 640),
        ({"imgsz": 100}, 640),
        ({"imgsz": 0}, 640),
        ({"imgsz": 1 << 40}, 640),
        ({"imgsz": True}, 640),
    ],
)
def test_the_image_size_is_one_to_work_with(tmp_path: Path, content: dict, size: int) -> None:
    torch.save(content, tmp_path / "file.pt")
    assert trained_size(tmp_path / "file.pt") == size


def test_a_file_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.bin"
    write_whole(path, b"old")

    def blow(*args: object) -> None:
        raise OSError(28, "No space left on device")

    def stop(*args: object) -> None:
        raise SystemExit(143)

    for fault, told in ((blow, UserError), (stop, SystemExit)):
        with monkeypatch.context() as patched, pytest.raises(told):
            patched.setattr(os, "replace", fault)
            write_whole(path, b"new")
        assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a.bin"]
    write_whole(path, b"new")
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["a.bin"]
