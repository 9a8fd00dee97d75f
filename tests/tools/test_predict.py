"""Prediction: a detector whose boxes are known, and pictures of every kind."""

import io
import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kdmini.checkpoint import save_best
from kdmini.detection.atss import ATSS
from kdmini.detection.yolo11.model import YOLO11
from kdmini.tools.predict import main
from kdmini.tools.predict_boxes import COLOURS, draw
from tests.conftest import ROOT

NAMES = ["cup", "fork", "knife", "spoon"]
IMGSZ = 64
TURNED = 6  # EXIF: to be shown turned by a quarter
ORIENTATION = 0x0112  # EXIF's tag

# file -> Pillow's mode
READABLE = {
    "rgb.jpg": "RGB",
    "grey.jpg": "L",
    "cmyk.jpg": "CMYK",
    "grey.png": "L",
    "palette.png": "P",
    "bit.png": "1",
    "alpha.png": "RGBA",
    "grey_alpha.png": "LA",
    "a.gif": "P",
    "a.webp": "RGB",
    "a.bmp": "RGB",
    "a.tif": "RGB",
    "a.ppm": "RGB",
    "a.tga": "RGB",
    "LARGE.JPG": "RGB",
    "이름.png": "RGB",
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """At 64 px: a spoon of 0.9, and at the same places a fork of 0.8, 32 px round each of
    (16, 16), (48, 16), ...

    All weights of the head's last layers are zero, so what it says is in their biases alone,
    whatever the picture.
    """
    model = YOLO11(NAMES, [0.5, 0.0625, 1024])
    for level in range(3):
        for branch in ("cv2", "cv3"):
            torch.nn.init.zeros_(model.get_parameter(f"model.23.{branch}.{level}.2.weight"))
        distances = model.get_parameter(f"model.23.cv2.{level}.2.bias").data.view(4, 16)
        distances[:] = -100.0
        distances[:, 1] = 100.0  # one stride to each side
        scores = [0.01, 0.8, 0.01, 0.9] if level == 2 else [0.01] * 4
        model.get_parameter(f"model.23.cv3.{level}.2.bias").data[:] = torch.tensor(scores).logit()
    path = tmp_path_factory.mktemp("weights") / "best.pt"
    save_best(path, model, IMGSZ, 0, 0.5)
    return path


def photograph(width: int, height: int, mode: str = "RGB") -> Image.Image:
    gradient = np.add.outer(np.arange(height), np.arange(width)) % 256
    return Image.fromarray(gradient.astype(np.uint8)).convert(mode)


def run(weights: Path, *args: object, out: Path) -> list[dict]:
    main([str(weights), *map(str, args), "--out", str(out), "--device", "cpu"])
    return json.loads((out / "predictions.json").read_text())


def refused(*args: object) -> str:
    with pytest.raises(SystemExit) as stopped:
        main([*map(str, args), "--device", "cpu"])
    message = stopped.value.code
    assert isinstance(message, str)
    assert message.startswith("error: ")
    assert "\n" not in message
    return message


def test_boxes_are_in_pixels_of_the_file_and_each_has_one_class(
    weights: Path, tmp_path: Path
) -> None:
    path = tmp_path / "wide.png"
    photograph(128, 64).save(path)  # at 64 px: halved, with 16 px of grey above and below
    (entry,) = run(weights, path, out=tmp_path / "out")
    assert entry["file"] == str(path)
    assert entry["picture"] == "wide.jpg"
    assert (entry["width"], entry["height"]) == (128, 64)

    left_and_right = [[0, 0, 96, 64], [32, 0, 128, 64]]
    # the upper and the lower pair differ only where they are cut off
    boxes = sorted(detection["box_xyxy"] for detection in entry["detections"])
    assert boxes == sorted(2 * left_and_right)
    labels = [(detection["label"], detection["score"]) for detection in entry["detections"]]
    assert labels == [("spoon", 0.9)] * 4
    assert Image.open(tmp_path / "out" / "wide.jpg").size == (640, 320)


def test_the_settings_reach_the_detector(weights: Path, tmp_path: Path) -> None:
    photograph(64, 64).save(tmp_path / "a.png")

    def boxes(*settings: object) -> list[list[float]]:
        (entry,) = run(weights, tmp_path / "a.png", *settings, out=tmp_path / "out")
        return [detection["box_xyxy"] for detection in entry["detections"]]

    assert len(boxes()) == 4
    assert boxes("--score", 0.95) == []
    assert len(boxes("--iou", 0.1)) == 1  # neighbours overlap by a third before they are cut off
    assert len(boxes("--imgsz", 128)) == 16


def test_what_pillow_decodes_is_read(weights: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name, mode in READABLE.items():
        photograph(40, 30, mode).save(folder / name)
    Image.fromarray(np.full((30, 40), 40_000, np.uint16)).save(folder / "sixteen.png")
    exif = Image.Exif()
    exif[ORIENTATION] = TURNED
    photograph(40, 30).save(folder / "turned.jpg", exif=exif)
    (folder / "notes.txt").write_text("no picture, and not called one")

    entries = run(weights, folder, out=tmp_path / "out")
    names = sorted(Path(entry["file"]).name for entry in entries)
    assert names == sorted([*READABLE, "sixteen.png", "turned.jpg"])
    for entry in entries:
        turned = "turned" in entry["file"]  # as people look at it
        assert (entry["width"], entry["height"]) == ((30, 40) if turned else (40, 30))
        assert Image.open(tmp_path / "out" / entry["picture"]).format == "JPEG"
    sixteen = next(entry["picture"] for entry in entries if "sixteen" in entry["file"])
    middle = np.asarray(Image.open(tmp_path / "out" / sixteen))[300, 320]
    assert np.abs(middle - 40_000 / 256).max() < 12  # not white


def save_bomb(path: Path) -> None:
    """A TIFF of 40 x 30 that claims 3.6e9 pixels."""
    photograph(40, 30).save(path)
    content = path.read_bytes()
    for side, tag in ((40, 256), (30, 257)):  # width and height in the header
        entry = struct.pack("<HHI", tag, 4, 1)
        true = entry + struct.pack("<I", side)
        assert content.count(true) == 1
        content = content.replace(true, entry + struct.pack("<I", 60_000))
    path.write_bytes(content)


def test_bad_images_are_told_of_together_and_the_others_are_done(
    weights: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # what Pillow hands EPS to
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch '{tmp_path}/ran'\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    photograph(40, 30).save(tmp_path / "good.jpg")
    buffer = io.BytesIO()
    photograph(400, 300).save(buffer, "JPEG")
    (tmp_path / "cut.jpg").write_bytes(buffer.getvalue()[:2000])
    (tmp_path / "text.jpg").write_text("a text")
    photograph(40, 30).save(tmp_path / "program.eps")
    save_bomb(tmp_path / "bomb.tif")

    bad = [
        tmp_path / name
        for name in ("cut.jpg", "missing.jpg", "text.jpg", "program.eps", "bomb.tif")
    ]
    message = refused(weights, *bad, tmp_path / "good.jpg", "--out", tmp_path / "out")
    assert "above: 5;" in message
    assert not (tmp_path / "ran").exists()
    lines = [
        line
        for line in capsys.readouterr().err.splitlines()
        if "not a usable" in line or "no such file" in line
    ]
    assert len(lines) == 5
    assert all(str(path) in " ".join(lines) for path in bad)
    (entry,) = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert Path(entry["file"]).name == "good.jpg"

    message = refused(weights, tmp_path / "text.jpg", "--out", tmp_path / "other")
    assert "no image could be used" in message


def test_a_name_that_is_not_utf8_is_a_name(weights: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    names = [b"caf\xe9.png", "한글.png".encode(), b"\xff\x1b[31m\n.png", b"x" * 251 + b".png"]
    for name in names:
        photograph(40, 30).save(folder / "new.png")
        (folder / "new.png").rename(folder / os.fsdecode(name))
    entries = run(weights, folder, out=tmp_path / "out")
    # such as Python reads them, and such as they are in the file: valid JSON in UTF-8
    assert sorted(os.fsencode(Path(entry["file"]).name) for entry in entries) == sorted(names)
    text = (tmp_path / "out" / "predictions.json").read_bytes().decode()
    assert "caf\\udce9.png" in text
    assert "한글.png" in text
    for entry in entries:
        assert Image.open(entry["file"]).size == (40, 30)
        assert Image.open(tmp_path / "out" / entry["picture"]).width == 640


def test_one_bad_name_does_not_end_the_call(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    for name in ("first.png", "second.png", "third.png"):
        photograph(40, 30).save(tmp_path / "in" / name)
    (tmp_path / "empty").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "out" / "second.jpg" / "in the place of a picture").mkdir(parents=True)
    bad = ["loop", "loop/a.png", "empty", "x" * 300, "line\nbreak.png", "esc\x1b[31m.png"]
    inputs = [tmp_path / name for name in (*bad, "in")]
    message = refused(weights, *inputs, "--out", tmp_path / "out")
    assert f"named above: {len(bad) + 1};" in message

    told = capsys.readouterr().err
    for name in bad:
        assert str(tmp_path / name).encode("unicode_escape").decode() + ": no " in told
    assert "second.jpg (Is a directory)" in told
    entries = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [Path(entry["file"]).name for entry in entries] == ["first.png", "third.png"]
    assert all((tmp_path / "out" / entry["picture"]).is_file() for entry in entries)


@pytest.mark.parametrize("name", ["\ud800", "a\nb", "\x1b[31m", "x" * 2_000_000, ""])
def test_any_class_name_is_drawn_on_one_short_line(name: str) -> None:
    prediction = {
        "boxes_xyxy": torch.tensor([[100.0, 100.0, 500.0, 400.0]]),
        "scores": torch.tensor([0.9]),
        "labels": torch.tensor([0]),
    }
    picture = draw(Image.new("RGB", (640, 480), "white"), prediction, [name])
    column = np.asarray(picture)[:, 101]  # above the box there is the plate alone
    assert 15 < (column[:98] != 255).any(1).sum() < 40


def test_images_of_one_name_have_pictures_of_their_own(weights: Path, tmp_path: Path) -> None:
    names = ["a/x.png", "b/x.jpg", "b/X.bmp", "c/x.png"]
    widths = dict(zip((tmp_path / name for name in names), (700, 800, 900, 1000), strict=True))
    for path, width in widths.items():
        path.parent.mkdir(exist_ok=True)
        photograph(width, 30).save(path)
    before = [path.read_bytes() for path in widths]

    twice = (tmp_path / "b", tmp_path / "a" / "x.png")  # are named already
    entries = run(weights, *widths, *twice, out=tmp_path / "out")
    drawn = {
        Path(entry["file"]): Image.open(tmp_path / "out" / entry["picture"]).width
        for entry in entries
    }
    assert drawn == widths
    assert len({entry["picture"].lower() for entry in entries}) == 4
    assert [path.read_bytes() for path in widths] == before


def test_an_input_is_never_overwritten(weights: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    links = tmp_path / "links"
    links.mkdir()
    same = tmp_path / "same"
    same.symlink_to(folder)
    image = folder / "a.jpg"
    photograph(40, 30).save(image)
    (links / "a.jpg").symlink_to(image)
    before = image.read_bytes()

    for source, out in [(folder, folder), (image, same), (links, folder), (links, links)]:
        assert "never overwritten" in refused(weights, source, "--out", out)
    assert image.read_bytes() == before
    assert len(list(folder.iterdir())) == 1


@pytest.mark.parametrize("width, height", [(1, 1), (8, 6), (640, 480), (20_000, 12), (5, 3_000)])
def test_a_drawing_is_legible_at_any_size(width: int, height: int) -> None:
    label = 9
    box = torch.tensor([[width * 0.25, height * 0.25, width * 0.75, height * 0.75]])
    prediction = {
        "boxes_xyxy": box,
        "scores": torch.tensor([0.5]),
        "labels": torch.tensor([label]),
    }
    names = [f"class {n}" for n in range(10)]
    picture = draw(Image.new("RGB", (width, height), "white"), prediction, names)
    assert 640 <= max(picture.size) <= 8192

    pixels = np.asarray(picture)
    hexadecimal = COLOURS[label % 7].removeprefix("#")
    coloured = (pixels == list(bytes.fromhex(hexadecimal))).all(2)
    assert coloured.sum() >= 14  # the box, and the ground of its text
    if min(picture.size) > 100:
        rows = coloured.any(1).nonzero()[0]
        assert rows.min() < picture.height * 0.25 - 10  # the text stands above the box


def test_the_best_box_is_drawn_last() -> None:
    box = [100.0, 100.0, 500.0, 400.0]
    prediction = {
        "boxes_xyxy": torch.tensor([box, box]),
        "scores": torch.tensor([0.9, 0.3]),
        "labels": torch.tensor([0, 1]),
    }
    picture = draw(Image.new("RGB", (640, 480)), prediction, ["cup", "fork"])
    assert picture.getpixel((500, 250)) == (0xE6, 0x9F, 0x00)


def test_boxes_are_those_of_the_picture_as_people_see_it(weights: Path, tmp_path: Path) -> None:
    """Stored it is upright, and seen it lies: 64 x 32 pixels, of which 64 x 64 are looked at."""
    exif = Image.Exif()
    exif[ORIENTATION] = TURNED
    photograph(32, 64).save(tmp_path / "a.jpg", exif=exif)
    (entry,) = run(weights, tmp_path / "a.jpg", out=tmp_path / "out")
    assert (entry["width"], entry["height"]) == (64, 32)
    boxes = sorted(detection["box_xyxy"] for detection in entry["detections"])
    assert boxes == sorted(2 * [[0, 0, 48, 32], [16, 0, 64, 32]])
    assert Image.open(tmp_path / "out" / "a.jpg").size == (640, 320)


def test_json_lines_say_the_same_and_pictures_may_be_left_out(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a.png", "b.png"):
        photograph(40, 30).save(tmp_path / name)
    inputs = [tmp_path / "a.png", tmp_path / "b.png"]
    entries = run(weights, *inputs, out=tmp_path / "out")
    lines = tmp_path / "lines.jsonl"
    settings = ["--no-pictures", "--out", tmp_path / "none", "--device", "cpu", "--jsonl"]
    main([*map(str, [weights, *inputs, *settings, lines])])
    said = capsys.readouterr().out
    main([*map(str, [weights, *inputs, *settings, "-"])])
    on_stream = capsys.readouterr().out
    for entry in entries:
        del entry["picture"]
    for text in (lines.read_text(), on_stream):
        assert [json.loads(line) for line in text.splitlines()] == entries
    assert "2 images, 8 objects of score over 0.25; " in said
    assert said.endswith(" images/s\n")
    assert not (tmp_path / "none").exists()
    assert not list(tmp_path.rglob("*.part"))

    for name, words in (("a.png", "never overwritten"), ("", "is a folder"), ("no/x", "No such")):
        settings[-1] = f"--jsonl={tmp_path / name}"
        assert words in refused(weights, *inputs, *settings)


def test_what_is_of_another_kind_is_one_line(weights: Path, tmp_path: Path) -> None:
    photograph(40, 30).save(tmp_path / "a.png")
    save_best(tmp_path / "atss.pt", ATSS(NAMES, width=8), IMGSZ, 0, 0.5)
    out = ["--out", tmp_path / "out"]
    assert "atss.pt" in refused(tmp_path / "atss.pt", tmp_path / "a.png", *out)
    config = ROOT / "configs" / "demo.yaml"
    assert "demo.yaml" in refused(config, tmp_path / "a.png", *out)
    assert not (tmp_path / "out").exists()


def test_wrong_input_is_told_in_one_line(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = tmp_path / "a.png"
    photograph(40, 30).save(image)
    empty = tmp_path / "empty"
    empty.mkdir()
    file = tmp_path / "file"
    file.write_text("a file")
    out = ["--out", tmp_path / "out"]
    assert "each folder is named above" in refused(weights, empty, *out)
    assert f"{empty}: no pictures in this folder" in capsys.readouterr().err
    assert "file" in refused(weights, image, "--out", file)
    assert "file" in refused(weights, image, "--out", file / "below")
    assert "missing.pt" in refused(tmp_path / "missing.pt", image, *out)
    assert "no weight file" in refused(image, image, *out)
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize(
    "option", ["--score=25.0", "--score=-1.0", "--iou=nan", "--iou=inf", "--imgsz=0", "--imgsz=100"]
)
def test_a_number_out_of_range_is_refused_by_the_command_line(
    weights: Path, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name, _, value = option.partition("=")
    with pytest.raises(SystemExit, match="2"):
        main([str(weights), "a.png", option])
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"error: argument {name}: {value} is out of range; use " in last
