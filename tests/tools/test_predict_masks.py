"""Prediction of masks: a network that labels by brightness, and where its answers are written."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kdmini.checkpoint import save_best
from kdmini.data.palette import PALETTE
from kdmini.segmentation.fast_scnn import FastSCNN
from kdmini.tools.draw_masks import blended, overlay
from kdmini.tools.predict import main
from kdmini.tools.predict_masks import MaskWriter

NAMES = ["ground", "dark", "bright"]
DARK = 1
BRIGHT = 2


def by_brightness(self: FastSCNN, images: torch.Tensor) -> list[torch.Tensor]:
    """-> logits at a quarter of the size."""
    level = torch.nn.functional.avg_pool2d(images.mean(1, keepdim=True), 4)
    return [torch.cat([torch.full_like(level, -1.0), 1 - level, level], 1)]


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    save_best(tmp_path / "best.pt", FastSCNN(NAMES), 64, 0, 0.5)
    monkeypatch.setattr(FastSCNN, "forward", by_brightness)
    return tmp_path / "best.pt"


def half_and_half(path: Path) -> None:
    """128 x 64, black on the left and white on the right; at 64 px it has bars of grey."""
    pixels = np.zeros((64, 128, 3), np.uint8)
    pixels[:, 64:] = 255
    Image.fromarray(pixels).save(path)


def test_masks_lie_over_the_pixels_of_the_file(weights: Path, tmp_path: Path) -> None:
    half_and_half(tmp_path / "wide.png")
    out = tmp_path / "out"
    main([str(weights), str(tmp_path / "wide.png"), "--out", str(out), "--device", "cpu"])
    assert sorted(path.name for path in out.iterdir()) == [
        "predictions.json",
        "wide.jpg",
        "wide.png",
    ]
    (entry,) = json.loads((out / "predictions.json").read_text())
    assert (entry["width"], entry["height"]) == (128, 64)
    assert (entry["picture"], entry["mask"]) == ("wide.jpg", "wide.png")
    assert entry["classes"] == {"bright": 0.5, "dark": 0.5}

    with Image.open(out / "wide.png") as mask:
        assert mask.mode == "P"
        assert mask.getpalette() == PALETTE.flatten().tolist()
        indices = np.array(mask)
    assert indices.shape == (64, 128)
    assert (indices[:, :64] == DARK).all()
    assert (indices[:, 64:] == BRIGHT).all()


def test_masks_are_written_also_without_pictures(weights: Path, tmp_path: Path) -> None:
    half_and_half(tmp_path / "wide.png")
    out = tmp_path / "out"
    main([str(weights), str(tmp_path / "wide.png"), "--out", str(out), "--no-pictures"])
    assert {path.name for path in out.iterdir()} == {"predictions.json", "wide.png"}


def test_bad_images_are_told_of_and_the_others_are_done(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    half_and_half(folder / "good.png")
    half_and_half(folder / "blocked.png")
    (folder / "text.jpg").write_text("a text")
    (tmp_path / "out" / "blocked.png").mkdir(parents=True)  # in the place of a mask
    with pytest.raises(SystemExit, match="named above: 2;"):
        main([str(weights), str(folder), "--out", str(tmp_path / "out"), "--device", "cpu"])
    told = capsys.readouterr().err
    assert "text.jpg: not a usable image" in told
    assert "blocked.png (Is a directory)" in told
    entries = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [Path(entry["file"]).name for entry in entries] == ["good.png"]


@pytest.mark.parametrize("option", ["--score", "--iou"])
def test_options_of_detections_are_refused(weights: Path, tmp_path: Path, option: str) -> None:
    half_and_half(tmp_path / "a.png")
    out = tmp_path / "out"
    with pytest.raises(SystemExit, match=f"error: {option}: .*FastSCNN"):
        main([str(weights), str(tmp_path / "a.png"), option, "0.5", "--out", str(out)])
    assert not out.exists()


# --- drawing


def test_the_first_class_is_seen_as_it_is_and_others_through_their_colour() -> None:
    photograph = Image.new("RGB", (4, 2), (10, 200, 10))
    grey = np.asarray(photograph.convert("L"), np.float32)[0, 0]
    drawn = np.asarray(blended(photograph, np.array([[0, BRIGHT]], np.uint8)), np.float32)
    assert (drawn[:, :2] == grey).all()
    np.testing.assert_allclose(drawn[:, 2:] - (0.4 * grey + 0.6 * PALETTE[BRIGHT]), 0, atol=1)


def test_what_a_mask_has_is_named_below_it() -> None:
    """Each name with its colour, on as many rows as it takes."""
    mask = np.repeat(np.arange(1, 21, dtype=np.uint8), 20).reshape(20, 20)
    names = ["nothing", *(f"a class with the number {n}" for n in range(1, 21))]
    page = overlay(Image.new("RGB", (640, 640)), mask, names)
    assert page.width == 640
    legend = np.asarray(page)[640:]
    for label in range(1, 21):
        assert (legend == PALETTE[label]).all(2).sum() > 150  # a square of about 17 pixels


def test_a_steady_page_has_one_size_whatever_is_seen() -> None:
    names = ["nothing", *(f"a class with the number {n}" for n in range(1, 21))]
    few = np.ones((20, 20), np.uint8)
    many = np.repeat(np.arange(1, 21, dtype=np.uint8), 20).reshape(20, 20)
    many[1] = 1  # so that it has the largest share
    image = Image.new("RGB", (640, 480))
    writer = MaskWriter(FastSCNN(names))
    predictions = [{"mask": torch.from_numpy(mask)} for mask in (few, many)]
    pages = [np.asarray(writer.draw(image, prediction, True)) for prediction in predictions]
    assert pages[0].shape == pages[1].shape
    assert pages[0].shape[1] == 640
    for page in pages:
        assert (page[480:] == PALETTE[1]).all(2).sum() > 150


@pytest.mark.parametrize("name", ["\ud800", "a\nb", "\x1b[31m", "x" * 2_000_000, ""])
def test_any_class_name_takes_one_short_line(name: str) -> None:
    page = overlay(Image.new("RGB", (640, 480)), np.zeros((2, 2), np.uint8), [name])
    assert 20 < page.height - 480 < 60


@pytest.mark.parametrize("width, height", [(1, 1), (8, 6), (20_000, 12), (5, 3_000)])
def test_a_drawing_is_legible_at_any_size(width: int, height: int) -> None:
    mask = np.ones((height, width), np.uint8)
    page = overlay(Image.new("RGB", (width, height)), mask, NAMES)
    assert 640 <= max(page.size) <= 8500
    legend = np.asarray(page)[-60:]
    assert (legend == PALETTE[1]).all(2).sum() > 100  # a square
    assert (legend[:, 40:] < 100).all(2).any()  # its name
