"""Prediction: a detector whose boxes are known beforehand, and pictures of every kind."""

import io
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kdmini.detection.yolo11.model import YOLO11
from kdmini.tools.predict import COLOURS, draw, main, picture_names
from train import save_best

NAMES = ["cup", "fork", "knife", "spoon"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """At 64 px: a spoon of 0.9, and at the same places a fork of 0.8, 32 px round each of (16, 16),
    (48, 16), ...

    All weights of the head's last layers are zero, so what it says is in their biases alone,
    whatever the picture."""
    model = YOLO11(NAMES, [0.5, 0.0625, 1024])
    for level in range(3):
        for branch in ("cv2", "cv3"):
            torch.nn.init.zeros_(model.get_parameter(f"model.23.{branch}.{level}.2.weight"))
        distances = model.get_parameter(f"model.23.cv2.{level}.2.bias").data.view(4, 16)
        distances[:] = -100.0
        distances[:, 1] = 100.0  # one stride to each side
        classes = torch.tensor([0.01, 0.8, 0.01, 0.9] if level == 2 else [0.01] * 4)
        model.get_parameter(f"model.23.cv3.{level}.2.bias").data[:] = classes.logit()
    path = tmp_path_factory.mktemp("weights") / "best.pt"
    save_best(path, model, NAMES, 64, 0, 0.5)
    return path


def photograph(width: int, height: int, mode: str = "RGB") -> Image.Image:
    gradient = np.add.outer(np.arange(height), np.arange(width)) % 256
    return Image.fromarray(gradient.astype(np.uint8)).convert(mode)


def run(weights: Path, *args: object, out: Path) -> list[dict]:
    main([str(weights), *map(str, args), "--out", str(out), "--device", "cpu"])
    return json.loads((out / "predictions.json").read_text())


def refused(*args: object) -> str:
    with pytest.raises(SystemExit) as left:
        main([*map(str, args), "--device", "cpu"])
    assert (
        isinstance(left.value.code, str)
        and left.value.code.startswith("error: ")
        and "\n" not in left.value.code
    )
    return left.value.code


def test_boxes_are_in_pixels_of_the_file_and_each_has_one_class(
    weights: Path, tmp_path: Path
) -> None:
    photograph(128, 64).save(
        tmp_path / "wide.png"
    )  # at 64 px: halved, with 16 px of grey above and below
    (found,) = run(weights, tmp_path / "wide.png", out=tmp_path / "out")
    assert (found["file"], found["picture"]) == (str(tmp_path / "wide.png"), "wide.jpg")
    assert (found["width"], found["height"]) == (128, 64)
    left_and_right = [[0, 0, 96, 64], [32, 0, 128, 64]]
    # the upper and the lower pair differ only where they are cut off
    assert sorted(d["box_xyxy"] for d in found["detections"]) == sorted(2 * left_and_right)
    assert [(d["label"], d["score"]) for d in found["detections"]] == [("spoon", 0.9)] * 4
    assert Image.open(tmp_path / "out" / "wide.jpg").size == (640, 320)


def test_the_settings_reach_the_detector(weights: Path, tmp_path: Path) -> None:
    photograph(64, 64).save(tmp_path / "a.png")

    def boxes(*settings: object) -> list[list[float]]:
        (found,) = run(weights, tmp_path / "a.png", *settings, out=tmp_path / "out")
        return [d["box_xyxy"] for d in found["detections"]]

    assert len(boxes()) == 4
    assert boxes("--score", 0.95) == []
    assert len(boxes("--iou", 0.1)) == 1  # neighbours overlap by a third before they are cut off
    assert len(boxes("--imgsz", 128)) == 16


def test_what_pillow_decodes_is_read(weights: Path, tmp_path: Path) -> None:
    kinds = {
        "rgb.jpg": "RGB", "grey.jpg": "L", "cmyk.jpg": "CMYK", "grey.png": "L", "palette.png": "P", "bit.png": "1",
        "alpha.png": "RGBA", "grey_alpha.png": "LA", "a.gif": "P", "a.webp": "RGB", "a.bmp": "RGB", "a.tif": "RGB",
        "a.ppm": "RGB", "a.tga": "RGB", "LARGE.JPG": "RGB", "이름.png": "RGB",
    }  # fmt: skip
    folder = tmp_path / "in"
    folder.mkdir()
    for name, mode in kinds.items():
        photograph(40, 30, mode).save(folder / name)
    Image.fromarray(np.full((30, 40), 40_000, np.uint16)).save(folder / "sixteen.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    photograph(40, 30).save(folder / "turned.jpg", exif=turned)
    (folder / "notes.txt").write_text("no picture, and not called one")
    found = run(weights, folder, out=tmp_path / "out")
    assert sorted(Path(entry["file"]).name for entry in found) == sorted(
        [*kinds, "sixteen.png", "turned.jpg"]
    )
    assert {(entry["width"], entry["height"]) for entry in found} == {(40, 30)}
    for entry in found:
        assert Image.open(tmp_path / "out" / entry["picture"]).format == "JPEG"
    sixteen = next(entry["picture"] for entry in found if "sixteen" in entry["file"])
    middle = np.asarray(Image.open(tmp_path / "out" / sixteen))[300, 320]
    assert np.abs(middle - 40_000 / 256).max() < 12  # not white


def test_bad_images_are_told_of_together_and_the_others_are_done(
    weights: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch '{tmp_path}/ran'\n")  # what Pillow hands EPS to
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    photograph(40, 30).save(tmp_path / "good.jpg")
    buffer = io.BytesIO()
    photograph(400, 300).save(buffer, "JPEG")
    (tmp_path / "cut.jpg").write_bytes(buffer.getvalue()[:2000])
    (tmp_path / "text.jpg").write_text("a text")
    photograph(40, 30).save(tmp_path / "program.eps")
    photograph(40, 30).save(tmp_path / "bomb.tif")
    claimed = (tmp_path / "bomb.tif").read_bytes()
    for side, tag in ((40, 256), (30, 257)):  # width and height in the header: 3.6e9 pixels
        entry = struct.pack("<HHI", tag, 4, 1)
        assert claimed.count(entry + struct.pack("<I", side)) == 1
        claimed = claimed.replace(
            entry + struct.pack("<I", side), entry + struct.pack("<I", 60_000)
        )
    (tmp_path / "bomb.tif").write_bytes(claimed)
    names = ["cut.jpg", "missing.jpg", "text.jpg", "program.eps", "bomb.tif"]
    message = refused(
        weights, *(tmp_path / name for name in [*names, "good.jpg"]), "--out", tmp_path / "out"
    )
    assert "above: 5;" in message and not (tmp_path / "ran").exists()
    told = [
        line
        for line in capsys.readouterr().err.splitlines()
        if "not a usable" in line or "no such file" in line
    ]
    assert len(told) == 5 and all(str(tmp_path / name) in " ".join(told) for name in names)
    (found,) = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert Path(found["file"]).name == "good.jpg"
    assert "no image could be read" in refused(
        weights, tmp_path / "text.jpg", "--out", tmp_path / "other"
    )


def test_images_of_one_name_have_pictures_of_their_own(weights: Path, tmp_path: Path) -> None:
    paths = [
        tmp_path / folder / name
        for folder, name in [("a", "x.png"), ("b", "x.jpg"), ("b", "X.bmp"), ("c", "x.png")]
    ]
    for width, path in zip((700, 800, 900, 1000), paths, strict=True):
        path.parent.mkdir(exist_ok=True)
        photograph(width, 30).save(path)
    before = [path.read_bytes() for path in paths]
    found = run(
        weights, *paths, tmp_path / "b", paths[0], out=tmp_path / "out"
    )  # some are named twice
    widths = {
        entry["file"]: Image.open(tmp_path / "out" / entry["picture"]).width for entry in found
    }
    assert widths == dict(zip(map(str, paths), (700, 800, 900, 1000), strict=True))
    assert len({entry["picture"].lower() for entry in found}) == 4
    assert [path.read_bytes() for path in paths] == before
    taken = picture_names([Path("x.png"), Path("b/x.png"), Path("x-2.png")])
    assert len(set(taken.values())) == 3


def test_an_input_is_never_overwritten(weights: Path, tmp_path: Path) -> None:
    folder, links = tmp_path / "in", tmp_path / "links"
    for place in (folder, links):
        place.mkdir()
    photograph(40, 30).save(folder / "a.jpg")
    (links / "a.jpg").symlink_to(folder / "a.jpg")
    (tmp_path / "same").symlink_to(folder)
    before = (folder / "a.jpg").read_bytes()
    for source, out in [
        (folder, folder),
        (folder / "a.jpg", tmp_path / "same"),
        (links, folder),
        (links, links),
    ]:
        assert "never overwritten" in refused(weights, source, "--out", out)
    assert (folder / "a.jpg").read_bytes() == before and len(list(folder.iterdir())) == 1


@pytest.mark.parametrize("width, height", [(1, 1), (8, 6), (640, 480), (20_000, 12), (5, 3_000)])
def test_a_drawing_is_legible_at_any_size(width: int, height: int) -> None:
    box = torch.tensor([[width * 0.25, height * 0.25, width * 0.75, height * 0.75]])
    seen = {"boxes_xyxy": box, "scores": torch.tensor([0.5]), "labels": torch.tensor([9])}
    picture = draw(
        Image.new("RGB", (width, height), "white"), seen, [f"class {n}" for n in range(10)]
    )
    assert 640 <= max(picture.size) <= 8192
    pixels = np.asarray(picture).reshape(-1, 3)
    colour = np.array([int(COLOURS[9 % 7][i : i + 2], 16) for i in (1, 3, 5)])
    assert (pixels == colour).all(1).sum() >= 14  # the box, and the ground of its text
    if min(picture.size) > 100:
        plate = (np.asarray(picture) == colour).all(2).any(1).nonzero()[0]
        assert plate.min() < picture.height * 0.25 - 10  # the text stands above the box


def test_the_best_box_is_drawn_last() -> None:
    box = [100.0, 100.0, 500.0, 400.0]
    seen = {
        "boxes_xyxy": torch.tensor([box, box]),
        "scores": torch.tensor([0.9, 0.3]),
        "labels": torch.tensor([0, 1]),
    }
    picture = draw(Image.new("RGB", (640, 480)), seen, ["cup", "fork"])
    assert picture.getpixel((500, 250)) == (0xE6, 0x9F, 0x00)


def test_wrong_input_is_told_in_one_line(weights: Path, tmp_path: Path) -> None:
    image, empty, file = tmp_path / "a.png", tmp_path / "empty", tmp_path / "file"
    photograph(40, 30).save(image)
    empty.mkdir()
    file.write_text("a file")
    out = ["--out", tmp_path / "out"]
    assert "no pictures" in refused(weights, empty, *out)
    assert "file" in refused(weights, image, "--out", file)
    assert "file" in refused(weights, image, "--out", file / "below")
    assert "missing.pt" in refused(tmp_path / "missing.pt", image, *out)
    assert "no weight file" in refused(image, image, *out)
    assert "--score" in refused(weights, image, *out, "--score", 25)
    assert "--iou" in refused(weights, image, *out, "--iou", "nan")
    assert "--imgsz: 100" in refused(weights, image, *out, "--imgsz", 100)
    assert not list(tmp_path.glob("out/*"))
