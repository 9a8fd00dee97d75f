"""Prediction of classes: a network that goes by brightness, and where its answers are written."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kdmini.checkpoint import save_best
from kdmini.classification.wide_resnet import WideResNet
from kdmini.tools.canvas import LEAST_TEXT, font
from kdmini.tools.predict import main
from kdmini.tools.predict_classes import labelled

NAMES = ["black", "grey", "white", "red", "green", "blue", "a" * 200]


def by_brightness(self: WideResNet, images: torch.Tensor) -> torch.Tensor:
    """-> logits: the first three by the brightness, the others ever smaller."""
    level = images.mean((1, 2, 3))
    near = [-20 * (level - goal).abs() for goal in (0.0, 0.5, 1.0)]
    far = [torch.full_like(level, -30.0 - number) for number in range(4)]
    return torch.stack([*near, *far], 1)


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    save_best(tmp_path / "best.pt", WideResNet(NAMES, 10), 32, 0, 0.5)
    monkeypatch.setattr(WideResNet, "forward", by_brightness)
    return tmp_path / "best.pt"


def test_each_picture_has_its_class_and_the_best_five(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name, level in (("dark", 0), ("light", 255), ("pale", 250)):
        Image.new("RGB", (64, 64), (level,) * 3).save(folder / f"{name}.png")
    out = tmp_path / "out"
    main([str(weights), str(folder), "--out", str(out), "--device", "cpu"])
    assert {path.name for path in out.iterdir()} == {
        *("dark.jpg", "light.jpg", "pale.jpg", "predictions.json")
    }
    said = capsys.readouterr().out
    assert "3 images, 2 of 7 classes found; " in said
    assert said.endswith(f" images/s; pictures, predictions.json in {out}\n")
    dark, light, _ = json.loads((out / "predictions.json").read_text())
    assert list(dark["classes"]) == ["black", "grey", "white", "red", "green"]
    assert list(light["classes"]) == ["white", "grey", "black", "red", "green"]
    odds = np.exp([0.0, -10.0, -20.0])
    assert dark["classes"]["black"] == pytest.approx(odds[0] / odds.sum(), abs=1e-4)
    with Image.open(out / "dark.jpg") as picture:
        assert picture.size == (640, 640)
        plate = np.asarray(picture)[:24, :60].astype(int)
    assert (plate[..., 2] > 100).any()  # blue, on black


def test_options_of_detections_are_refused(weights: Path, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(SystemExit, match=r"error: --iou: .*WideResNet"):
        main([str(weights), str(tmp_path / "a.png"), "--iou", "0.5", "--out", str(tmp_path / "o")])


@pytest.mark.parametrize("width, height", [(1, 1), (20_000, 12), (5, 3_000)])
def test_a_label_is_whole_on_pictures_of_any_shape(width: int, height: int) -> None:
    text = "a class of a long name 0.50"
    page = np.asarray(labelled(Image.new("RGB", (width, height)), text))
    plate = (page[0] == (0, 114, 178)).all(1).sum()  # blue
    assert plate > font(LEAST_TEXT).getlength(text)
    assert (page[:12, :plate] > 200).all(2).any()  # white letters
