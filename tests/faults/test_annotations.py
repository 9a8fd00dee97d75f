"""Missing, malformed, hostile and wrong annotations, from the folder to the batch and the
score.
"""

import re
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
import torch

from kdmini.contracts import UserError
from kdmini.data.loader import ValLoader
from kdmini.detection.average_precision import DetectionMetric
from tests.faults.children import one_line
from tests.faults.own import SHAPES
from tests.faults.record import survived

CANARY = "the words of the canary"
MALFORMED = "Data: missing, malformed and hostile XML"
SIDES = ("xmin", "ymin", "xmax", "ymax")

# --- files


def test_missing_files_are_listed_together_or_skipped(own, train):
    no_image, no_xml, no_both, empty, page = own.names()[:5]
    own.image(no_image).unlink()
    own.xml(no_xml).unlink()
    own.image(no_both).unlink()
    own.xml(no_both).unlink()
    own.xml(empty).write_bytes(b"")
    own.xml(page).write_bytes(b"<!DOCTYPE html><html><head><title>404</title></head></html>")

    done = train()
    one_line(done, "train: 5 of 24 images are bad", f"{no_image}.jpg: no such file")
    for reason in (
        rf"{no_xml}\.xml: no such file",
        rf"{empty}\.xml:1: not an XML",
        rf"{page}\.xml:1: '<!DOCTYPE'",
    ):
        assert re.search(rf"^\S*/{reason}", done.text, re.MULTILINE), done.text

    done = train("data.on_bad=skip")
    assert done.code == 0, done.text
    assert "5 of 24 images are bad and left out" in done.text
    assert "data: 19 images" in done.text
    survived(MALFORMED, tried=5)


def entities(*lines: str, use: str = "&x;", subset: str = "") -> bytes:
    """An annotation of these entity declarations. CANARY stands for the address of a file."""
    declared = "".join(f"<!ENTITY {line}>" for line in lines)
    return f"<!DOCTYPE annotation {subset}[{declared}]><annotation>{use}</annotation>".encode()


TEN_EACH = [f"x{i} '{f'&x{i - 1};' * 10}'" for i in range(1, 12)]
EXTERNAL = entities("x SYSTEM 'CANARY'")
UTF_7 = b'<?xml version="1.0" encoding="UTF-7"?>'
BAD_XML = {
    "billion laughs": entities("x0 'ha'", *TEN_EACH, use="&x11;"),
    "quadratic": entities(f"x '{'a' * 50_000}'", use="&x;" * 50_000),
    "XXE": EXTERNAL,
    "XXE by parameter": entities("% p SYSTEM 'CANARY'> %p; <!ENTITY x 'y'"),
    "XXE, PUBLIC": entities("x PUBLIC 'a' 'CANARY'"),
    "external DTD": entities("x 'y'", subset="SYSTEM 'CANARY' "),
    "DOCTYPE in UTF-16": EXTERNAL.decode().encode("utf-16"),
    "DOCTYPE in UTF-16 without mark": EXTERNAL.decode().encode("utf-16-le"),
    "DOCTYPE in UTF-7": UTF_7 + EXTERNAL.replace(b"<!", b"+ADwAIQ-"),
    "XInclude": (
        b'<x:include xmlns:x="http://www.w3.org/2001/XInclude" href="CANARY" parse="text"/>'
    ),
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
        assert re.search(rf"{name}\.xml:\d+: ", message), kind
        assert "\n" not in message, kind
        assert len(message) < 700, kind
        leaks += CANARY in message
    output = capsys.readouterr()
    leaks += CANARY in output.out + output.err
    survived(MALFORMED, leaks, of="files read", tried=len(BAD_XML))


# --- boxes

VALUES = ["-9e8", "-7", "0", "1", "1.5", " 20\n", "54", "55", "56", "71", "1e3", "9e8"]
NO_NUMBERS = ["nan", "inf", "-inf", "", "ten", "0x10", "1,5", "1e999", "1e39", "--1"]
PART = "<name>ring</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>"


def random_corner(rng: np.random.Generator) -> str:
    """Mostly a number, inside or outside the picture."""
    choices = NO_NUMBERS if rng.random() < 0.02 else VALUES
    return str(rng.choice(choices))


def star_at(corners: list[str]) -> str:
    """The annotation of one star; its part has a name and a box of its own."""
    box = ""
    for side, corner in zip(SIDES, corners, strict=True):
        box += f"<{side}>{corner}</{side}>"
    star = f"<name>star</name><part>{PART}</part><bndbox>{box}</bndbox>"
    return f"<annotation><object>{star}</object></annotation>"


def refusal_of(corners: list[str]) -> str | None:
    """What is said of a box that is none."""
    if any(corner in NO_NUMBERS for corner in corners):
        return "not a number"
    xmin, ymin, xmax, ymax = map(float, corners)
    return "corners are swapped" if xmin > xmax or ymin > ymax else None


def clipped(corners: list[str], width: int, height: int) -> np.ndarray:
    """-> (1, 4) or, if under a pixel is left of it, (0, 4), from 0."""
    from_0 = np.array(corners, float) - [1, 1, 0, 0]
    box = from_0.clip(0, [width, height, width, height])
    sides = box[2:] - box[:2]
    return box[None] if (sides >= 1).all() else np.empty((0, 4))


def test_a_box_in_a_batch_is_always_a_box(own):
    """Boxes of every kind, under one name each: refused, dropped, or clipped to the picture."""
    rng = np.random.default_rng(0)
    name = own.names()[0]
    own.split(name)
    wrong = []
    for _ in range(300):
        corners = [random_corner(rng) for _ in SIDES]
        own.xml(name).write_text(star_at(corners))
        refusal = refusal_of(corners)
        if refusal:
            with pytest.raises(UserError, match=refusal):
                own.read()[0]
            continue

        image, target = own.read()[0]
        height, width = image.shape[:2]
        boxes = target["boxes_xyxy"]
        expected = clipped(corners, width, height)
        same = boxes.shape == expected.shape and np.allclose(boxes, expected)
        if not same or len(target["labels"]) != len(boxes):
            wrong.append((corners, boxes))
    assert not wrong
    survived("Data: boxes outside, swapped, empty, not numbers", len(wrong), of="wrong", tried=300)


def test_boxes_of_one_pixel_too_many_or_few_would_show_in_the_score(own):
    """Perfect predictions, made of the XML by hand, through the letterbox and back: AP is 1,
    and 1 is subtracted.
    """
    own.split(*own.names("val"))
    store = own.store(size=96)
    metric = DetectionMetric(SHAPES)
    seen = 0
    for images, targets, to_file in ValLoader(store, 8):
        assert images.shape[2:] == (96, 96)
        detections = []
        for target in targets:
            boxes = boxes_in(own.xml(target["id"].split("/")[1]))
            assert np.array_equal(boxes, target["boxes_xyxy"])
            height, width = store.native[seen]
            perfect = {
                "boxes_xyxy": torch.from_numpy(in_letterbox(boxes, width, height, 96)),
                "scores": torch.ones(len(boxes)),
                "labels": torch.tensor(target["labels"]),
            }
            detections.append(perfect)
            seen += 1
        metric.update(to_file(detections), targets)
    assert seen == 8
    assert metric.compute() == pytest.approx(dict.fromkeys(metric.compute(), 1.0))


def boxes_in(path: Path) -> np.ndarray:
    """(G, 4) float32 from 0, read another way than kdmini's."""
    sides = []
    for element in ET.parse(path).getroot().iter("object"):
        sides.append([float(element.findtext(f"bndbox/{side}")) for side in SIDES])
    return np.array(sides, np.float32) - np.array([1, 1, 0, 0], np.float32)


def in_letterbox(boxes: np.ndarray, width: int, height: int, size: int) -> np.ndarray:
    """The whole picture in the middle, as large as fits, at whole pixels."""
    native = np.array([width, height])
    placed = np.round(native * size / native.max())
    corner = (size - placed) // 2
    moved = boxes * np.tile(placed / native, 2) + np.tile(corner, 2)
    return moved.astype(np.float32)


# --- classes


@pytest.mark.parametrize(
    "written, nearest", [("Circle", "circle"), ("sqare", "square"), ("STAR ", "star")]
)
def test_an_unknown_class_stops_in_either_mode(own, train, written, nearest):
    name = own.names()[3]
    text = re.sub("</?part>", "", own.xml(name).read_text())
    own.xml(name).write_text(re.sub(r"<name>\w+</name>", f"<name>{written}</name>", text))
    unknown = f"{name}.xml: unknown class {written.strip()!r}"
    for mode in ("stop", "skip"):
        done = train(f"data.on_bad={mode}")
        one_line(done, f"{unknown}, the nearest known is {nearest!r}", "`names:`")


def test_spaces_around_a_class_are_no_other_name(own):
    name = own.names()[3]
    text = own.xml(name).read_text()
    own.xml(name).write_text(text.replace("</name>", " \n</name>"))
    assert len(own.read()) == 24
