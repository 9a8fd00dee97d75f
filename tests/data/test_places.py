"""Folders of images and XML files in every layout, against the same ones laid out like VOC."""

import shutil

import pytest

from examples.shapes import SHAPE_NAMES
from kdmini.contracts import UserError
from kdmini.detection.coco_json import CocoJson
from kdmini.detection.voc import VOC
from kdmini.detection.yolo_txt import YoloTxt
from tests.data.layouts import (
    assert_same,
    by_name,
    names_of,
    write,
    write_coco,
    write_yolo,
)

BELOW = {"nested", "mirrored"}
OF_SPLITS = {
    "roboflow": {"train": ["train"], "val": ["valid"]},
    "splits_in_two": {"train": ["train"], "val": ["val"]},
}
WORDS = {
    "beside": "all: 32 annotated images in '.', their XML files beside them",
    "in_two": "all: 32 annotated images in 'images', their XML files in 'annotations'",
    "in_one_below": "all: 32 annotated images in 'export', their XML files beside them",
    "images_and_below": "all: 32 annotated images in '.', their XML files in 'xml'",
    "nested": "32 annotated images in 'some day' and the folders below, their XML files beside",
    "mirrored": "all: 32 annotated images in 'photos', their XML files in 'labels'",
}


@pytest.mark.parametrize("layout", WORDS)
def test_a_folder_is_read_with_nothing_said_of_its_layout(tmp_path, shapes, capsys, layout):
    write(layout, shapes, tmp_path / "set")
    settings = {"recursive": True} if layout in BELOW else {}
    found = VOC(str(tmp_path / "set"), names=SHAPE_NAMES, **settings)
    assert WORDS[layout] in capsys.readouterr().out
    assert_same(found, VOC(str(shapes), ["all"], SHAPE_NAMES))
    assert [found[index][1]["id"] for index in range(len(found))] == found.ids
    assert len(found.photographs) == 32


@pytest.mark.parametrize("layout", OF_SPLITS)
def test_a_folder_for_each_split_is_named_as_the_split(tmp_path, shapes, layout):
    write(layout, shapes, tmp_path)
    sets = {}
    for split, splits in OF_SPLITS[layout].items():
        sets[split] = VOC(str(tmp_path), splits, SHAPE_NAMES)
        assert_same(sets[split], VOC(str(shapes), [split], SHAPE_NAMES))
    assert not sets["train"].photographs & sets["val"].photographs
    both = [*OF_SPLITS[layout]["train"], *OF_SPLITS[layout]["val"]]
    together = VOC(str(tmp_path), both, SHAPE_NAMES)
    assert together.photographs == sets["train"].photographs | sets["val"].photographs
    assert_same(together, VOC(str(shapes), ["all"], SHAPE_NAMES))


def test_a_photograph_is_known_from_whichever_folder_it_is_named(tmp_path, shapes):
    write("roboflow", shapes, tmp_path)
    whole = VOC(str(tmp_path), names=SHAPE_NAMES, recursive=True)
    part = VOC(str(tmp_path), ["valid"], SHAPE_NAMES)
    assert len(whole.photographs & part.photographs) == len(part)
    less = VOC(str(tmp_path), names=SHAPE_NAMES, recursive=True, exclude=["valid"])
    assert len(less) == len(whole) - len(part)


def test_several_folders_with_xml_are_named(tmp_path, shapes):
    write("roboflow", shapes, tmp_path)
    for splits in (["all"], ["val"]):
        with pytest.raises(UserError, match=r"XML files lie in train, valid; name those .*recurs"):
            VOC(str(tmp_path), splits, SHAPE_NAMES)


def test_files_further_down_are_named(tmp_path, shapes):
    write("nested", shapes, tmp_path)
    said = r"lie further down, as in some day/camera 0; write `splits: \[some day/camera 0\]`"
    with pytest.raises(UserError, match=said):
        VOC(str(tmp_path), names=SHAPE_NAMES)


def test_an_archive_within_a_folder_is_read_as_it_is_said(tmp_path, shapes):
    write("in_two", shapes, tmp_path / "download/export")
    said = r"as in download/export/annotations; write `splits: \[download/export\]`, or"
    with pytest.raises(UserError, match=said):
        VOC(str(tmp_path), names=SHAPE_NAMES)
    assert len(VOC(str(tmp_path), ["download/export"], SHAPE_NAMES)) == 32


@pytest.mark.parametrize(
    "layout, split, places",
    [
        ("beside", "all", (".", ".")),
        ("in_two", "all", ("images", "annotations")),
        ("in_one_below", "all", ("export", "export")),
        ("splits_in_two", "all", ("train/images", "train/labels")),
        ("roboflow", "train/all", (".", ".")),
    ],
)
def test_folders_may_be_named(tmp_path, shapes, layout, split, places):
    write(layout, shapes, tmp_path)
    images, annotations = places
    found = VOC(str(tmp_path), [split], SHAPE_NAMES, images=images, annotations=annotations)
    whole = "train" if "train" in (*images.split("/"), *split.split("/")) else "all"
    assert_same(found, VOC(str(shapes), [whole], SHAPE_NAMES))
    with pytest.raises(UserError, match=r"no such folder, or no nowhere in it"):
        VOC(str(tmp_path), ["all"], SHAPE_NAMES, images=images, annotations="nowhere")


def test_images_that_are_none_of_the_xml_files_are_refused(tmp_path, shapes):
    write("in_two", shapes, tmp_path)
    for path in (tmp_path / "annotations").iterdir():
        path.rename(path.with_name(f"x{path.name}"))
    with pytest.raises(UserError, match=r"no image has the name of an XML file in 'annotations'"):
        VOC(str(tmp_path), names=SHAPE_NAMES)


def test_a_list_that_is_not_there_names_the_way_without_lists(tmp_path, shapes):
    write("beside", shapes, tmp_path)
    with pytest.raises(UserError, match=r"leave `splits` out, and write `val: \{share: 0\.2\}`"):
        VOC(str(tmp_path), ["train"], SHAPE_NAMES)


@pytest.mark.parametrize("layout", [*WORDS, "splits_in_two"])
@pytest.mark.parametrize("background", [True, False])
def test_an_image_without_xml_is_background_in_every_layout(tmp_path, shapes, layout, background):
    write(layout, shapes, tmp_path)
    first = names_of(shapes, "train")[0]
    [path] = tmp_path.rglob(f"{first}.xml")
    path.unlink()
    splits = ["train"] if layout in OF_SPLITS else ["all"]
    settings = {"background": background, "recursive": layout in BELOW}
    found = by_name(VOC(str(tmp_path), splits, SHAPE_NAMES, **settings))
    assert (first in found) == background
    if background:
        assert len(found[first][1]["labels"]) == 0


def test_folders_below_one_of_both_kinds_are_said_if_not_read(tmp_path, shapes, capsys):
    write("beside", shapes, tmp_path)
    more = tmp_path / "more"
    more.mkdir()
    first = names_of(shapes, "train")[0]
    for ending in ("jpg", "xml"):
        (tmp_path / f"{first}.{ending}").rename(more / f"{first}.{ending}")
    (tmp_path / "empty").mkdir()
    assert len(VOC(str(tmp_path), names=SHAPE_NAMES)) == 31
    assert "1 folders in . not read (or set recursive=true)" in capsys.readouterr().out
    assert len(VOC(str(tmp_path), names=SHAPE_NAMES, recursive=True)) == 32


def test_one_name_in_two_folders_is_two_images(tmp_path, shapes):
    name = names_of(shapes, "train")[0]
    for camera in ("left", "right"):
        (tmp_path / "set" / camera).mkdir(parents=True)
        for source in (f"JPEGImages/{name}.jpg", f"Annotations/{name}.xml"):
            shutil.copy(shapes / source, tmp_path / "set" / camera)
    found = VOC(str(tmp_path / "set"), names=SHAPE_NAMES, recursive=True)
    assert found.ids == [f"set/left/{name}", f"set/right/{name}"]
    assert len(found.photographs) == 2


def test_hidden_folders_and_those_of_macos_are_passed_over(tmp_path, shapes):
    write("beside", shapes, tmp_path)
    first = names_of(shapes, "train")[0]
    for folder in (".ipynb_checkpoints", "__MACOSX"):
        (tmp_path / folder).mkdir()
        shutil.copy(tmp_path / f"{first}.xml", tmp_path / folder)
        shutil.copy(tmp_path / f"{first}.jpg", tmp_path / folder)
    assert len(VOC(str(tmp_path), names=SHAPE_NAMES, recursive=True)) == 32


# --- the same set in other forms


def test_yolo_text_and_coco_json_give_the_boxes_of_the_xml_files(tmp_path, shapes):
    write_yolo(shapes, tmp_path / "yolo", SHAPE_NAMES, ("train", "val"))
    write_coco(shapes, tmp_path / "coco", SHAPE_NAMES, ("train", "val"))
    for split in ("train", "val"):
        voc = VOC(str(shapes), [split], SHAPE_NAMES)
        assert_same(YoloTxt(str(tmp_path / "yolo"), f"images/{split}"), voc, atol=1e-4)
        json = f"{split}/_annotations.coco.json"
        assert_same(CocoJson(str(tmp_path / "coco"), json, split), voc, atol=1e-4)
    whole = YoloTxt(str(tmp_path / "yolo"), "images", recursive=True)
    assert_same(whole, VOC(str(shapes), ["all"], SHAPE_NAMES), atol=1e-4)
    part = YoloTxt(str(tmp_path / "yolo"), "images/val")
    assert len(whole.photographs & part.photographs) == len(part)


def test_text_files_beside_the_images_are_read_as_labelimg_leaves_them(tmp_path, shapes):
    write_yolo(shapes, tmp_path / "yolo", SHAPE_NAMES, ("val",))
    folder = tmp_path / "flat"
    shutil.copytree(tmp_path / "yolo/images/val", folder)
    shutil.copytree(tmp_path / "yolo/labels/val", folder, dirs_exist_ok=True)
    (folder / "classes.txt").write_text("\r\n".join([*SHAPE_NAMES, ""]))
    found = YoloTxt(str(folder), images=".", names="classes.txt")
    assert found.names == SHAPE_NAMES
    assert_same(found, VOC(str(shapes), ["val"], SHAPE_NAMES), atol=1e-4)
