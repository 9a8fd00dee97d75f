"""Images that a user names: found in folders and lists, and read as people look at them."""

import io
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from kdmini.contracts import UserError
from kdmini.segmentation.truth import Masks
from kdmini.tools.photographs import (
    Photographs,
    find_images,
    listed,
    read_together,
    read_upright,
    stems,
)

ORIENTATION = 0x0112  # EXIF's tag


def test_photographs_are_a_data_set_without_annotations(tmp_path: Path) -> None:
    good = tmp_path / "good.png"
    Image.new("RGB", (3, 2)).save(good)
    text = tmp_path / "text.png"
    text.write_text("a text")
    missing = tmp_path / "missing.png"
    photographs = Photographs([good, text, missing], ["one", "two", "three"], Masks)
    image, target = photographs[0]
    assert image.shape == (2, 3, 3)
    assert target == {"id": "one"}
    assert photographs.truth is Masks
    with pytest.raises(UserError, match=r"text.png: not a usable image"):
        photographs[1]
    with pytest.raises(UserError, match=r"missing.png: no such file"):
        photographs[2]


@pytest.mark.parametrize("orientation", range(10))
def test_a_picture_is_turned_as_pillow_turns_it(tmp_path: Path, orientation: int) -> None:
    stored = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path = tmp_path / "a.png"
    Image.fromarray(stored).save(path, exif=exif)
    with Image.open(path) as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    np.testing.assert_array_equal(read_upright(path), expected)


def test_what_cannot_be_read_is_told_in_its_place(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.png" for number in range(5)]
    for number in (0, 1, 3, 4):
        Image.new("RGB", (number + 1, 2)).save(paths[number])
    portions = list(read_together(paths, 2))
    assert [len(portion) for portion in portions] == [2, 2, 1]
    pictures = [picture for portion in portions for picture in portion]
    assert [picture.path for picture in pictures] == paths
    widths = [None if p.pixels is None else p.pixels.shape[1] for p in pictures]
    assert widths == [1, 2, None, 4, 5]
    assert pictures[2].fault == f"{paths[2]}: no such file"


def test_folders_of_a_folder_are_looked_into_where_that_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("b.jpg", "a/2.JPG", "a/1.png", "a/deep/er/x.webp", "a/found/1.jpg", "a/clip.mpg"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    (tmp_path / "none" / "inner").mkdir(parents=True)

    flat, _ = find_images([str(tmp_path)])
    assert flat == [tmp_path / "b.jpg"]
    deep, refused = find_images([str(tmp_path)], True, tmp_path / "a" / "found")
    assert [path.relative_to(tmp_path).as_posix() for path in deep] == [
        *("b.jpg", "a/1.png", "a/2.JPG", "a/deep/er/x.webp")
    ]
    assert refused == 0
    assert capsys.readouterr().err == ""

    assert find_images([str(tmp_path / "none")]) == ([], 1)
    assert "none: no pictures in this folder; name one" in capsys.readouterr().err


def test_names_are_read_from_a_list(monkeypatch: pytest.MonkeyPatch) -> None:
    text = b"a.png\r\n\n caf\xe9.png \nlast.jpg"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
    assert listed(["first", "-"]) == ["first", "a.png", " caf\udce9.png ", "last.jpg"]
    monkeypatch.setattr(sys, "stdin", None)  # as Python has it for one that was closed
    assert listed(["-"]) == []


def test_a_number_behind_a_name_may_be_taken() -> None:
    assert len(set(stems(["x.png", "b/x.png", "x-2.png"]))) == 3
