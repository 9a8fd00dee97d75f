"""Odd, hostile and too small data sets: splits, links, folders; and what survives pickling."""

import ast
import hashlib
import importlib
import math
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from kdmini.contracts import UserError
from kdmini.data.loader import Augment, TrainLoader, ValLoader
from kdmini.data.store import Store
from kdmini.detection.average_precision import DetectionMetric
from kdmini.detection.voc import VOC, VOC_NAMES
from kdmini.detection.yolo11.model import YOLO11
from tests.conftest import ROOT
from tests.faults.children import one_line
from tests.faults.own import SHAPES
from tests.faults.record import survived

PHOTOS = ROOT / ".." / "shared" / "data"
TINY = (0.5, 0.0625, 1024)
CANARY = "the words of the canary"
LINKS = "Data: names and links that lead out"
SPLITS = "Data: split files empty, odd, repeating, overlapping"
TOO_LITTLE = "Data: no objects, no detections, too few images"


def tree_hash(root: Path) -> str:
    """Of all that is below, its names, times, modes and contents."""
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        digest.update(f"{path.relative_to(root)} {status.st_mtime_ns} {status.st_mode}".encode())
        digest.update(path.read_bytes() if path.is_file() else b"")
    return digest.hexdigest()


# --- names and links


@pytest.fixture
def outside(own, tmp_path) -> Path:
    """A folder beside the set, with an image a.png and its annotation."""
    folder = tmp_path / "outside"
    folder.mkdir()
    shutil.copy(own.image(own.names()[0]), folder / "a.png")
    secret = f"<annotation><object><name>{CANARY}</name></object></annotation>"
    (folder / "a.xml").write_text(secret)
    return folder


def test_names_that_lead_out_of_the_folder_are_refused(own, outside):
    names = ["../outside/a", str(outside / "a"), "..\\a", "C:\\a", "a\0b", ".."]
    names.append(f"{own.names()[0]}/../../../outside/a")
    leaks = 0
    for hostile in names:
        own.split(hostile)
        with pytest.raises(UserError, match="is not the name of an image") as as_name:
            own.read()
        with pytest.raises(UserError) as as_split:
            VOC(str(own.folder), [hostile], names=SHAPES)
        leaks += CANARY in str(as_name.value) + str(as_split.value)
    survived(LINKS, leaks, of="files read", tried=2 * len(names))


def test_a_filename_in_the_xml_is_never_a_path(own, outside):
    name = own.names()[0]
    elsewhere = f"<filename>{outside}/a.png</filename>"
    text = re.sub("<filename>.*?</filename>", elsewhere, own.xml(name).read_text())
    assert elsewhere in text
    own.xml(name).write_text(text)
    assert own.read().records[0].image == str(own.image(name))


def test_links_that_lead_out_of_the_folder_are_refused(own, outside, train, capsys):
    name = own.names()[0]
    own.split(name)
    output = ""
    for path, target, called in (
        (own.xml(name), outside / "a.xml", f"{name}.xml"),
        (own.image(name), outside / "a.png", f"{name}.jpg"),
    ):
        content = path.read_bytes()
        path.unlink()
        path.symlink_to(target)
        refusal = f"{called}: a link that leads out of the set; put a copy"
        output += one_line(train("train.batch=1"), refusal)
        path.unlink()
        path.write_bytes(content)
    captured = capsys.readouterr()
    output += captured.out + captured.err
    survived(LINKS, int(CANARY in output), of="files read", tried=2)


# --- splits


def test_split_files_of_every_kind_are_read_or_named(own, train, capsys):
    first, second = own.names()[:2]
    for text in (
        f"{first}\r\n{second}\r\n",
        f"\ufeff{first}\n\n\n  {second}  ",
        f"{first} -1\n{second}  1\n",
        f"{first}\n{second}\n{first}\n",
    ):
        own.split_file().write_bytes(text.encode())
        assert [target["id"] for target in own.store().targets] == [f"own/{first}", f"own/{second}"]
    assert "train: 1 repeated images taken once" in capsys.readouterr().out

    for text in ("", "\r\n \n"):
        own.split_file().write_text(text)
        one_line(train(), "split 'train' lists no image")
    own.split_file().unlink()
    one_line(train(), "train.txt: no such split (val, and `all`)")
    survived(SPLITS, tried=7)


def test_an_overlap_of_train_and_val_stops_unless_it_is_allowed(own, train):
    in_both = own.names("val")[0]
    own.split(*own.names(), in_both)
    one_line(train(), "1 images are in train and val both", in_both, "allow_overlap")
    done = train("data.allow_overlap=true")
    assert done.code == 0, done.text
    survived(SPLITS, tried=2)


# --- too little


def test_a_batch_of_images_without_objects_trains(own, train):
    empty = "<annotation><size><width>64</width><height>64</height></size></annotation>"
    for name in own.names()[1:]:
        own.xml(name).write_text(empty)
    torch.manual_seed(0)
    model = YOLO11(SHAPES, scale=TINY).train()
    batches = TrainLoader(own.store(), 8, 1, Augment(mosaic=0)).epoch(0)
    images, targets = next(batch for batch in batches if (batch[1]["labels"] == -1).all())
    losses = model.loss(model(images), targets)
    sum(losses.values()).backward()
    assert losses["cls"] > 0
    assert all(value.isfinite() for value in losses.values())
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)

    done = train("train.lr0=0.0001")
    assert done.code == 0, done.text
    assert "skipped" not in done.text
    assert "nan" not in done.text

    own.xml(own.names()[0]).write_text(empty)
    with pytest.raises(UserError, match="train: none of the 24 images has an object"):
        own.store()
    survived(TOO_LITTLE, tried=3)


ROBNDBOX = "<robndbox><cx>9</cx><cy>9</cy><w>4</w><h>4</h><angle>0.1</angle></robndbox>"


def in_parts(text: str) -> str:
    return re.sub(r"(min>|max>)\d+<", r"\g<1>0.5<", text)


def wrapped(text: str) -> str:
    """All objects in one more element."""
    text = text.replace("<object>", "<objects><object>", 1)
    return "</object></objects>".join(text.rsplit("</object>", 1))


def rotated(text: str) -> str:
    return re.sub("<bndbox>.*?</bndbox>", ROBNDBOX, text, flags=re.DOTALL)


def enlarged(text: str) -> str:
    """Boxes of an image twice as large, of no stated size."""
    text = re.sub("<size>.*?</size>", "", text, flags=re.DOTALL)
    return re.sub(r"(min>|max>)(\d+)<", lambda m: f"{m[1]}{2 * int(m[2]) + 40}<", text)


def emptied(text: str) -> str:
    return re.sub("<object>.*</object>", "", text, flags=re.DOTALL)


LOST = {  # what is done to every XML -> what is said
    in_parts: "are parts of the sides",
    wrapped: "<object> within <objects>",
    rotated: "no <bndbox> but <robndbox>",
    enlarged: "boxes lie outside their images",
    emptied: "none of the 24 images has an object",
}


@pytest.mark.parametrize("spoil", LOST)
@pytest.mark.parametrize("on_bad", ["stop", "skip"])
def test_training_on_no_object_at_all_stops_with_the_reason(own, spoil, on_bad):
    for name in own.names():
        own.xml(name).write_text(spoil(own.xml(name).read_text()))
    with pytest.raises(UserError) as error:
        own.store(on_bad)
    assert LOST[spoil] in str(error.value)
    assert "\n" not in str(error.value)
    survived("Data: all boxes lost for one reason")


def test_no_detections_at_all_score_zero(own):
    own.split(*own.names("val"))
    metric = DetectionMetric(SHAPES)
    none = {
        "boxes_xyxy": torch.zeros(0, 4),
        "scores": torch.zeros(0),
        "labels": torch.zeros(0, dtype=torch.int64),
    }
    for _, targets, to_file in ValLoader(own.store(), 3):
        metric.update(to_file([none] * len(targets)), targets)
    assert set(metric.compute().values()) == {0.0}
    assert metric.official()["AP50"] == 0.0
    survived(TOO_LITTLE)


def test_fewer_images_than_a_batch_stop_before_the_first_epoch(own, train):
    done = train("data.limit=3")
    one_line(done, "train.batch: 8 is more than the 3 training images")
    assert "epoch 1" not in done.text

    # a batch is there only as long as all files are whole
    own.split(*own.names()[:8])
    own.image(own.names()[0]).write_bytes(b"")
    done = train("data.on_bad=skip")
    one_line(done, "train.batch: 8 is more than the 7 training images")
    assert "epoch 1" not in done.text
    survived(TOO_LITTLE, tried=2)


# --- the folder, real files


def test_the_folder_is_only_read(own, train):
    own.image(own.names()[0]).write_bytes(b"")
    everything = [own.folder, *own.folder.rglob("*")]
    for path in everything:
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = tree_hash(own.folder)
    try:
        done = train("data.on_bad=skip")
        assert done.code == 0, done.text
        one_line(train(f"run={own.folder.parent / 'another'}"))
        changed = tree_hash(own.folder) != before
    finally:
        for path in everything:
            path.chmod(0o755 if path.is_dir() else 0o644)
    survived("Data: the folder read-only", int(changed), of="files changed", tried=2)


MESSY_CLASSES = ["RBC", "WBC", "Platelets", "vehicle", "handbag", "head", "helmet", "raccoon"]


def copy_messy(folder: Path) -> set[str]:
    """All real, messy files in one set -> the names of the images in it."""
    for part in ("Annotations", "JPEGImages"):
        (folder / part).mkdir()
    names = set()
    for source in sorted((PHOTOS / "messy").rglob("*")):
        if not source.is_file():
            continue
        name = f"{source.parent.name}_{source.stem}"
        part = "Annotations" if source.suffix == ".xml" else "JPEGImages"
        shutil.copy(source, folder / part / f"{name}{source.suffix}")
        if source.parent.name == "pixels":  # images alone
            (folder / "Annotations" / f"{name}.xml").write_text("<annotation/>")
        if source.suffix != ".xml":
            assert name not in names
            names.add(name)
    return names


@pytest.mark.skipif(not PHOTOS.is_dir(), reason="no real photographs beside the repository")
def test_every_real_messy_file_comes_through(tmp_path):
    names = copy_messy(tmp_path)
    dataset = VOC(str(tmp_path), ["all"], names=[*VOC_NAMES, *MESSY_CLASSES])
    assert len(dataset) == len(names)
    store = Store(dataset, 320, workers=2, storage="resident")
    seen = 0
    for images, targets, _ in ValLoader(store, 4):
        assert images.isfinite().all()
        assert images.min() >= 0
        assert images.max() <= 1
        assert images.std() > 0.05
        for target in targets:
            boxes = target["boxes_xyxy"]
            height, width = store.native[seen]
            assert (boxes >= 0).all()
            assert (boxes[:, 2:] <= [width, height]).all()
            assert (boxes[:, 2:] - boxes[:, :2] >= 1).all()
            assert len(boxes) or target["id"].split("/")[1].startswith("pixels")
            seen += 1
    assert seen == len(names)
    survived("Data: photographs from real, messy sets", tried=seen)


# --- pickling


def raised_in(path: Path) -> set[type]:
    """The classes of the errors that a module of kdmini raises by a call of the class."""
    dotted = path.relative_to(ROOT).with_suffix("").parts
    module = importlib.import_module(".".join(dotted).removesuffix(".__init__"))
    kinds = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            kind = module
            for name in ast.unparse(node.exc.func).split("."):
                kind = getattr(kind, name)
            kinds.add(kind)
    return kinds


def test_errors_survive_pickling():
    paths = [*(ROOT / "kdmini/data").glob("*.py"), ROOT / "kdmini/detection/voc.py"]
    kinds = set().union(*map(raised_in, paths))
    assert UserError in kinds
    for kind in kinds:
        error = kind("a.jpg: not a usable image")
        again = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes
        assert type(again) is kind
        assert str(again) == "a.jpg: not a usable image"


def test_datasets_survive_pickling(own):
    dataset = own.read()
    again = pickle.loads(pickle.dumps(dataset))  # noqa: S301 - our own bytes
    assert len(again) == len(dataset)
    assert again.photographs == dataset.photographs
    image, target = again[0]
    assert np.array_equal(image, dataset[0][0])
    assert math.isfinite(target["boxes_xyxy"].sum())
