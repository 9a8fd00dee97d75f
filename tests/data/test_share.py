"""A validation set drawn from the training set: once, by names, and with nothing in both."""

import itertools
import random
import shutil

import numpy as np
import pytest
import yaml

import eval as eval_script
import train as train_script
from examples.shapes import SHAPE_NAMES
from kdmini import config
from kdmini.contracts import UserError
from kdmini.data.share import Share, relative
from kdmini.detection.truth import Boxes
from kdmini.sections import Sections, Sets, make_sets
from tests.commands import assert_equal, newest, run
from tests.data.layouts import by_name, write, write_coco, write_yolo

NAMES = [f"{number:04}" for number in range(200)]
FILMS = [f"film{film}_{frame:03}" for film in range(10) for frame in range(20)]


def sets_of(root, val, **train) -> Sets:
    section = {"build": "kdmini.detection.voc:VOC", "names": SHAPE_NAMES, **train}
    return config.call(make_sets, {"root": str(root), "train": section, "val": val}, "data")


@pytest.mark.parametrize("share, count", [(0.2, 40), (0.001, 1), (0.5, 100), (0.999, 199)])
def test_the_share_is_met(share, count):
    drawn = Share(share).draw(NAMES)
    assert len(drawn) == len(set(drawn)) == count
    assert drawn == sorted(drawn)


def test_what_is_drawn_depends_on_names_and_seed_alone():
    drawn = set(Share(0.2).draw(NAMES))
    shuffled = random.Random(0).sample(NAMES, len(NAMES))
    assert set(Share(0.2).draw(shuffled)) == drawn
    others = set(Share(0.2, seed=1).draw(NAMES))
    assert 0 < len(drawn & others) < 20  # 8 by chance
    # the first of a stream of hashes: written down, so that no release draws others
    assert Share(0.03).draw(NAMES) == ["0046", "0101", "0104", "0119", "0126", "0185"]


def test_few_change_sides_when_images_come():
    before = set(Share(0.2).draw(NAMES[:180]))
    after = set(Share(0.2).draw(NAMES))
    assert len(before - after) <= 8


def test_a_film_is_on_one_side():
    drawn = Share(0.2, by="prefix").draw(FILMS)
    assert len(drawn) == 40
    assert len({name.partition("_")[0] for name in drawn}) == 2
    folders = [name.replace("_", "/") + ".jpg" for name in FILMS]
    drawn = Share(0.2, by="prefix").draw(folders)
    assert len({name.partition("/")[0] for name in drawn}) == 2


def test_a_large_film_is_left_to_train():
    names = [f"long-{frame}" for frame in range(90)] + ["a1", "b1", "c1"]
    drawn = Share(0.02, by="prefix").draw(names)
    assert 1 <= len(drawn) <= 2
    assert not [name for name in drawn if name.startswith("long")]


@pytest.mark.parametrize("by", ["image", "prefix"])
def test_copies_of_a_photograph_are_on_one_side(by):
    """As Roboflow names what it has augmented."""
    names = [f"p{n}_jpg.rf.{copy:08x}.jpg" for n, copy in itertools.product(range(50), range(3))]
    if by == "prefix":
        names = [name.replace("p", "film" + name[1] + "_", 1) for name in names]
    drawn = set(Share(0.3, by=by).draw(names))
    rest = {name.partition(".rf.")[0] for name in names if name not in drawn}
    assert 30 <= len(drawn) <= 60
    assert not {name.partition(".rf.")[0] for name in drawn} & rest


@pytest.mark.parametrize("names, by", [(["a"], "image"), (NAMES, "prefix")])
def test_what_cannot_be_divided_is_said(names, by):
    with pytest.raises(UserError, match=r"^data\.val: all [\d,]+ images are one .*`by: image`"):
        Share(0.2, by=by).draw(names)


def test_the_folder_of_all_is_no_part_of_a_name():
    assert relative(["set/a", "set/b"]) == ["a", "b"]
    assert relative(["set/x/a", "set/y/a"]) == ["x/a", "y/a"]
    assert relative(["a", "set/b"]) == ["a", "set/b"]
    assert relative(["set/a"]) == ["a"]


@pytest.mark.parametrize("layout", ["beside", "nested"])
def test_both_sides_of_a_folder_are_its_images(tmp_path, shapes, layout, capsys):
    write(layout, shapes, tmp_path / "set")
    settings = {"recursive": layout == "nested"}
    sets = sets_of(tmp_path / "set", {"share": 0.25}, **settings)
    said = capsys.readouterr().out
    assert said.count("all: 32 annotated images") == 1
    assert "data.val: 8 of the 32 images of data.train, drawn by image" in said
    ours = by_name(sets.train)
    theirs = by_name(sets.val)
    assert (len(ours), len(theirs)) == (24, 8)
    assert not ours.keys() & theirs.keys()
    shutil.move(tmp_path / "set", tmp_path / "elsewhere")
    moved = sets_of(tmp_path / "elsewhere", {"share": 0.25}, **settings)
    assert by_name(moved.val).keys() == theirs.keys()


def test_each_side_reports_what_it_has_read(tmp_path, shapes):
    write("beside", shapes, tmp_path)
    first = sorted(tmp_path.glob("*.xml"))[0]
    first.unlink()
    sets = sets_of(tmp_path, {"share": 0.25}, background=True)
    for index in range(len(sets.train)):
        sets.train[index]
    for index in range(len(sets.val)):
        sets.val[index]
    reports = sorted([sets.train.report(), sets.val.report()])
    assert reports == ["", "1 images without an XML file taken as background"]


@pytest.mark.parametrize("form", ["YoloTxt", "CocoJson", "masks"])
def test_sets_of_every_form_are_divided(tmp_path, shapes, form):
    write_yolo(shapes, tmp_path / "yolo", SHAPE_NAMES, ("train", "val"))
    write_coco(shapes, tmp_path / "coco", SHAPE_NAMES, ("train",))
    root, section, count = {
        "YoloTxt": ("yolo", {"images": "images", "recursive": True}, 32),
        "CocoJson": (
            "coco",
            {"images": "train", "annotations": "train/_annotations.coco.json"},
            24,
        ),
        "masks": (shapes, {"splits": ["train"], "names": ["ground", *SHAPE_NAMES]}, 24),
    }[form]
    build = {
        "YoloTxt": "kdmini.detection.yolo_txt:YoloTxt",
        "CocoJson": "kdmini.detection.coco_json:CocoJson",
        "masks": "kdmini.segmentation.voc:VOC",
    }[form]
    data = {"root": str(tmp_path / root), "train": {"build": build, **section}}
    sets = config.call(make_sets, {**data, "val": {"share": 0.25}}, "data")
    assert len(sets.val) == count / 4
    ours, theirs = ({part[i][1]["id"] for i in range(len(part))} for part in sets[:2])
    assert len(ours | theirs) == len(ours) + len(theirs) == count
    both = config.call(make_sets, {**data, "val": {"share": 0.25, "by": "image"}}, "data")
    assert {both.val[i][1]["id"] for i in range(len(both.val))} == theirs


class Nameless:
    truth = Boxes

    def __init__(self):
        self.names = ["cat"]

    def __len__(self):
        return 9

    def __getitem__(self, index):
        return np.zeros((8, 8, 3), np.uint8), {"id": str(index)}


@pytest.mark.parametrize(
    "val, message",
    [
        ({"share": 0}, "share: 0 is out of range"),
        ({"share": 1}, "share: 1 is out of range"),
        ({"share": 0.2, "by": "name"}, "'name' is not a choice"),
        ({"share": 0.2, "build": "kdmini.detection.voc:VOC"}, "build: unknown key"),
        ({"share": 0.2, "listed": "no.txt"}, r"no\.txt: cannot be read"),
        ({}, "expected a section with `build"),
    ],
)
def test_a_wrong_share_is_named(shapes, val, message):
    with pytest.raises(UserError, match=rf"(data\.val.*)?{message}"):
        sets_of(shapes, val, splits=["all"])


def test_a_data_set_without_names_of_images_cannot_be_divided():
    data = {"train": {"build": f"{__name__}:Nameless"}, "val": {"share": 0.2}}
    with pytest.raises(UserError, match="has no `ids`"):
        config.call(make_sets, data, "data")


@pytest.mark.parametrize(
    "text, message",
    [
        ("nobody\n", "'nobody' is no image of data.train"),
        ("", "lists 0 of the 32"),
        ("ALL", "lists 32 of the 32"),
    ],
)
def test_a_list_that_does_not_fit_is_refused(tmp_path, shapes, text, message):
    names = [path.stem for path in (shapes / "JPEGImages").iterdir()]
    (tmp_path / "val.txt").write_text(text.replace("ALL", "\n".join(names)))
    with pytest.raises(UserError, match=rf"val\.txt: {message}"):
        sets_of(shapes, {"share": 0.2, "listed": str(tmp_path / "val.txt")}, splits=["all"])


def test_a_run_keeps_what_it_has_drawn(tmp_path, shapes, config_file, capsys):
    """Through a resume, bit for bit, and when images come or the section changes."""
    write("beside", shapes, tmp_path / "set")
    settings = yaml.safe_load(config_file.read_text())
    build = settings["data"]["train"]["build"]
    settings["data"]["root"] = str(tmp_path / "set")
    settings["data"]["train"] = {"build": build, "names": SHAPE_NAMES}
    settings["data"]["val"] = {"share": 0.25}
    settings["train"]["epochs"] = 2
    settings |= {"teacher": None, "distill": None}
    config_file.write_text(yaml.safe_dump(settings))
    run(train_script, "--config", config_file)
    folder = tmp_path / "run"
    listed = (folder / "val.txt").read_text().split()
    drawn = Share(0.25).draw(sorted(path.stem for path in (tmp_path / "set").glob("*.xml")))
    assert listed == drawn
    whole = newest(folder)

    for path in sorted((folder / "ckpt").glob("*.pt"))[1:]:
        path.unlink()
    capsys.readouterr()
    run(train_script, "--resume", folder)
    assert f"8 of the 32 images of data.train, as listed in {folder}/val.txt" in (
        capsys.readouterr().out
    )
    assert_equal(newest(folder)["student"], whole["student"])

    for number in range(40):
        for ending in ("jpg", "xml"):
            source = tmp_path / "set" / f"{listed[0]}.{ending}"
            shutil.copy(source, source.with_stem(f"new{number}"))
    run(eval_script, "--config", config_file, "--weights", folder / "best.pt", "data.val.share=0.5")
    assert "8 of the 72 images of data.train, as listed in" in capsys.readouterr().out
    sections = config.call(Sections, config.load(config_file), "mine")
    assert sorted(by_name(sections.sets().val)) == listed
