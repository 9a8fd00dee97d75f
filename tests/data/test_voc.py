"""The folder layout of VOC: split lists, photographs that go by two names, files and links."""

import os

import pytest

from kdmini.contracts import UserError
from kdmini.detection.voc import VOC
from tests.data.voc_folder import add, ids, one, thing, write_split, xml
from tests.faults.children import run

# --- split lists


def test_splits_are_found_below_root_or_voccdevkit_or_are_root_itself(tmp_path):
    folder = tmp_path / "VOCdevkit" / "VOC2007"
    add(folder, "000001")
    write_split(folder, "test", "000001")
    below_root = VOC(str(tmp_path), ["VOC2007/test"])
    below_devkit = VOC(str(tmp_path / "VOCdevkit"), ["VOC2007/test"])
    root_itself = VOC(str(folder), ["test"])
    for dataset in (below_root, below_devkit, root_itself):
        assert ids(dataset) == ["VOC2007/000001"]


def test_root_may_be_relative_or_a_link(tmp_path, monkeypatch):
    add(tmp_path / "disk" / "voc12", "2008_000001")
    (tmp_path / "VOC2012").symlink_to(tmp_path / "disk" / "voc12")
    assert ids(VOC(str(tmp_path), ["VOC2012/all"])) == ["VOC2012/2008_000001"]
    monkeypatch.chdir(tmp_path / "disk" / "voc12")
    assert ids(VOC(".", ["all"])) == ["voc12/2008_000001"]


@pytest.mark.parametrize(
    "text", ["a\nb\n", "a\r\nb\r\n", "\n a \n\n\nb", "a -1\nb  1\n", "\ufeffa\t0\nb"]
)
def test_split_files_of_every_kind(tmp_path, text):
    for name in "ab":
        add(tmp_path / "set", name)
    (tmp_path / "set" / "ImageSets" / "Main" / "train.txt").write_bytes(text.encode())
    assert ids(VOC(str(tmp_path / "set"), ["train"])) == ["set/a", "set/b"]


@pytest.mark.parametrize(
    "name", ["../a", "/etc/passwd", "..\\a", "C:\\a", "a\0b", "..", "x/../../a"]
)
def test_names_that_lead_elsewhere_are_refused(tmp_path, name):
    add(tmp_path / "set", "a")
    (tmp_path / "set" / "ImageSets" / "Main" / "train.txt").write_text(f"{name}\n")
    with pytest.raises(UserError, match="is not the name of an image") as error:
        VOC(str(tmp_path / "set"), ["train"])
    assert "\0" not in str(error.value)
    with pytest.raises(UserError):
        VOC(str(tmp_path / "set"), [name])


MISSING = [  # splits, what is said of them
    (["VOC2012/trainval"], "VOC2012: no such folder"),
    (["VOC2007/test"], "no such split (empty, trainval, and `all`); fetch it with"),
    (["mine/train"], "correct `root` or `splits`"),
    (["train"], "no Annotations in it"),
    (["VOC2007/empty"], "lists no image"),
    ([], "no image is left"),
]


def test_missing_things_give_one_line_with_a_remedy(tmp_path):
    add(tmp_path / "VOC2007", "000001")
    write_split(tmp_path / "VOC2007", "trainval", "000001")
    write_split(tmp_path / "VOC2007", "empty", " ", "")
    for splits, words in MISSING:
        with pytest.raises(UserError) as error:
            VOC(str(tmp_path), splits)
        message = str(error.value)
        assert words in message
        assert "\n" not in message
        can_be_fetched = any("VOC20" in split for split in splits)
        assert ("python -m kdmini.tools.download --root" in message) == can_be_fetched


def test_all_takes_every_annotation_and_prints_both_counts(tmp_path, capsys):
    folder = tmp_path / "VOC2012"
    for name in ("2008_000003", "2007_000027", "2008_000002"):
        add(folder, name)
    write_split(folder, "trainval", "2008_000002", "2008_000003")
    assert len(VOC(str(tmp_path), ["VOC2012/all"])) == 3
    expected = "VOC2012/all: 3 annotated images, of which ImageSets/Main/trainval lists 2"
    assert expected in capsys.readouterr().out


# --- photographs


def test_a_photograph_is_known_in_every_set_that_names_it(tmp_path):
    names = {"VOC2007": ("000027", "000032"), "VOC2012": ("2007_000027", "2008_000032")}
    for root in ("here/VOCdevkit", "there/VOCdevkit"):
        for year in names:
            for name in names[year]:
                add(tmp_path / root / year, name)
            write_split(tmp_path / root / year, "train", *names[year])

    here = VOC(str(tmp_path / "here"), ["VOC2012/train"]).photographs
    assert len(here) == 2
    for root in ("here", "here/VOCdevkit"):
        assert len(here & VOC(str(tmp_path / root), ["VOC2007/train"]).photographs) == 1
    (tmp_path / "link").symlink_to(tmp_path / "here")
    linked = VOC(str(tmp_path / "link" / "VOCdevkit" / "VOC2012"), ["train"])
    assert linked.photographs == here
    there = VOC(str(tmp_path / "there"), ["VOC2012/train"])
    assert not here & there.photographs  # equal ids, other photographs


def test_a_photograph_is_known_though_one_year_lies_here_and_one_there(tmp_path):
    year_2007 = tmp_path / "VOCdevkit" / "VOC2007"
    year_2012 = tmp_path / "VOC2012"
    add(year_2007, "000027")
    write_split(year_2007, "train", "000027")
    for name in ("2007_000027", "2008_000032"):
        add(year_2012, name)
    write_split(year_2012, "train", "2007_000027", "2008_000032")
    mixed = VOC(str(tmp_path), ["VOC2012/train"], exclude=["VOC2007/train"])
    assert ids(mixed) == ["VOC2012/2008_000032"]


@pytest.fixture
def both_years(tmp_path):
    """Three photographs of VOC2007, and four of VOC2012, of which two are the same."""
    for name in ("2007_000027", "2007_000032", "2008_000032", "000027"):
        add(tmp_path / "VOC2012", name)
    for name in ("000027", "000032", "000040"):
        add(tmp_path / "VOC2007", name)
    write_split(tmp_path / "VOC2007", "test", "000027")
    write_split(tmp_path / "VOC2007", "trainval", "000032", "000040", "000040")
    return str(tmp_path)


def test_photographs_are_left_out_whatever_their_id(both_years, capsys):
    dataset = VOC(both_years, ["VOC2012/all"], exclude=["VOC2007/test"])
    assert ids(dataset) == ["VOC2012/000027", "VOC2012/2007_000032", "VOC2012/2008_000032"]
    assert "VOC2012/all: 1 of 4 images left out, as in VOC2007/test" in capsys.readouterr().out
    with pytest.raises(UserError, match="no image is left"):
        VOC(both_years, ["VOC2007/test"], exclude=["VOC2007/test"])


def test_photographs_are_taken_once_whatever_their_id(both_years, capsys):
    union = VOC(both_years, ["VOC2007/trainval", "VOC2012/all"])
    assert ids(union)[:2] == ["VOC2007/000032", "VOC2007/000040"]  # the first of equals, in order
    assert len(union) == len(set(ids(union))) == 5
    expected = "VOC2007/trainval + VOC2012/all: 2 repeated images taken once"
    assert expected in capsys.readouterr().out


# --- files


@pytest.mark.parametrize("ending", [".JPG", ".jpeg", ".JPEG", ".png", ".PNG"])
def test_other_endings_are_found(tmp_path, ending):
    image, _ = one(tmp_path, xml(thing()), ending=ending)[0]
    assert image.shape == (30, 40, 3)


def test_paths_may_hold_spaces_and_any_script(tmp_path):
    image, _ = one(tmp_path / "한글 폴더", xml(thing()))[0]
    assert image.shape == (30, 40, 3)


def move_and_link(path, place):
    """The file lies at `place` from now on, and a link to it is left."""
    path.rename(place)
    path.symlink_to(place)


PARTS = [("JPEGImages", ".jpg"), ("Annotations", ".xml")]


@pytest.mark.parametrize("part, ending", PARTS)
def test_a_link_out_of_the_set_is_refused(tmp_path, part, ending):
    folder = tmp_path / "set"
    for name in "abc":
        add(folder, name)
    outside = tmp_path / "set2" / f"x{ending}"  # a name that begins like the folder's is not in it
    outside.parent.mkdir()
    move_and_link(folder / part / f"b{ending}", outside)

    dataset = VOC(str(folder), ["all"])
    refusal = rf"b{ending}: a link that leads out of the set; put a copy"
    with pytest.raises(UserError, match=refusal):
        dataset[1]
    assert [dataset[index][1]["id"] for index in (0, 2)] == ["set/a", "set/c"]


@pytest.mark.parametrize("part, ending", PARTS)
def test_a_link_within_the_set_is_followed(tmp_path, part, ending):
    folder = tmp_path / "set"
    for name in "abc":
        add(folder, name)
    write_split(folder, "train", "a", "b", "c")
    (folder / "more").mkdir()
    move_and_link(folder / part / f"b{ending}", folder / part / f"d{ending}")
    move_and_link(folder / part / f"c{ending}", folder / "more" / f"c{ending}")
    assert ids(VOC(str(folder), ["train"])) == ["set/a", "set/b", "set/c"]

    move_and_link(folder / part, tmp_path / "disk")  # a whole folder may lie elsewhere
    assert ids(VOC(str(folder), ["train"])) == ["set/a", "set/b", "set/c"]


@pytest.mark.parametrize("part, ending", PARTS)
def test_what_is_no_file_is_not_waited_for(tmp_path, part, ending):
    add(tmp_path, "a")
    (tmp_path / part / f"a{ending}").unlink()
    os.mkfifo(tmp_path / part / f"a{ending}")
    write_split(tmp_path, "train", "a")
    done = run(lambda: VOC(str(tmp_path), ["train"])[0], tmp_path / "out", limit=10)
    assert done.code == 1
    assert f"a{ending}: no such file" in done.last
