"""Damaged, hostile and odd data, from the folder to the batch and through the command line."""

import ast
import hashlib
import importlib
import io
import math
import pickle
import re
import resource
import shutil
import struct
import time
import xml.etree.ElementTree as ET
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

import train as train_script
from kdmini.contracts import UserError
from kdmini.data.loader import Augment, TrainLoader, ValLoader
from kdmini.data.pictures import decode
from kdmini.data.store import Store
from kdmini.detection.average_precision import DetectionMetric
from kdmini.detection.voc import VOC, VOC_NAMES
from kdmini.detection.yolo11.model import YOLO11
from tests.conftest import ROOT
from tests.faults.children import Done, run, script
from tests.faults.record import survived

PHOTOS = ROOT / ".." / "shared" / "data"
SHAPES = ["circle", "square", "triangle", "star", "ring", "cross"]
TINY = (0.5, 0.0625, 1024)
CANARY = "the words of the canary"


class Own(NamedTuple):
    """A copy of the generated set that a test may spoil."""

    folder: Path

    def names(self, split: str = "train") -> list[str]:
        return (self.folder / "ImageSets" / "Main" / f"{split}.txt").read_text().split()

    def image(self, name: str) -> Path:
        (path,) = (self.folder / "JPEGImages").glob(f"{name}.*")
        return path

    def xml(self, name: str) -> Path:
        return self.folder / "Annotations" / f"{name}.xml"

    def split(self, *lines: str, split: str = "train") -> None:
        (self.folder / "ImageSets" / "Main" / f"{split}.txt").write_text(
            "".join(f"{line}\n" for line in lines)
        )

    def read(self, **settings) -> VOC:
        return VOC(str(self.folder), ["train"], names=SHAPES, **settings)

    def store(self, on_bad="stop") -> Store:
        return Store(self.read(), 64, workers=2, storage="resident", on_bad=on_bad, name="train")


@pytest.fixture
def own(tmp_path, shapes) -> Own:
    return Own(Path(shutil.copytree(shapes, tmp_path / "own")))


@pytest.fixture
def train(tmp_path, config_file, own) -> Callable[..., Done]:
    """-> a call of train.py on the copy, with overrides; of one epoch, where it comes to that."""

    def start(*overrides: str) -> Done:
        command = ("--config", config_file, f"data.root={own.folder}", "train.epochs=1", *overrides)
        return run(script(train_script, *command), tmp_path / "out")

    return start


def one_line(done: Done) -> str:
    """The last line of a run that ended as a mistake of the user ends."""
    assert done.code == 1 and done.last.startswith("error: ") and "Traceback" not in done.text, (
        done.text
    )
    return done.last


def tree_hash(root: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        digest.update(f"{path.relative_to(root)} {status.st_mtime_ns} {status.st_mode}".encode())
        digest.update(path.read_bytes() if path.is_file() else b"")
    return digest.hexdigest()


def pixels(store: Store, index: int) -> np.ndarray:
    """(H, W, 3) as the store keeps it."""
    height, width = store.sizes[index]
    flat = store.pixels[store.offsets[index] :][: height * width].numpy()
    return flat.astype("<i4").view(np.uint8).reshape(height, width, 4)[..., :3]


# --- image files

PAGE = b"<!DOCTYPE html><html><head><title>404</title></head></html>"


def jpeg(size=(64, 64), **settings) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "JPEG", **settings)
    return file.getvalue()


DAMAGED = {
    "half": jpeg()[: len(jpeg()) // 2],
    "nine tenths": jpeg(progressive=True)[: len(jpeg(progressive=True)) * 9 // 10],
    "zero bytes": b"",
    "header": jpeg()[:20],
    "page": PAGE,
    "zeroes": bytes(5000),
    "text": b"not a picture\n" * 100,
}


def test_damaged_images_are_listed_together_or_skipped(own, train):
    bad = dict(zip(own.names(), DAMAGED, strict=False))
    for name, kind in bad.items():
        own.image(name).unlink()
        (own.folder / "JPEGImages" / f"{name}.jpg").write_bytes(DAMAGED[kind])

    done = train()
    last = one_line(done)
    assert f"train: {len(bad)} of 24 images are bad" in last and "data.on_bad=skip" in last
    listed = re.findall(
        r"^\S*/(\w+)\.jpg: not a usable image \(.+\); replace the file$", done.text, re.MULTILINE
    )
    assert listed == list(bad)
    assert not (own.folder.parent / "run" / "ckpt").exists()

    done = train("data.on_bad=skip")
    assert done.code == 0 and f"train: {len(bad)} of 24 images are bad and left out" in done.text, (
        done.text
    )
    assert f"data: {24 - len(bad)} images" in done.text
    trained_on = {target["id"].split("/")[1] for target in own.store("skip").targets}
    assert trained_on == set(own.names()) - set(bad)
    survived(
        "Data: damaged image files", len(trained_on & set(bad)), of="trained on", tried=len(bad)
    )


def test_a_jpeg_that_was_cut_off_anywhere_is_never_trained_on(own):
    cuts = np.random.default_rng(0)
    name, files = own.names()[0], {"plain": jpeg(), "progressive": jpeg(progressive=True)}
    own.split(name)
    own.image(name).unlink()
    path = own.folder / "JPEGImages" / f"{name}.jpg"
    taken = 0
    for whole in files.values():
        path.write_bytes(whole)
        expected = decode(path)
        for cut in [*cuts.integers(0, len(whole), 40), len(whole) - 3]:
            path.write_bytes(whole[:cut])
            try:
                taken += not np.array_equal(pixels(own.store(), 0), expected)
            except UserError as error:
                assert f"{name}.jpg: not a usable image" in str(error)
    survived("Data: damaged image files", taken, of="trained on", tried=82)


def bombs() -> dict[str, bytes]:
    """Small files that say they are of at least 1.6e9 pixels, and one that Pillow itself would
    open.
    """

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content))
            + kind
            + content
            + struct.pack(">I", zlib.crc32(kind + content))
        )

    def png(side: int) -> bytes:
        packer = zlib.compressobj(9)
        rows = bytes(1 + side // 8) * (side // 100)
        body = b"".join(packer.compress(rows) for _ in range(100)) + packer.flush()
        header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
        return (
            b"\x89PNG\r\n\x1a\n"
            + chunk(b"IHDR", header)
            + chunk(b"IDAT", body)
            + chunk(b"IEND", b"")
        )

    small = jpeg()
    at = small.index(b"\xff\xc0") + 5
    gif = (
        b"GIF89a"
        + struct.pack("<HHBBB", 65_535, 65_535, 0, 0, 0)
        + b","
        + struct.pack("<HHHHB", 0, 0, 65_535, 65_535, 0)
    )
    return {
        "png": png(40_000),
        "png of 169 million pixels": png(13_000),
        "jpeg": small[:at] + struct.pack(">HH", 65_500, 65_500) + small[at + 4 :],
        "gif": gif + b"\x08\x01\x00\x00;",
        "bmp": b"BM"
        + struct.pack(
            "<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 40_000, 40_000, 1, 24, 0, 0, 0, 0, 0, 0
        ),
    }


def test_a_decompression_bomb_is_refused_by_its_header(own, tmp_path):
    made = bombs()
    assert len(made["png"]) < 300_000
    own.split(*own.names()[: len(made)])
    for name, content in zip(own.names(), made.values(), strict=True):
        own.image(name).unlink()
        (own.folder / "JPEGImages" / f"{name}.jpg").write_bytes(content)

    def measured() -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + 600 * 2**20  # of addresses: threads reserve some
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        with pytest.raises(UserError, match=f"{len(made)} of {len(made)} images are bad"):
            own.store("skip")
        print(f"took {time.process_time() - start} s")
        print(f"grew {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before} KiB")

    done = run(measured, tmp_path / "out")
    assert done.code == 0, done.text
    # the reason is the size that the header gives, not that memory ran out
    assert len(
        re.findall(r"^/\S+: not a usable image \([^\n]*pixels", done.text, re.MULTILINE)
    ) == len(made), done.text
    grown = int(re.search(r"grew (\d+) KiB", done.text)[1]) / 1024
    assert grown < 300 and float(re.search(r"took (\S+) s", done.text)[1]) < 5
    survived("Data: decompression bombs", tried=len(made))


def test_odd_formats_and_modes_arrive_as_pillow_has_them(own):
    ramp = np.linspace(0, 255, 48 * 64 * 3).reshape(48, 64, 3).astype(np.uint8)
    rgb = Image.fromarray(ramp)
    made = {kind: (rgb, kind) for kind in ("PNG", "GIF", "WEBP", "BMP")}
    made |= {mode: (rgb.convert(mode), "PNG") for mode in ("L", "LA", "P", "RGBA", "1")}
    made |= {"gray JPEG": (rgb.convert("L"), "JPEG"), "CMYK": (rgb.convert("CMYK"), "JPEG")}
    own.split(*own.names()[: len(made)])
    for name, (image, kind) in zip(own.names(), made.values(), strict=True):
        own.image(name).unlink()
        image.save(own.folder / "JPEGImages" / f"{name}.jpg", format=kind)
    store = own.store()
    for index, name in enumerate(own.names()):
        with Image.open(own.image(name)) as image:
            np.testing.assert_array_equal(pixels(store, index), np.asarray(image.convert("RGB")))

    deep = np.linspace(0, 65_535, 64 * 64).astype(np.uint16).reshape(64, 64)
    Image.fromarray(deep).save(own.image(own.names()[0]), format="PNG")
    assert np.abs(pixels(own.store(), 0) - deep[..., None] / 257).max() <= 1
    survived("Data: odd formats, modes, EXIF turns, wrong sizes", tried=len(made) + 1)


def test_an_exif_turn_is_an_error_only_where_boxes_would_lie_wrong(own, train):
    name = own.names()[0]
    exif = Image.Exif()
    exif[0x0112] = 6
    own.image(name).unlink()
    Image.new("RGB", (64, 40)).save(own.folder / "JPEGImages" / f"{name}.jpg", exif=exif)
    sizes = {"64x40": False, "40x64": True, "99x99": False, "0x0": False}
    for size, wrong in sizes.items():
        width, height = size.split("x")
        text = re.sub(r"<width>\d+", f"<width>{width}", own.xml(name).read_text())
        own.xml(name).write_text(re.sub(r"<height>\d+", f"<height>{height}", text))
        if wrong:
            assert f"{name}.jpg: 64x40, turned by EXIF, but 40x64 in its XML" in one_line(train())
        else:
            assert own.store().native[0].tolist() == [40, 64]
    survived("Data: odd formats, modes, EXIF turns, wrong sizes", tried=len(sizes))


def test_files_may_go_away_once_the_images_are_decoded(own):
    loader = TrainLoader(Store(own.read(), 64, workers=2, storage="resident"), 8, 1, Augment())
    expected = [images for images, _ in loader.epoch(0)]
    shutil.rmtree(own.folder)
    assert all(map(torch.equal, expected, (images for images, _ in loader.epoch(0))))
    survived("Data: the folder deleted while training")


# --- annotations


def test_missing_files_are_listed_together_or_skipped(own, train):
    no_image, no_xml, no_both, empty, page = own.names()[:5]
    own.image(no_image).unlink(), own.xml(no_xml).unlink()
    own.image(no_both).unlink(), own.xml(no_both).unlink()
    own.xml(empty).write_bytes(b"")
    own.xml(page).write_bytes(PAGE)
    done = train()
    last = one_line(done)
    assert "train: 5 of 24 images are bad" in last and f"{no_image}.jpg: no such file" in last
    for said in (
        rf"{no_xml}\.xml: no such file",
        rf"{empty}\.xml:1: not an XML",
        rf"{page}\.xml:1: '<!DOCTYPE'",
    ):
        assert re.search(rf"^\S*/{said}", done.text, re.MULTILINE), done.text
    done = train("data.on_bad=skip")
    assert (
        done.code == 0
        and "5 of 24 images are bad and left out" in done.text
        and "data: 19 images" in done.text
    )
    survived("Data: missing, malformed and hostile XML", tried=5)


def entities(*lines: str, use: str = "&x;", subset: str = "") -> bytes:
    declared = "".join(f"<!ENTITY {line}>" for line in lines)
    return f"<!DOCTYPE annotation {subset}[{declared}]><annotation>{use}</annotation>".encode()


LAUGHS = [f"x{i} '{f'&x{i - 1};' * 10}'" for i in range(1, 12)]
BAD_XML = {  # CANARY stands for the address of a file
    "billion laughs": entities("x0 'ha'", *LAUGHS, use="&x11;"),
    "quadratic": entities(f"x '{'a' * 50_000}'", use="&x;" * 50_000),
    "XXE": entities("x SYSTEM 'CANARY'"),
    "XXE by parameter": entities("% p SYSTEM 'CANARY'> %p; <!ENTITY x 'y'"),
    "XXE, PUBLIC": entities("x PUBLIC 'a' 'CANARY'"),
    "external DTD": entities("x 'y'", subset="SYSTEM 'CANARY' "),
    "DOCTYPE in UTF-16": entities("x SYSTEM 'CANARY'").decode().encode("utf-16"),
    "DOCTYPE in UTF-16 without mark": entities("x SYSTEM 'CANARY'").decode().encode("utf-16-le"),
    "DOCTYPE in UTF-7": b'<?xml version="1.0" encoding="UTF-7"?>'
    + entities("x SYSTEM 'CANARY'").replace(b"<!", b"+ADwAIQ-"),
    "XInclude": b'<x:include xmlns:x="http://www.w3.org/2001/XInclude" href="CANARY" parse="text"/>',
    "stylesheet": b'<?xml-stylesheet href="CANARY" type="text/xsl"?><svg/>',
    "empty": b"",
    "cut off": b"<annotation><object><name>ring",
    "not XML": b"circle 1 2 3 4",
    "latin 1": "<annotation>\n<folder>caf\xe9</folder></annotation>".encode("latin-1"),
    "zero bytes": bytes(100),
    "another root": b"<annotations/>",
}


def test_hostile_and_malformed_xml_is_refused_at_once_and_reads_nothing(own, tmp_path, capsys):
    canary = tmp_path / "canary.txt"
    canary.write_text(CANARY)
    name = own.names()[0]
    own.split(name)
    leaks = 0
    for kind, content in BAD_XML.items():
        own.xml(name).write_bytes(content.replace(b"CANARY", canary.as_uri().encode()))
        start = time.process_time()
        with pytest.raises(UserError) as error:
            own.read()[0]
        assert time.process_time() - start < 0.1, kind
        message = str(error.value)
        assert (
            re.search(rf"{name}\.xml:\d+: ", message) and "\n" not in message and len(message) < 700
        ), kind
        leaks += CANARY in message
    output = capsys.readouterr()
    leaks += CANARY in output.out + output.err
    survived("Data: missing, malformed and hostile XML", leaks, of="files read", tried=len(BAD_XML))


def test_a_box_in_a_batch_is_always_a_box(own):
    """Boxes of every kind, under one name each: refused, dropped, or clipped to the picture."""
    rng = np.random.default_rng(0)
    values = ["-9e8", "-7", "0", "1", "1.5", " 20\n", "54", "55", "56", "71", "1e3", "9e8"]
    broken = ["nan", "inf", "-inf", "", "ten", "0x10", "1,5", "1e999", "1e39", "--1"]
    name = own.names()[0]
    own.split(name)
    wrong = []
    for _ in range(300):
        corners = [str(rng.choice(broken if rng.random() < 0.02 else values)) for _ in range(4)]
        box = "".join(
            f"<{s}>{c}</{s}>"
            for s, c in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True)
        )
        part = "<part><name>ring</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></part>"
        own.xml(name).write_text(
            f"<annotation><object><name>star</name>{part}<bndbox>{box}</bndbox></object></annotation>"
        )
        faulty = any(c in broken for c in corners)
        swapped = not faulty and (
            float(corners[0]) > float(corners[2]) or float(corners[1]) > float(corners[3])
        )
        if faulty or swapped:
            with pytest.raises(
                UserError, match="corners are swapped" if swapped else "not a number"
            ):
                own.read()[0]
            continue
        image, target = own.read()[0]
        boxes, (height, width) = target["boxes_xyxy"], image.shape[:2]
        asked = np.clip(np.array(corners, float) - [1, 1, 0, 0], 0, [width, height, width, height])
        expected = [asked.tolist()] if (asked[2:] - asked[:2] >= 1).all() else []
        expected = np.reshape(expected, (-1, 4))
        if (
            boxes.shape != expected.shape
            or not np.allclose(boxes, expected)
            or len(target["labels"]) != len(boxes)
        ):
            wrong.append((corners, boxes))
    assert not wrong
    survived("Data: boxes outside, swapped, empty, not numbers", len(wrong), of="wrong", tried=300)


def test_boxes_of_one_pixel_too_many_or_few_would_show_in_the_score(own):
    """Perfect predictions, made of the XML by hand, through the letterbox and back: AP is 1, and 1
    is subtracted.
    """
    own.split(*own.names("val"))
    dataset = own.read()
    loader = ValLoader(Store(dataset, 96, workers=2, storage="resident"), 8)
    exact, metric = [], DetectionMetric(SHAPES)
    for images, targets, to_native in loader:
        assert images.shape[2:] == (96, 96)
        detections = []
        for row, target in enumerate(targets):
            root = ET.parse(own.xml(target["id"].split("/")[1])).getroot()
            sides = [
                [float(o.findtext(f"bndbox/{s}")) for s in ("xmin", "ymin", "xmax", "ymax")]
                for o in root.iter("object")
            ]
            boxes = torch.tensor(sides) - torch.tensor([1.0, 1.0, 0.0, 0.0])
            exact.append(np.array_equal(boxes, target["boxes_xyxy"]))
            corner, scale = (
                torch.tensor(x[row], dtype=torch.float32).tile(2)
                for x in (to_native.corner, to_native.scale)
            )
            detections.append(
                {
                    "boxes_xyxy": boxes / scale + corner,
                    "scores": torch.ones(len(boxes)),
                    "labels": torch.tensor(target["labels"]),
                }
            )
        metric.update(to_native(detections), targets)
    assert all(exact) and len(exact) == 8
    assert metric.compute() == pytest.approx(dict.fromkeys(metric.compute(), 1.0))


@pytest.mark.parametrize(
    "written, nearest", [("Circle", "circle"), ("sqare", "square"), ("STAR ", "star")]
)
def test_an_unknown_class_stops_in_either_mode(own, train, written, nearest):
    name = own.names()[3]
    text = re.sub("</?part>", "", own.xml(name).read_text())
    own.xml(name).write_text(re.sub(r"<name>\w+</name>", f"<name>{written}</name>", text))
    for mode in ("stop", "skip"):
        last = one_line(train(f"data.on_bad={mode}"))
        assert (
            f"{name}.xml: unknown class {written.strip()!r}, the nearest known is {nearest!r}"
            in last
        )
        assert "`names:`" in last
    own.xml(name).write_text(text.replace("</name>", " \n</name>"))  # spaces are no other name
    assert len(own.read()) == 24


# --- splits, names, links


def test_names_and_links_that_lead_out_of_the_folder_are_refused(own, tmp_path, train, capsys):
    outside = tmp_path / "outside"
    outside.mkdir()
    name = own.names()[0]
    shutil.copy(own.image(name), outside / "a.png")
    (outside / "a.xml").write_text(
        f"<annotation><object><name>{CANARY}</name></object></annotation>"
    )
    names = [
        "../outside/a",
        str(outside / "a"),
        "..\\a",
        "C:\\a",
        "a\0b",
        "..",
        f"{name}/../../../outside/a",
    ]
    for hostile in names:
        own.split(hostile)
        with pytest.raises(UserError, match="is not the name of an image"):
            own.read()
        with pytest.raises(UserError):
            VOC(str(own.folder), [hostile], names=SHAPES)
    own.split(name)
    text = own.xml(name).read_text()
    own.xml(name).write_text(
        re.sub("<filename>.*?</filename>", f"<filename>{outside}/a.png</filename>", text)
    )
    assert own.read().records[0].image == str(own.image(name))  # <filename> is never a path

    for path, target in ((own.xml(name), outside / "a.xml"), (own.image(name), outside / "a.png")):
        kept = path.read_bytes()
        path.unlink()
        path.symlink_to(target)
        last = one_line(train())
        assert (
            f"{name}{'.xml' if path.suffix == '.xml' else '.jpg'}: a link that leads out of the set; put a copy"
            in last
        )
        path.unlink()
        path.write_bytes(kept)
    output = capsys.readouterr()
    leaks = sum(CANARY in text for text in (output.out, output.err, last))
    survived(
        "Data: names and links that lead out", leaks, of="files read", tried=2 * len(names) + 2
    )


def test_split_files_of_every_kind_are_read_or_named(own, train, capsys):
    first, second = own.names()[:2]
    path = own.folder / "ImageSets" / "Main" / "train.txt"
    for text in (
        f"{first}\r\n{second}\r\n",
        f"\ufeff{first}\n\n\n  {second}  ",
        f"{first} -1\n{second}  1\n",
        f"{first}\n{second}\n{first}\n",
    ):
        path.write_bytes(text.encode())
        assert [target["id"] for target in own.store().targets] == [f"own/{first}", f"own/{second}"]
    assert "train: 1 repeated images taken once" in capsys.readouterr().out
    for text in ("", "\r\n \n"):
        path.write_text(text)
        assert "split 'train' lists no image" in one_line(train())
    path.unlink()
    assert "train.txt: no such split (val, and `all`)" in one_line(train())
    survived("Data: split files empty, odd, repeating, overlapping", tried=7)


def test_an_overlap_of_train_and_val_stops_unless_it_is_allowed(own, train):
    shared = own.names("val")[0]
    own.split(*own.names(), shared)
    last = one_line(train())
    assert (
        "1 images are in train and val both" in last and shared in last and "allow_overlap" in last
    )
    done = train("data.allow_overlap=true")
    assert done.code == 0, done.text
    survived("Data: split files empty, odd, repeating, overlapping", tried=2)


# --- too little


def test_a_batch_of_images_without_objects_trains(own, train):
    for name in own.names():
        own.xml(name).write_text(
            "<annotation><size><width>64</width><height>64</height></size></annotation>"
        )
    torch.manual_seed(0)
    model = YOLO11(SHAPES, scale=TINY).train()
    loader = TrainLoader(Store(own.read(), 64, workers=2, storage="resident"), 8, 1, Augment())
    images, targets = next(loader.epoch(0))
    assert (targets["labels"] == -1).all()
    losses = model.loss(model(images), targets)
    sum(losses.values()).backward()
    assert losses["cls"] > 0 and all(value.isfinite() for value in losses.values())
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    done = train("train.lr0=0.0001")
    assert done.code == 0 and "skipped" not in done.text and "nan" not in done.text, done.text
    survived("Data: no objects, no detections, too few images", tried=2)


def test_no_detections_at_all_score_zero(own):
    own.split(*own.names("val"))
    loader = ValLoader(Store(own.read(), 64, workers=2, storage="resident"), 3)
    metric = DetectionMetric(SHAPES)
    none = {
        "boxes_xyxy": torch.zeros(0, 4),
        "scores": torch.zeros(0),
        "labels": torch.zeros(0, dtype=torch.int64),
    }
    for _, targets, to_native in loader:
        metric.update(to_native([none] * len(targets)), targets)
    assert set(metric.compute().values()) == {0.0}
    assert metric.official()["AP50"] == 0.0
    survived("Data: no objects, no detections, too few images")


def test_fewer_images_than_a_batch_stop_before_the_first_epoch(own, train):
    done = train("data.limit=3")
    assert (
        "train.batch: 8 is more than the 3 training images" in one_line(done)
        and "epoch 1" not in done.text
    )
    own.split(*own.names()[:8])
    own.image(own.names()[0]).write_bytes(
        b""
    )  # a batch is there only as long as all files are whole
    done = train("data.on_bad=skip")
    assert (
        "train.batch: 8 is more than the 7 training images" in one_line(done)
        and "epoch 1" not in done.text
    )
    survived("Data: no objects, no detections, too few images", tried=2)


# --- the folder, real files, errors


def test_the_folder_is_only_read(own, train):
    own.image(own.names()[0]).write_bytes(b"")
    for path in (*own.folder.rglob("*"), own.folder):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = tree_hash(own.folder)
    try:
        done = train("data.on_bad=skip")
        assert done.code == 0, done.text
        one_line(train(f"run={own.folder.parent / 'another'}"))
        changed = tree_hash(own.folder) != before
    finally:
        for path in (own.folder, *own.folder.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
    survived("Data: the folder read-only", int(changed), of="files changed", tried=2)


@pytest.mark.skipif(not PHOTOS.is_dir(), reason="no real photographs beside the repository")
def test_every_real_messy_file_comes_through(tmp_path):
    found = sorted(path for path in (PHOTOS / "messy").rglob("*") if path.is_file())
    for source in found:
        part = "Annotations" if source.suffix == ".xml" else "JPEGImages"
        (tmp_path / part).mkdir(exist_ok=True)
        shutil.copy(source, tmp_path / part / f"{source.parent.name}_{source.name}")
        if source.parent.name == "pixels":
            (tmp_path / "Annotations").mkdir(exist_ok=True)
            (tmp_path / "Annotations" / f"pixels_{source.stem}.xml").write_text("<annotation/>")
    names = [
        *VOC_NAMES,
        "RBC",
        "WBC",
        "Platelets",
        "vehicle",
        "handbag",
        "head",
        "helmet",
        "raccoon",
    ]
    dataset = VOC(str(tmp_path), ["all"], names=names)
    images = sum(path.suffix != ".xml" for path in found)
    assert len(dataset) == images == len({path.stem for path in found})
    seen = 0
    for batch, targets, to_native in ValLoader(
        Store(dataset, 320, workers=2, storage="resident"), 4
    ):
        assert (
            batch.isfinite().all() and batch.min() >= 0 and batch.max() <= 1 and batch.std() > 0.05
        )
        for target, native in zip(targets, to_native.native, strict=True):
            boxes = target["boxes_xyxy"]
            assert (
                (boxes >= 0).all()
                and (boxes[:, 2:] <= native).all()
                and (boxes[:, 2:] - boxes[:, :2] >= 1).all()
            )
            assert len(boxes) or target["id"].split("/")[1].startswith("pixels")
            seen += 1
    assert seen == images
    survived("Data: photographs from real, messy sets", tried=seen)


def test_errors_and_datasets_survive_pickling(own):
    raised = set()
    for path in sorted((ROOT / "kdmini" / "data").glob("*.py")):
        module = importlib.import_module(f"kdmini.data.{path.stem}".removesuffix(".__init__"))
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                first, *rest = ast.unparse(node.exc.func).split(".")
                kind = getattr(module, first)
                for name in rest:
                    kind = getattr(kind, name)
                raised.add(kind)
    assert UserError in raised
    for kind in raised:
        error = pickle.loads(pickle.dumps(kind("a.jpg: not a usable image")))  # noqa: S301 - our own bytes
        assert type(error) is kind and str(error) == "a.jpg: not a usable image"
    dataset = own.read()
    again = pickle.loads(pickle.dumps(dataset))  # noqa: S301
    assert len(again) == len(dataset) and again.photographs == dataset.photographs
    assert np.array_equal(again[0][0], dataset[0][0]) and math.isfinite(
        again[0][1]["boxes_xyxy"].sum()
    )
