"""Folders as other tools and systems leave them: endings, spellings, lists, layouts."""

import shutil
import unicodedata
from pathlib import Path

import pytest
from PIL import Image

from kdmini.contracts import UserError
from kdmini.data.pictures import IMAGES
from kdmini.data.store import Store
from kdmini.detection.voc import VOC
from tests.data.voc_folder import add, ids, one, thing, write_split, xml

# --- endings


@pytest.mark.parametrize("ending", [*IMAGES, ".JPG", ".JPEG", ".PNG", ".Bmp"])
def test_every_format_that_is_decoded_is_found(tmp_path, ending):
    add(tmp_path / "set", "a")
    Image.new("RGB", (40, 30)).save(tmp_path / f"a{'.jpg' if ending == '.jfif' else ending}")
    (path,) = tmp_path.glob("a.*")
    (tmp_path / "set/JPEGImages/a.jpg").unlink()
    path.rename(tmp_path / f"set/JPEGImages/a{ending}")
    write_split(tmp_path / "set", "train", "a")
    image, _ = VOC(str(tmp_path / "set"), ["train"])[0]
    assert image.shape == (30, 40, 3)


def test_an_ending_that_is_not_read_is_said(tmp_path):
    with pytest.raises(
        UserError, match=r"JPEGImages/a\.tif: not one of \.jpg .* convert it or take"
    ):
        one(tmp_path, xml(thing()), ending=".tif")


@pytest.mark.parametrize("part, twin", [("JPEGImages", "a.png"), ("Annotations", "a.XML")])
def test_two_files_of_one_name_are_refused(tmp_path, part, twin):
    add(tmp_path, "a")
    add(tmp_path, "b")
    (tmp_path / part / twin).write_bytes(b"")
    write_split(tmp_path, "train", "a", "b")
    dataset = VOC(str(tmp_path), ["train"])
    with pytest.raises(UserError) as error:
        dataset[0]
    message = str(error.value)
    for name in ("a.jpg", "a.png") if part == "JPEGImages" else ("a.xml", "a.XML"):
        assert name in message
    assert dataset[1][1]["id"].endswith("/b")


def test_two_lists_of_one_name_are_refused(tmp_path):
    add(tmp_path, "a")
    write_split(tmp_path, "train", "a")
    (tmp_path / "ImageSets/Main/train.TXT").write_text("a\n")
    with pytest.raises(UserError, match="which is meant"):
        VOC(str(tmp_path), ["train"])


# --- spelling

PHOTO = "사진 é"


def decomposed(name):
    """As macOS stores it."""
    taken_apart = unicodedata.normalize("NFD", name)
    assert taken_apart != name
    return taken_apart


@pytest.mark.parametrize("listed, stored", [(str, decomposed), (decomposed, str)])
def test_names_are_found_in_either_spelling(tmp_path, listed, stored):
    add(tmp_path / "set", stored(PHOTO), xml(thing(stored("개"))))
    write_split(tmp_path / "set", stored("훈련"), listed(PHOTO))
    for split in (listed("훈련"), "all"):
        dataset = VOC(str(tmp_path / "set"), [split], names=["새", listed("개")])
        _, target = dataset[0]
        assert target["id"] == f"set/{PHOTO}"
        assert target["labels"].tolist() == [1]
    both = VOC(str(tmp_path / "set"), [listed("훈련"), "all"], names=["개"])
    assert len(both) == 1


def test_two_spellings_of_one_name_are_two_files_of_one_name(tmp_path):
    add(tmp_path, PHOTO)
    shutil.copy(
        tmp_path / "JPEGImages" / f"{PHOTO}.jpg",
        tmp_path / "JPEGImages" / f"{decomposed(PHOTO)}.jpg",
    )
    write_split(tmp_path, "train", PHOTO)
    with pytest.raises(UserError, match="has the same name"):
        VOC(str(tmp_path), ["train"])[0]


def test_what_macos_leaves_beside_files_is_passed_over(tmp_path, capsys):
    add(tmp_path / "set", "a")
    write_split(tmp_path / "set", "train", "a")
    for path in ("Annotations/._a.xml", "JPEGImages/._a.jpg", "ImageSets/Main/._train.txt"):
        (tmp_path / "set" / path).write_bytes(b"\0\5\26\7")
    assert ids(VOC(str(tmp_path / "set"), ["all"])) == ["set/a"]
    expected = "all: 1 annotated images, 1 files `._*` of macOS passed over"
    assert expected in capsys.readouterr().out
    with pytest.raises(UserError, match=r"no such split \(train, and `all`\)"):
        VOC(str(tmp_path / "set"), ["val"])


# --- lists


@pytest.mark.parametrize(
    "lines, more",
    [
        (["a.jpg 1", "b.jpg -1"], 2),  # VoTT
        (["a.jpg", "b.xml"], 2),
        (["a", "b 0"], 1),
        (["a.jpg a.xml", "b.jpg b.xml"], 2),
        (["a\tdog 3 4 5 6", "b"], 1),
        (["a 1", "b"], 1),
    ],
)
def test_endings_and_columns_of_lists_are_passed_over_and_counted(tmp_path, capsys, lines, more):
    for name in "ab":
        add(tmp_path / "set", name)
    write_split(tmp_path / "set", "train", *lines)
    assert ids(VOC(str(tmp_path / "set"), ["train"])) == ["set/a", "set/b"]
    assert f"endings or further columns of {more} lines passed over" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["a 1", "a_jpg.rf.0123", "a.jpg", "a b 2"])
def test_the_longest_name_that_there_is_is_meant(tmp_path, capsys, name):
    for each in ("a", name):
        add(tmp_path / "set", each)
    write_split(tmp_path / "set", "train", name)
    assert ids(VOC(str(tmp_path / "set"), ["train"])) == [f"set/{name}"]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("line, missing", [("c", "c"), ("c.jpg 1", "c"), ("c -1", "c")])
def test_a_line_without_a_file_is_named_as_it_is_meant(tmp_path, line, missing):
    add(tmp_path, "a")
    write_split(tmp_path, "train", line)
    with pytest.raises(UserError, match=rf"JPEGImages/{missing}\.jpg: no such file"):
        VOC(str(tmp_path), ["train"])[0]


# --- images without annotations


@pytest.fixture
def half(tmp_path):
    """A set of a, which has an annotation, and b, which has none."""
    for name in "ab":
        add(tmp_path / "set", name)
    (tmp_path / "set/Annotations/b.xml").unlink()
    write_split(tmp_path / "set", "train", "a", "b")
    return str(tmp_path / "set")


def test_an_image_without_an_annotation_is_an_error_that_names_the_way_out(half, capsys):
    with pytest.raises(UserError, match=r"b\.xml: no such file; .*`background: true`"):
        VOC(half, ["train"])[1]
    assert ids(VOC(half, ["all"])) == ["set/a"]
    expected = "all: 1 annotated images, 1 without an annotation left out (or set background=true)"
    assert expected in capsys.readouterr().out


@pytest.mark.parametrize("split", ["train", "all"])
def test_it_is_background_where_that_is_asked_for(half, capsys, split):
    store = Store(VOC(half, [split], background=True), 32, name="train")
    assert [len(target["labels"]) for target in store.targets] == [1, 0]
    output = capsys.readouterr().out
    assert "train: 1 images without an XML file taken as background" in output
    assert ("all: 2 images, 1 of them without an annotation" in output) == (split == "all")


def test_background_needs_an_image(half):
    write_split(Path(half), "more", "c")
    with pytest.raises(UserError, match=r"c\.jpg: no such file"):
        VOC(half, ["more"], background=True)[0]


def test_folders_below_are_not_read_and_said(tmp_path, capsys):
    add(tmp_path, "a")
    (tmp_path / "Annotations/more").mkdir()
    assert len(VOC(str(tmp_path), ["all"])) == 1
    said = "1 folders in Annotations not read (or set recursive=true)"
    assert said in capsys.readouterr().out
