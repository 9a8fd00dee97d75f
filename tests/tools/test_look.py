"""Counts of a data set against its XML files, what is said of faulty ones, and the sheets."""

import re
import shutil

import numpy as np
import pytest
from PIL import Image

import train as train_script
from examples.shapes import SHAPE_NAMES
from kdmini.detection.truth import Boxes
from kdmini.tools.look import main
from kdmini.tools.look_boxes import STEPS
from kdmini.tools.sheet import chosen
from tests.commands import run
from tests.conftest import CLASSIFICATION, SEGMENTATION, write_config
from tests.data.layouts import boxes_of, names_of
from tests.data.voc_folder import add, bndbox, thing, write_split, xml


def rows_of(text, title):
    """First cell -> the other cells, of the table that begins with this title."""
    lines = text.split("\n")
    start = next(number for number, line in enumerate(lines) if line.startswith(title))
    rows = {}
    for line in lines[start + 1 :]:
        if not line:
            break
        first, *others = re.split(r"  +", line)
        rows[first] = others
    return rows


def test_objects_and_images_are_those_of_the_xml_files(tmp_path, shapes, capsys):
    main([str(write_config(tmp_path, shapes))])
    text = capsys.readouterr().out
    assert "train.py stops" not in text
    rows = rows_of(text, "class")
    assert list(rows) == SHAPE_NAMES
    for place, split in ((0, "train"), (3, "val")):
        objects = []
        for name in names_of(shapes, split):
            found = boxes_of(shapes / f"Annotations/{name}.xml")
            objects += [(class_name, name) for class_name, _ in found]
        assert f"{split}: {len(objects)} objects, " in text
        for class_name, row in rows.items():
            mine = [name for other, name in objects if other == class_name]
            assert row[place] == str(len(mine))
            assert row[place + 1] == f"{len(mine) / len(objects):.1%}"
            assert row[place + 2] == str(len(set(mine)))

    looked = tmp_path / "run/look"
    assert sorted(path.name for path in looked.iterdir()) == ["train.png", "val.png"]
    for path in looked.iterdir():
        with Image.open(path) as picture:
            assert picture.width == 1600
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["look"]


def test_a_run_begins_where_it_was_looked(tmp_path, shapes):
    path = write_config(tmp_path, shapes)
    main([str(path), "--images", "1"])
    run(train_script, "--config", path, "train.epochs=1", "teacher=null", "distill=null")
    assert (tmp_path / "run/best.pt").exists()


def test_boxes_are_sorted_by_their_shorter_side_as_it_is_trained(tmp_path, shapes, capsys):
    """In images of 200 x 100, of which 64 pixels are trained: a factor of 0.32."""
    sides = {"a": 5, "b": 24, "c": 26, "d": 49, "e": 51, "f": 99}
    for name, side in sides.items():
        box = bndbox(1, 1, side, min(2 * side, 100))
        add(tmp_path / "set", name, xml(thing("star", box), ""), size=(200, 100))
    write_split(tmp_path / "set", "train", *"abcdef")
    write_split(tmp_path / "set", "val", "f")
    main(
        [
            str(write_config(tmp_path, shapes)),
            f"data.root={tmp_path / 'set'}",
            "data.allow_overlap=true",
            "--out",
            str(tmp_path / "out"),
        ]
    )
    text = capsys.readouterr().out
    rows = rows_of(text, "shorter side at 64 px")
    counts = [int(row[0]) for row in rows.values()]
    expected = np.histogram([0.32 * side for side in sides.values()], STEPS)[0]
    assert counts == expected.tolist() == [2, 2, 2, 0, 0, 0]
    assert "warning: 33% of the boxes of train are narrower than a cell" in text
    assert "boxes of val are narrower" not in text
    absent = "circle, square, triangle, ring, cross"
    assert f"no object in train of {absent}: that cannot be learned" in text
    assert "warning: 1 images of val have the pixels of one of train" in text
    assert "train: 5 images have the pixels of another one in it" in text


def test_what_cannot_be_used_is_named_and_the_rest_counted(tmp_path, shapes, capsys):
    folder = tmp_path / "set"
    add(folder, "broken", xml(thing("star")))
    (folder / "JPEGImages/broken.jpg").write_text("<html>")
    add(folder, "half", xml(thing("star") + thing("star", bndbox(9, 9, 4, 4))))
    add(folder, "outside", xml(thing("ring", bndbox(70, 1, 80, 9)) + 2 * thing("star"), ""))
    add(folder, "empty", xml(""))
    add(folder, "hard", xml(thing("ring", extra="<difficult>1</difficult>")))
    add(folder, "good", xml(thing("ring")), size=(50, 30))
    write_split(folder, "train", "broken", "outside", "empty", "hard")
    write_split(folder, "val", "good", "half")
    main([str(write_config(tmp_path, shapes)), f"data.root={folder}"])
    captured = capsys.readouterr()
    assert re.search(r"broken\.jpg: not a usable image", captured.err)
    assert re.search(r"half\.xml: object 2 \('star'\): corners are swapped", captured.err)
    assert "train: 1 of 4 images are bad and left out" in captured.err
    assert "val: 1 objects are bad and left out" in captured.err
    for split in ("train", "val"):
        assert f"{split}: train.py stops for these, unless data.on_bad=skip" in captured.out
    absent = "circle, square, triangle, ring, cross"  # ring is difficult
    assert f"no object in train of {absent}: that cannot be learned" in captured.out
    assert "train: 1 boxes mostly outside the picture in 1 images" in captured.out
    assert (
        "train: 3 objects, 2 at most in an image; 1 images without any; "
        "difficult, which do not count: 1"
    ) in captured.out


def test_a_set_that_stops_a_run_is_still_shown(tmp_path, shapes, capsys):
    folder = tmp_path / "set"
    for name in "ab":
        add(folder, name, xml(""))
        write_split(folder, {"a": "train", "b": "val"}[name], name)
    main([str(write_config(tmp_path, shapes)), f"data.root={folder}"])
    text = capsys.readouterr().out
    assert "train: none of the 1 images has an object; correct their labels; train.py" in text
    assert (tmp_path / "run/look/train.png").exists()


def test_a_share_is_that_of_the_run(tmp_path, shapes, capsys):
    path = write_config(tmp_path, shapes)
    main([str(path), "data.train.splits=[all]", "data.val={share: 0.25}"])
    text = capsys.readouterr().out
    assert "data.val: 8 of the 32 images of data.train, drawn by image" in text
    assert "train: 24 images, long side " in text
    assert not (tmp_path / "run/val.txt").exists()


def test_masks_are_counted_by_pixels_and_drawn(tmp_path, shapes, capsys):
    main([str(write_config(tmp_path, shapes)), *SEGMENTATION])
    rows = rows_of(capsys.readouterr().out, "class")
    counts = np.zeros(256)
    images = 0
    for name in names_of(shapes, "train"):
        with Image.open(shapes / f"SegmentationClass/{name}.png") as picture:
            mask = np.asarray(picture)
        counts += np.bincount(mask.ravel(), minlength=256)
        images += bool((mask == 1).any())
    assert rows["circle"][:2] == [str(images), f"{counts[1] / counts.sum():.2%}"]
    assert rows["void"][1] == f"{counts[255] / counts.sum():.2%}"
    assert (tmp_path / "run/look/train.png").exists()


def test_classes_are_counted_by_images_and_drawn(tmp_path, shapes, capsys):
    main([str(write_config(tmp_path, shapes)), *CLASSIFICATION])
    rows = rows_of(capsys.readouterr().out, "class")
    assert set(SHAPE_NAMES) <= set(rows)
    for place, split in ((0, "train"), (2, "val")):
        names = names_of(shapes, split)
        firsts = [boxes_of(shapes / f"Annotations/{name}.xml")[0][0] for name in names]
        for name in SHAPE_NAMES:
            count = firsts.count(name)
            assert rows[name][place : place + 2] == [str(count), f"{count / len(names):.1%}"]
    assert (tmp_path / "run/look/train.png").exists()


class Other:
    """Of a task that nobody knows."""

    truth = Boxes

    def __init__(self, first: int):
        self.names = ["one", "two"]
        self.first = first

    def __len__(self):
        return 3

    def __getitem__(self, index):
        image = np.full((8, 8, 3), self.first + index, np.uint8)
        return image, {"id": str(index), "angle": 0.5}


def test_another_task_is_one_line(tmp_path, shapes, capsys):
    sections = [
        f"data.{split}={{build: {__name__}:Other, first: {first}}}"
        for split, first in (("train", 0), ("val", 100))
    ]
    main([str(write_config(tmp_path, shapes)), "data.root=null", *sections])
    assert "the targets hold angle, id: no boxes, masks or classes" in capsys.readouterr().out
    assert list((tmp_path / "run/look").iterdir()) == []


def test_rare_classes_are_shown_and_the_rest_evenly():
    labels = [np.array([0])] * 50
    labels[33] = np.array([0, 2])
    labels[44] = np.array([1])
    few = chosen(labels, 6)
    assert len(few) == 6
    assert {33, 44} <= set(few)
    assert few == sorted(few)
    assert max(np.diff([0, *few, 50])) <= 14
    assert chosen(labels[:3], 6) == [0, 1, 2]
    assert chosen([np.array([], int)] * 4, 2) == [0, 2]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["no.yaml"], "no.yaml: cannot be read"),
        (["CONFIG", "data.train.splits=[test]"], "no such split"),
        (["CONFIG", "--out", "CONFIG"], "cannot be made"),
        (["CONFIG", "--images", "0"], "out of range"),
    ],
)
def test_mistakes_are_one_line(tmp_path, shapes, capsys, arguments, words):
    path = str(write_config(tmp_path, shapes))
    with pytest.raises(SystemExit) as left:
        main([path if word == "CONFIG" else word for word in arguments])
    told = left.value.code if isinstance(left.value.code, str) else capsys.readouterr().err
    assert words in told
    assert "\n" not in told.strip().split("error: ")[-1]
    assert not (tmp_path / "run").exists()


def test_images_that_come_twice_are_found_whatever_they_are_called(tmp_path, shapes, capsys):
    root = tmp_path / "set"
    shutil.copytree(shapes, root)
    twin = names_of(shapes, "val")[0]
    shutil.copy(root / f"JPEGImages/{twin}.jpg", root / "JPEGImages/twin.jpg")
    shutil.copy(root / f"Annotations/{twin}.xml", root / "Annotations/twin.xml")
    write_split(root, "train", *names_of(shapes, "train"), "twin")
    main([str(write_config(tmp_path, shapes)), f"data.root={root}"])
    expected = f"as set/{twin} those of set/twin: scores will be too good"
    assert expected in capsys.readouterr().out
