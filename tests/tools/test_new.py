"""New projects: what is found in each layout, what is written, and that it trains."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from examples.shapes import SHAPE_NAMES, write_set
from kdmini import config
from kdmini.assemble import make_run
from kdmini.optim import Recipe
from kdmini.progress import Progress
from kdmini.sections import Sections
from kdmini.tools.new import main
from kdmini.tools.new_config import BATCH, EPOCHS, FEW, recipe
from kdmini.yamltext import parse
from tests.conftest import TINY
from tests.data.layouts import WRITERS, write, write_coco, write_yolo
from tests.data.voc_folder import add, thing, xml

SHARE = {"share": 0.2}
SPLITS = ("train", "val")
LISTED = [{"splits": [split]} for split in SPLITS]
DEEP = {"recursive": True}
JSON = "_annotations.coco.json"
FOUND = {  # layout -> what the sections say beside build and names
    "beside": ({}, SHARE),
    "in_two": ({}, SHARE),
    "in_one_below": ({}, SHARE),
    "images_and_below": ({}, SHARE),
    "roboflow": ({"splits": ["train"]}, {"splits": ["valid"]}),
    "splits_in_two": LISTED,
    "nested": (DEEP, SHARE),
    "mirrored": (DEEP, SHARE),
    "voc": LISTED,
    "yolo": [{"images": f"images/{split}"} for split in SPLITS],
    "yolo of Roboflow": [{"images": f"{split}/images"} for split in ("train", "valid")],
    "yolo side by side": ({"images": "."}, SHARE),
    "coco": [{"annotations": f"{split}/{JSON}", "images": split} for split in SPLITS],
    "coco in folders": [
        {"annotations": f"annotations/instances_{split}2017.json", "images": f"{split}2017"}
        for split in SPLITS
    ],
    "coco, one file": ({"annotations": "labels.json", "images": "photos"}, SHARE),
    "masks": LISTED,
    "classes": [{"split": split} for split in SPLITS],
    "classes without splits": ({"split": "."}, SHARE),
}
ALONE = (f"student.scale={TINY}", "student.weights=null")
TAUGHT = (*ALONE, f"teacher.scale={TINY}")


def lay_out(layout: str, shapes: Path, out: Path) -> None:
    """The generated scenes, in another layout."""
    if layout in WRITERS:
        write(layout, shapes, out)
    elif layout in ("voc", "masks"):
        shutil.copytree(shapes, out)
        if layout == "masks":
            shutil.rmtree(out / "Annotations")
    elif layout.startswith("yolo"):
        write_yolo(shapes, out, SHAPE_NAMES, SPLITS)
        shutil.rmtree(out / "images/unused", ignore_errors=True)
        shutil.rmtree(out / "unused")
        rearrange_yolo(layout, out)
    elif layout.startswith("coco"):
        write_coco(shapes, out, SHAPE_NAMES, ("train",) if "one" in layout else SPLITS)
        shutil.rmtree(out / "unused")
        rearrange_coco(layout, out)
    else:
        write_set(out, train=24, val=8, size=64, folders=True)
        if layout == "classes without splits":
            shutil.move(out / "train", out.with_name("train"))
            shutil.rmtree(out)
            out.with_name("train").rename(out)


def rearrange_yolo(layout: str, out: Path) -> None:
    for kind in ("images", "labels"):
        for split in SPLITS:
            if layout == "yolo of Roboflow":
                folder = out / split.replace("val", "valid")
                folder.mkdir(exist_ok=True)
                (out / kind / split).rename(folder / kind)
            if layout == "yolo side by side":
                for path in (out / kind / split).iterdir():
                    path.rename(out / path.name)
        if layout != "yolo":
            shutil.rmtree(out / kind)
    if layout == "yolo side by side":
        (out / "data.yaml").unlink()
        (out / "classes.txt").write_text("\n".join(SHAPE_NAMES))


def rearrange_coco(layout: str, out: Path) -> None:
    if layout == "coco, one file":
        (out / "train" / JSON).rename(out / "labels.json")
        (out / "train").rename(out / "photos")
    if layout == "coco in folders":
        (out / "annotations").mkdir()
        for split in SPLITS:
            (out / split / JSON).rename(out / f"annotations/instances_{split}2017.json")
            (out / split).rename(out / f"{split}2017")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the process, with no weights in reach."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KDMINI_CACHE", str(tmp_path / "cache"))
    return tmp_path


def assert_begins(path: str, *overrides: str) -> None:
    """What train.py does until the first step."""
    settings = config.load(path, ["allow_void=true", "device=cpu", *overrides])
    sections = config.call(Sections, settings, path)
    assert sections.run in ("mine/student", "mine/teacher")
    begun = make_run(sections, sections.recipe(), torch.device("cpu"), Progress())
    sections.make_metric(begun.names)
    assert len(begun.training.loader) > 0
    assert (begun.teacher is not None) == ("teacher" in settings)


@pytest.mark.parametrize("layout", FOUND)
def test_every_layout_is_found_and_its_configs_are_accepted(
    layout: str, here: Path, shapes: Path
) -> None:
    lay_out(layout, shapes, here / "photos")
    main(["mine", "--data", "photos"])
    data = config.load("mine/config.yaml")["data"]
    train, val = FOUND[layout]
    boxed = {"build", "names"} if not layout.startswith("classes") else {"build"}
    for section, expected in ((data["train"], train), (data["val"], val)):
        rest = {key: section[key] for key in section.keys() - boxed}
        assert rest == expected
    assert data["root"] == "photos"
    assert data["imgsz"] == (128 if layout == "masks" else 64)
    if layout == "masks":
        assert data["train"]["names"] == ["background", *(f"class {i}" for i in range(1, 7))]
    elif boxed == {"build", "names"}:
        assert set(data["train"]["names"]) == set(SHAPE_NAMES)
    for path in (here / "mine").iterdir():
        sections = config.call(Sections, config.load(path), str(path))
        assert sections.recipe().batch <= 24
        sets = sections.sets()
        is_one = layout in ("coco, one file", "classes without splits")
        assert len(sets.train) + len(sets.val) == (24 if is_one else 32)
        sections.make_metric(sets.train.names)


@pytest.mark.parametrize(
    "layout, of_config, of_teacher",
    [
        ("beside", (*TAUGHT, "teacher.weights=null"), ALONE),
        ("masks", ("teacher.weights=null",), ()),
        ("classes", (), None),
    ],
)
def test_every_task_begins(
    layout: str,
    of_config: tuple[str, ...],
    of_teacher: tuple[str, ...] | None,
    here: Path,
    shapes: Path,
) -> None:
    lay_out(layout, shapes, here / "photos")
    main(["mine", "--data", "photos"])
    assert_begins("mine/config.yaml", *of_config)
    assert (here / "mine/teacher.yaml").exists() == (of_teacher is not None)
    if of_teacher is not None:
        assert_begins("mine/teacher.yaml", *of_teacher)


def test_the_commands_are_printed_in_their_order(
    here: Path, shapes: Path, capsys: pytest.CaptureFixture
) -> None:
    lay_out("beside", shapes, here / "photos")
    main(["mine", "--data", "photos"])
    lines = capsys.readouterr().out.splitlines()[-4:]
    module = "python -m kdmini.tools"
    assert lines == [
        f"fetch:    {module}.download --weights yolo11s.pt yolo11m.pt",
        f"look:     {module}.look mine/config.yaml",
        f"teacher:  {module}.train --config mine/teacher.yaml",
        f"student:  {module}.train --config mine/config.yaml",
    ]


def test_a_network_of_its_own_size_begins_from_its_file_and_learns_alone(
    here: Path, shapes: Path, teacher_file: Path, capsys: pytest.CaptureFixture
) -> None:
    lay_out("beside", shapes, here / "photos")
    main(["mine", "--data", "photos", "--weights", str(teacher_file)])
    *_, look, train, evaluate = capsys.readouterr().out.splitlines()
    assert look.startswith("look: ")
    assert train.startswith("student: ")
    assert evaluate.endswith("eval --config mine/config.yaml --weights mine/student/best.pt")
    settings = config.load("mine/config.yaml")
    assert settings["student"]["scale"] == parse(TINY, "")
    assert settings.keys().isdisjoint({"teacher", "distill"})
    assert_begins("mine/config.yaml")

    teacher = ("--teacher", "yolo11n.pt")
    main(["taught", "--data", "photos", "--weights", str(teacher_file), *teacher])
    assert config.load("taught/teacher.yaml")["student"]["weights"]["path"] == "yolo11n.pt"


def test_strange_names_are_written_so_that_they_are_read(here: Path) -> None:
    names = ["no", "1", "5e-4", "a: b", "cat, big", "{x}", "#", "개", "it's", "null"]
    for number, name in enumerate(names):
        add(here / "photos", f"a{number}", xml(thing(name)))
    main(["mine", "--data", "photos"])
    for file in ("config", "teacher"):
        assert config.load(f"mine/{file}.yaml")["data"]["train"]["names"] == sorted(names)


def test_nothing_is_overwritten_and_nothing_lies_among_the_images(here: Path, shapes: Path) -> None:
    lay_out("beside", shapes, here / "photos")
    (here / "mine").mkdir()  # an empty one will do
    main(["mine", "--data", "photos"])
    before = {path: path.read_text() for path in (here / "mine").iterdir()}
    with pytest.raises(SystemExit, match="mine: exists already, and nothing is overwritten"):
        main(["mine", "--data", "photos"])
    assert {path: path.read_text() for path in (here / "mine").iterdir()} == before
    with pytest.raises(SystemExit, match="photos/mine: lies in --data photos"):
        main(["photos/mine", "--data", "photos"])
    assert not (here / "photos/mine").exists()


def test_a_folder_of_voc_serves_two_tasks(here: Path, shapes: Path) -> None:
    main(["mine", "--data", str(shapes), "--task", "masks"])
    assert config.load("mine/config.yaml")["data"]["train"]["splits"] == ["train"]


def spoil(kind: str, folder: Path) -> None:
    folder.mkdir()
    picture = folder / "a.jpg"
    Image.new("RGB", (64, 64)).save(picture)
    if kind == "empty":
        picture.unlink()
    elif kind == "no images":
        picture.rename(folder / "a.txt")
    elif kind == "damaged":
        add(folder, "b", xml(thing("star")))
        for path in folder.rglob("*.jpg"):
            path.write_text("<html>")
    elif kind == "no names":
        (folder / "a.txt").write_text("0 0.5 0.5 0.2 0.2")
    elif kind == "two JSONs":
        image = {"id": 1, "file_name": "a.jpg"}
        thing_ = {"image_id": 1, "category_id": 1, "bbox": [1, 1, 9, 9]}
        content = {"images": [image], "annotations": [thing_]}
        content["categories"] = [{"id": 1, "name": "cat"}]
        for name in ("one", "two"):
            (folder / f"{name}.json").write_text(json.dumps(content))
    elif kind == "masks of colours":
        (folder / "SegmentationClass").mkdir()
        Image.new("RGB", (64, 64)).save(folder / "SegmentationClass/a.png")
    elif kind == "VOC further down":  # beside what could be read by itself
        add(folder / "VOC2012", "b", xml(thing("star")))
        (folder / "a.xml").write_text(xml(thing("star")))


@pytest.mark.parametrize(
    "kind, words",
    [
        ("empty", "the folder is empty"),
        ("no images", "no image in it, nor in the folders below"),
        ("only images", "1 images, and nothing that says what is on them; looked for COCO JSON, "),
        ("damaged", "none of its images can be opened"),
        ("no names", "no file that names their classes; add data.yaml"),
        ("two JSONs", "which of one.json, two.json is to learn from"),
        ("masks of colours", "a mask of RGB colours, which are no class indices"),
        ("VOC further down", "laid out like VOC in VOC2012; name one such folder"),
    ],
)
def test_what_cannot_be_used_is_one_line(here: Path, kind: str, words: str) -> None:
    spoil(kind, here / "photos")
    with pytest.raises(SystemExit) as left:
        main(["mine", "--data", "photos"])
    assert words in str(left.value.code)
    assert "\n" not in str(left.value.code)
    assert not (here / "mine").exists()


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--data", "nowhere"], "nowhere: no such folder"),
        (["--data", "photos", "--weights", "mine.pt"], "weights 'mine.pt' are not there"),
        (["--data", "photos", "--task", "classes"], "nothing that says what is on them"),
    ],
)
def test_a_mistake_is_one_line(here: Path, shapes: Path, arguments: list[str], words: str) -> None:
    lay_out("beside", shapes, here / "photos")
    with pytest.raises(SystemExit, match=words):
        main(["mine", *arguments])
    assert not (here / "mine").exists()


@pytest.mark.parametrize("task", BATCH)
@pytest.mark.parametrize("images", [1, 3, 17, 60, 299, 300, FEW - 1, FEW, 20_000])
def test_the_recipe_fits_the_number_of_images(task, images: int) -> None:
    settings = parse(recipe(task, images), "")["train"]
    stated = config.call(Recipe, settings, "train")
    steps = images // stated.batch
    assert steps > 0
    assert stated.warmup(steps) < 0.1 * stated.epochs * steps
    if images < FEW:
        assert stated.accumulate == 1
    if task == "boxes":  # of public weights
        assert stated.epochs == (50 if images < 2000 else 60)
        assert len(stated.freeze) == (11 if images < 2000 else 0)
    else:
        assert stated.epochs == (150 if images < 300 else 100 if images < 2000 else 60)
    assert max(EPOCHS) < FEW
