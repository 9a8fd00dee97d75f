"""A weight file by itself is enough: scale, classes and image size are in it."""

import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from kdmini.checkpoint import save_best
from kdmini.contracts import UserError
from kdmini.detection.yolo11.model import YOLO11
from kdmini.files import write_whole
from kdmini.tools.load import Photographs, load_detector, usable_imgsz, without_objects

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


def test_an_image_by_itself_has_a_target_without_objects() -> None:
    target = without_objects("a.jpg")
    assert target["id"] == "a.jpg"
    assert target["boxes_xyxy"].shape == (0, 4)
    assert len(target["labels"]) == len(target["difficult"]) == 0


def test_photographs_keep_account_of_what_cannot_be_read(tmp_path: Path) -> None:
    good = tmp_path / "good.png"
    Image.new("RGB", (3, 2)).save(good)
    text = tmp_path / "text.png"
    text.write_text("a text")
    missing = tmp_path / "missing.png"
    photographs = Photographs([good, text, missing], ids=["one", "two", "three"])
    image, target = photographs[0]
    assert image.shape == (2, 3, 3)
    assert target["id"] == "one"
    with pytest.raises(UserError, match=r"text.png: not a usable image"):
        photographs[1]
    with pytest.raises(UserError, match=r"missing.png: no such file"):
        photographs[2]
    assert [*photographs.refused.values()] == [text, missing]


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
