"""VOC for detection: corners, classes, sizes, faulty XML."""

import copy
import hashlib
import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kdmini.contracts import UserError
from kdmini.data.store import Store
from kdmini.detection.voc import VOC, VOC_NAMES
from kdmini.detection.voc_xml import read_annotation
from tests.data.voc_folder import BOX, add, bndbox, one, thing, write_split, xml


def tree_hash(root: Path) -> str:
    """Of all files below, their names, contents and times."""
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        digest.update(f"{path} {path.stat().st_mtime_ns}".encode())
        if path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()


# --- a sample


def test_sample_has_the_types_of_the_contract_and_corners_from_zero(tmp_path):
    objects = thing() + thing("person", extra="<difficult>1</difficult>")
    image, target = one(tmp_path, xml(objects))[0]
    assert image.shape == (30, 40, 3)
    assert image.dtype == np.uint8
    assert image.flags.writeable
    # pixels 11..30, 6..25 counted from 1: 20 by 20
    assert target["boxes_xyxy"].tolist() == [[10, 5, 30, 25], [10, 5, 30, 25]]
    assert target["boxes_xyxy"].dtype == np.float32
    assert target["labels"].tolist() == [VOC_NAMES.index("dog"), VOC_NAMES.index("person")]
    assert target["labels"].dtype == np.int64
    assert target["difficult"].tolist() == [False, True]
    assert target["difficult"].dtype == bool
    assert target["id"] == "set/a"


def test_an_image_without_objects_is_background(tmp_path):
    _, target = one(tmp_path, xml(""))[0]
    assert target["boxes_xyxy"].shape == (0, 4)
    assert target["labels"].shape == (0,)
    assert target["difficult"].shape == (0,)


def test_names_are_in_the_usual_order():
    assert len(VOC_NAMES) == 20
    assert sorted(VOC_NAMES) == VOC_NAMES


def test_dataset_pickles_serves_threads_and_writes_nothing(tmp_path):
    names = [f"{number:02}" for number in range(20)]
    outside = thing(box=bndbox(90, 50, 95, 60))
    for number, name in enumerate(names):
        add(tmp_path / "set", name, xml(outside + thing()), size=(40 + number, 30))
    write_split(tmp_path / "set", "train", *names)
    before = tree_hash(tmp_path)

    dataset = copy.deepcopy(VOC(str(tmp_path / "set"), ["train"]))  # as pickle does it
    assert pickle.dumps(dataset)
    with ThreadPoolExecutor(8) as pool:
        samples = list(pool.map(dataset.__getitem__, range(20)))
    assert [image.shape[1] for image, _ in samples] == list(range(40, 60))
    assert dataset.report() == (
        "19 images of another size than stated, as set/01 (pixels count), "
        "20 boxes mostly outside the picture in 20 images"
    )
    assert tree_hash(tmp_path) == before


# --- boxes


OUTSIDE = "1 boxes mostly outside the picture in 1 images"


@pytest.mark.parametrize(
    ("box", "expected", "report"),
    [
        ((1, 1, 40, 30), [0, 0, 40, 30], ""),
        ((0, -5, 50, 60), [0, 0, 40, 30], ""),
        ((0, -5, 50, 90), [0, 0, 40, 30], OUTSIDE),
        ((2.5, 3.25, 10.75, "1.2e1"), [1.5, 2.25, 10.75, 12], ""),
        ((" 11 ", "\n6", "30 ", "25\n"), [10, 5, 30, 25], ""),
        ((7, 7, 7, 7), [6, 6, 7, 7], ""),  # one pixel
        ((40, 30, 40, 30), [39, 29, 40, 30], ""),  # the last pixel
        ((41, 5, 60, 20), None, OUTSIDE),
        ((5, 31, 20, 40), None, OUTSIDE),
        ((39.6, 5, 44, 20), [38.6, 4, 40, 20], OUTSIDE),
        ((40.5, 5, 44, 20), None, OUTSIDE),  # half a pixel is left
    ],
)
def test_boxes_are_clipped_and_dropped_under_one_pixel(tmp_path, box, expected, report):
    dataset = one(tmp_path, xml(thing(box=bndbox(*box)) + thing("cat")))
    _, target = dataset[0]
    boxes = [[10, 5, 30, 25]]
    if expected:
        boxes.insert(0, expected)
    np.testing.assert_allclose(target["boxes_xyxy"], boxes, rtol=1e-6)
    assert len(target["labels"]) == len(target["difficult"]) == len(boxes)

    dataset[0]  # a second look is not a second loss
    assert dataset.report() == report


def test_parts_are_not_objects(tmp_path):
    part = f"<part><name>head</name>{bndbox(1, 1, 4, 4)}</part>"
    for objects in (thing("person", box=part + BOX), thing("person", box=BOX + part)):
        _, target = one(tmp_path, xml(objects))[0]
        assert target["boxes_xyxy"].tolist() == [[10, 5, 30, 25]]
        assert target["labels"].tolist() == [VOC_NAMES.index("person")]


PART_ALONE = f"<part><name>head</name>{BOX}</part>"  # a part's box is not the object's


@pytest.mark.parametrize(
    ("objects", "words"),
    [
        (thing(box=bndbox(30, 6, 11, 25)), "object 1 ('dog'): corners are swapped"),
        (thing() + thing(box=bndbox(11, 25, 30, 6)), "object 2 ('dog'): corners are swapped"),
        (thing(box=bndbox("nan", 6, 30, 25)), "xmin is 'nan'"),
        (thing(box=bndbox(11, 6, "inf", 25)), "xmax is 'inf'"),
        (thing(box=bndbox(11, 6, "wide", 25)), "xmax is 'wide'"),
        (thing(box=bndbox(11, 6, 30, "")), "ymax is ''"),
        (thing(box=BOX.replace("<ymin>6</ymin>", "")), "ymin is ''"),
        (thing(box=""), "it has no <bndbox> but nothing"),
        (thing(box=PART_ALONE), "it has no <bndbox> but <part>"),
        (thing(name=" "), "<name> is empty"),
        (thing(extra="<difficult>maybe</difficult>"), "<difficult> is 'maybe'"),
    ],
)
def test_a_faulty_object_is_named(tmp_path, objects, words):
    with pytest.raises(UserError) as error:
        one(tmp_path, xml(objects))
    message = str(error.value)
    assert words in message
    assert "a.xml" in message
    assert "\n" not in message


# --- classes


@pytest.fixture
def unusual(tmp_path):
    """A set of three images with the classes Person, three times, and racoon."""
    objects = {
        "a": thing("Person") + thing("Person"),
        "b": thing("Person"),
        "c": thing("racoon"),
    }
    for name in objects:
        add(tmp_path / "set", name, xml(objects[name]))
    write_split(tmp_path / "set", "train", *objects)
    return str(tmp_path / "set")


def test_unknown_classes_are_counted_and_the_nearest_name_given(unusual):
    with pytest.raises(UserError) as error:
        VOC(unusual, ["train"])
    message = str(error.value)
    first = "a.xml: unknown class 'Person', the nearest known is 'person'"
    assert f"{first}; list the classes in `names:`" in message
    assert message.endswith("(unknown: 'Person' 3x, 'racoon' 1x)")


def test_names_give_the_labels_and_are_checked(unusual):
    dataset = VOC(unusual, ["train"], names=["racoon", "Person"])
    labels = [dataset[index][1]["labels"].tolist() for index in range(3)]
    assert labels == [[1, 1], [1], [0]]
    for names in ([], ["Person", "racoon", "Person"]):
        with pytest.raises(UserError, match="names"):
            VOC(unusual, ["train"], names=names)


# --- sizes


def size_xml(width, height):
    return f"<size><width>{width}</width><height>{height}</height></size>"


@pytest.mark.parametrize(
    ("size", "counted"),
    [
        (size_xml(40, 30), False),
        (size_xml(400, 30), True),
        (size_xml("40.0", "30"), False),
        (size_xml(0, 0), True),
        ("", False),
        ("<size><width>wide</width></size>", False),
    ],
)
def test_pixels_are_trusted_over_size(tmp_path, size, counted):
    dataset = one(tmp_path, xml(thing(box=bndbox(11, 6, 40.5, 25)), size))
    for _ in range(2):
        assert dataset[0][1]["boxes_xyxy"].tolist() == [[10, 5, 40, 25]]
    wrong = "1 images of another size than stated, as set/a (pixels count)"
    assert dataset.report() == (wrong if counted else "")


def with_exif(tmp_path, orientation, text, size=(40, 30)):
    """The dataset of one image with that EXIF and annotation."""
    add(tmp_path / "set", "a", text)
    write_split(tmp_path / "set", "train", "a")
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", size).save(tmp_path / "set" / "JPEGImages" / "a.jpg", exif=exif)
    return VOC(str(tmp_path / "set"), ["train"])


TALL = thing(box=bndbox(5, 6, 20, 39))  # fits 30x40 only
WIDE = thing(box=bndbox(5, 6, 39, 20))  # fits 40x30 only
EITHER = thing()
HUGE = thing(box=bndbox(5, 6, 60, 60))
STORED = size_xml(40, 30)
TURNED = size_xml(30, 40)
JUNK = size_xml(400, 30)
TWICE = size_xml(80, 60)


@pytest.mark.parametrize(
    "orientation, size, box, verdict",
    [
        # a quarter turn: the size tells, or the boxes do
        (6, STORED, EITHER, ""),
        (6, STORED, TALL, ""),
        (8, STORED, WIDE, ""),
        (6, "", TALL, "turned by EXIF: boxes fit only 30x40"),
        (6, "", WIDE, ""),
        (5, "", EITHER, "turned by EXIF: boxes may belong to either"),
        (8, TURNED, EITHER, "turned by EXIF: boxes may belong to either"),
        (6, TURNED, TALL, "turned by EXIF: boxes fit only 30x40"),
        (6, TURNED, WIDE, ""),
        (7, JUNK, EITHER, "turned by EXIF: boxes may belong to either"),
        # half a turn and mirrors keep the size, so nothing tells
        (2, STORED, EITHER, "turned by EXIF: boxes may belong to either"),
        (3, STORED, WIDE, "turned by EXIF: boxes may belong to either"),
        (4, "", EITHER, "turned by EXIF: boxes may belong to either"),
        (3, "", "", ""),  # nothing to lie wrong
        # no turn, or one that is not known
        (1, TURNED, TALL, "but 30x40 in its annotation: boxes fit only 30x40"),
        (0, TURNED, TALL, "but 30x40 in its annotation: boxes fit only 30x40"),
        (0, TURNED, EITHER, "but 30x40 in its annotation: boxes may belong to either"),
        (0, TURNED, HUGE, "but 30x40 in its annotation: boxes fit neither"),
        (0, TURNED, WIDE, ""),
        (0, TURNED, "", ""),
        (9, "", EITHER, ""),
        # the same picture, larger or smaller
        (0, TWICE, EITHER, "but 80x60 in its annotation: boxes may belong to either"),
        (0, TWICE, HUGE, "but 80x60 in its annotation: boxes fit only 80x60"),
        (0, size_xml(20, 15), WIDE, ""),
        # another picture, or another aspect
        (0, JUNK, EITHER, ""),
        (0, size_xml(400, 90), HUGE, "but 400x90 in its annotation: boxes fit only 400x90"),
    ],
)
def test_boxes_that_may_belong_to_another_picture_are_refused(
    tmp_path, orientation, size, box, verdict
):
    dataset = with_exif(tmp_path, orientation, xml(box, size))
    if verdict:
        with pytest.raises(UserError, match=rf"a\.jpg: 40x30 pixels, {verdict}; store it as"):
            dataset[0]
        dataset.samples.as_stored = True
    image, _ = dataset[0]
    assert image.shape == (30, 40, 3)


def test_exif_that_boxes_do_not_follow_is_counted(tmp_path):
    dataset = with_exif(tmp_path, 6, xml(WIDE))
    dataset[0]
    assert dataset.report() == "1 images turned by EXIF, and their boxes are not"


def test_a_square_turned_by_exif_is_refused(tmp_path):
    dataset = with_exif(tmp_path, 6, xml(EITHER, size_xml(40, 40)), (40, 40))
    with pytest.raises(UserError, match="40x40 pixels, turned by EXIF: boxes may belong"):
        dataset[0]


# --- whole files


ENTITIES = "".join(f"<!ENTITY a{i} '&a{i - 1};&a{i - 1};'>" for i in range(1, 40))
BOMB = f"<!DOCTYPE a [<!ENTITY a 'ha'>{ENTITIES}]><annotation>&a39;</annotation>"
# CANARY stands for the address of a file
EXTERNAL = '<!DOCTYPE a [<!ENTITY x SYSTEM "CANARY">]><annotation>&x;</annotation>'
DOCTYPE = "<!DOCTYPE a [<!ENTITY x 'ha'>]><annotation/>"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "a.xml:1: not an XML file"),
        (b"<annotation>\n<object>\n</annotation>", "a.xml:3: not an XML file"),
        (b"plain text", "a.xml:1: not an XML file"),
        (b"<html><body/></html>", "<html> instead of <annotation>"),
        (b"<annotation>\n\xff\xfe</annotation>", "a.xml:2: not UTF-8"),
        (xml(thing()).encode("utf-16"), "a.xml:1: not UTF-8"),
        (xml(thing()).encode("utf-16-le"), r"a.xml:1: '\x00'"),
        (DOCTYPE.encode("utf-16-be"), r"a.xml:1: '\x00'"),
        (b"<annotation>\n<!DOCTYPE x></annotation>", "a.xml:2: '<!DOCTYPE'"),
        (BOMB.encode(), "a.xml:1: '<!DOCTYPE'"),
        (EXTERNAL.encode(), "a.xml:1: '<!DOCTYPE'"),
    ],
)
def test_a_file_that_is_no_annotation_is_refused_at_once(tmp_path, content, words):
    canary = tmp_path / "canary"
    canary.write_text("canary content")
    path = tmp_path / "a.xml"
    path.write_bytes(content.replace(b"CANARY", canary.as_uri().encode()))
    start = time.process_time()
    with pytest.raises(UserError) as error:
        read_annotation(path)
    assert time.process_time() - start < 0.1
    message = str(error.value)
    assert words in message
    assert "\n" not in message
    assert "canary content" not in message


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf" + xml(thing()).encode(),
        b'<?xml version="1.0" encoding="GBK"?>' + xml(thing()).encode(),
        xml(thing(name=" dog\n")).encode(),
    ],
)
def test_bom_declared_encoding_and_spaces_in_names_are_accepted(tmp_path, content):
    (tmp_path / "a.xml").write_bytes(content)
    annotation = read_annotation(tmp_path / "a.xml")
    assert annotation.classes == ["dog"]
    assert annotation.size == (40, 30)
    assert not annotation.difficult.any()


@pytest.fixture
def faulty(tmp_path):
    """A set of five images: a has no image, b no XML, c an empty XML, d a page; e is whole."""
    folder = tmp_path / "set"
    for name in "abcde":
        add(folder, name)
    write_split(folder, "train", *"abcde")
    (folder / "JPEGImages" / "a.jpg").unlink()
    (folder / "Annotations" / "b.xml").unlink()
    (folder / "Annotations" / "c.xml").write_text("")
    (folder / "JPEGImages" / "d.jpg").write_text("<html>")
    return VOC(str(folder), ["train"])


def test_all_problems_are_told_at_once(faulty, capsys):
    last = r"^train: 4 of 5 images are bad, as .*a\.jpg: no such file; .*on_bad=skip$"
    with pytest.raises(UserError, match=last):
        Store(faulty, 32, name="train")
    lines = [line for line in capsys.readouterr().err.splitlines() if ": no" in line]
    assert [Path(line.split(":")[0]).name for line in lines] == ["a.jpg", "b.xml", "c.xml", "d.jpg"]


def test_what_is_faulty_is_skipped_or_an_error_when_it_is_asked_for(faulty):
    assert [target["id"] for target in Store(faulty, 32, on_bad="skip").targets] == ["set/e"]
    with pytest.raises(UserError, match=r"b\.xml: no such file; restore it or take 'b' out"):
        faulty[1]
