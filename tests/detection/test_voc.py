"""The VOC reader: splits, corners, faulty files, decoding. Real photographs are read where they lie
beside the repo.
"""

import copy
import hashlib
import io
import os
import pickle
import struct
import time
import xml.etree.ElementTree as ET
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import VOCDetection

from kdmini.contracts import UserError
from kdmini.data.pictures import decode
from kdmini.data.store import Store
from kdmini.detection.voc import VOC, VOC_NAMES, read_annotation
from tests.faults.children import run

PHOTOS = Path(__file__).resolve().parents[2] / ".." / "shared" / "data"
photos = pytest.mark.skipif(not PHOTOS.is_dir(), reason="no real photographs beside the repository")

BOX = "<bndbox><xmin>11</xmin><ymin>6</ymin><xmax>30</xmax><ymax>25</ymax></bndbox>"


def thing(name="dog", box=BOX, extra=""):
    return f"<object><name>{name}</name>{extra}{box}</object>"


def bndbox(xmin, ymin, xmax, ymax):
    return f"<bndbox><xmin>{xmin}</xmin><ymin>{ymin}</ymin><xmax>{xmax}</xmax><ymax>{ymax}</ymax></bndbox>"


def xml(objects, size="<size><width>40</width><height>30</height><depth>3</depth></size>"):
    return f"<annotation><filename>../../etc/passwd</filename>{size}{objects}</annotation>"


def add(folder, name, text=None, ending=".jpg", size=(40, 30)):
    """One image of noise-free colour and its annotation."""
    for part in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    (folder / "Annotations" / f"{name}.xml").write_text(xml(thing()) if text is None else text)
    Image.new("RGB", size, (200, 30, 60)).save(folder / "JPEGImages" / f"{name}{ending}")


def write_split(folder, split, *lines):
    (folder / "ImageSets" / "Main" / f"{split}.txt").write_text(
        "".join(f"{line}\n" for line in lines)
    )


def one(tmp_path, text, **about):
    """A dataset of a single image with that annotation."""
    add(tmp_path / "set", "a", text, **about)
    write_split(tmp_path / "set", "train", "a")
    dataset = VOC(str(tmp_path / "set"), ["train"])
    if isinstance(dataset.records[0], UserError):
        dataset[0]  # raises
    return dataset


def ids(dataset):
    return [dataset[i][1]["id"] for i in range(len(dataset))]


def tree_hash(root):
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        digest.update(
            f"{path} {path.stat().st_mtime_ns}".encode()
            + (path.read_bytes() if path.is_file() else b"")
        )
    return digest.hexdigest()


def test_sample_has_the_types_of_the_contract_and_corners_from_zero(tmp_path):
    image, target = one(tmp_path, xml(thing() + thing("person", extra="<difficult>1</difficult>")))[
        0
    ]
    assert image.shape == (30, 40, 3) and image.dtype == np.uint8 and image.flags.writeable
    assert (
        target["boxes_xyxy"].tolist() == [[10, 5, 30, 25]] * 2
    )  # pixels 11..30, 6..25 counted from 1: 20 by 20
    assert target["boxes_xyxy"].dtype == np.float32 and target["labels"].dtype == np.int64
    assert target["labels"].tolist() == [VOC_NAMES.index("dog"), VOC_NAMES.index("person")]
    assert target["difficult"].tolist() == [False, True] and target["difficult"].dtype == bool
    assert target["id"] == "set/a"


def test_an_image_without_objects_is_background(tmp_path):
    _, target = one(tmp_path, xml(""))[0]
    assert target["boxes_xyxy"].shape == (0, 4) and target["labels"].shape == target[
        "difficult"
    ].shape == (0,)


def test_names_are_in_the_usual_order():
    assert len(VOC_NAMES) == 20 and sorted(VOC_NAMES) == VOC_NAMES


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((1, 1, 40, 30), [0, 0, 40, 30]),
        ((0, -5, 50, 90), [0, 0, 40, 30]),
        ((2.5, 3.25, 10.75, "1.2e1"), [1.5, 2.25, 10.75, 12]),
        ((" 11 ", "\n6", "30 ", "25\n"), [10, 5, 30, 25]),
        ((7, 7, 7, 7), [6, 6, 7, 7]),  # one pixel
        ((40, 30, 40, 30), [39, 29, 40, 30]),  # the last pixel
        ((41, 5, 60, 20), None),  # outside
        ((5, 31, 20, 40), None),
        ((39.6, 5, 44, 20), [38.6, 4, 40, 20]),
        ((40.5, 5, 44, 20), None),  # half a pixel is left
    ],
)
def test_boxes_are_clipped_and_dropped_under_one_pixel(tmp_path, box, expected):
    dataset = one(tmp_path, xml(thing(box=bndbox(*box)) + thing("cat")))
    _, target = dataset[0]
    boxes = ([expected] if expected else []) + [[10, 5, 30, 25]]
    np.testing.assert_allclose(target["boxes_xyxy"], boxes, rtol=1e-6)
    assert len(target["labels"]) == len(target["difficult"]) == len(boxes)
    dataset[0]  # a second look is not a second loss
    assert dataset.report() == ("" if expected else "1 boxes under 1 px dropped in 1 images")


@pytest.mark.parametrize(
    ("objects", "said"),
    [
        (thing(box=bndbox(30, 6, 11, 25)), "object 1 ('dog'): corners are swapped"),
        (thing() + thing(box=bndbox(11, 25, 30, 6)), "object 2 ('dog'): corners are swapped"),
        (thing(box=bndbox("nan", 6, 30, 25)), "xmin is 'nan'"),
        (thing(box=bndbox(11, 6, "inf", 25)), "xmax is 'inf'"),
        (thing(box=bndbox(11, 6, "wide", 25)), "xmax is 'wide'"),
        (thing(box=bndbox(11, 6, 30, "")), "ymax is ''"),
        (thing(box=BOX.replace("<ymin>6</ymin>", "")), "ymin is ''"),
        (thing(box=""), "xmin is ''"),
        (
            thing(box=f"<part><name>head</name>{BOX}</part>"),
            "xmin is ''",
        ),  # a part's box is not the object's
        (thing(name=" "), "<name> is empty"),
        (thing(extra="<difficult>maybe</difficult>"), "<difficult> is 'maybe'"),
    ],
)
def test_a_faulty_object_is_named(tmp_path, objects, said):
    with pytest.raises(UserError) as error:
        one(tmp_path, xml(objects))
    message = str(error.value)
    assert said in message and "a.xml" in message and "\n" not in message


def test_parts_are_not_objects(tmp_path):
    part = f"<part><name>head</name>{bndbox(1, 1, 4, 4)}</part>"
    for objects in (thing("person", box=part + BOX), thing("person", box=BOX + part)):
        _, target = one(tmp_path, xml(objects))[0]
        assert target["boxes_xyxy"].tolist() == [[10, 5, 30, 25]]
        assert target["labels"].tolist() == [VOC_NAMES.index("person")]


BOMB = (
    "<!DOCTYPE a [<!ENTITY a 'ha'>"
    + "".join(f"<!ENTITY a{i} '&a{i - 1};&a{i - 1};'>" for i in range(1, 40))
    + "]>"
)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "a.xml:1: not an XML file"),
        (b"<annotation>\n<object>\n</annotation>", "a.xml:3: not an XML file"),
        (b"plain text", "a.xml:1: not an XML file"),
        (b"<html><body/></html>", "<html> instead of <annotation>"),
        (b"<annotation>\n\xff\xfe</annotation>", "a.xml:2: not UTF-8"),
        (xml(thing()).encode("utf-16"), "a.xml:1: not UTF-8"),
        (xml(thing()).encode("utf-16-le"), r"a.xml:1: '\x00'"),
        ("<!DOCTYPE a [<!ENTITY x 'ha'>]><annotation/>".encode("utf-16-be"), r"a.xml:1: '\x00'"),
        (b"<annotation>\n<!DOCTYPE x></annotation>", "a.xml:2: '<!DOCTYPE'"),
        (BOMB.encode() + b"<annotation>&a39;</annotation>", "a.xml:1: '<!DOCTYPE'"),
        (
            b'<!DOCTYPE a [<!ENTITY x SYSTEM "CANARY">]><annotation>&x;</annotation>',
            "a.xml:1: '<!DOCTYPE'",
        ),
    ],
)
def test_a_file_that_is_no_annotation_is_refused_at_once(tmp_path, content, said):
    (tmp_path / "canary").write_text("canary content")
    path = tmp_path / "a.xml"
    path.write_bytes(content.replace(b"CANARY", (tmp_path / "canary").as_uri().encode()))
    start = time.process_time()
    with pytest.raises(UserError) as error:
        read_annotation(path)
    assert time.process_time() - start < 0.1
    message = str(error.value)
    assert said in message and "\n" not in message and "canary content" not in message


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
    assert (
        annotation.classes == ["dog"]
        and annotation.size == (40, 30)
        and not annotation.difficult.any()
    )


@pytest.mark.parametrize(
    ("size", "counted"),
    [
        ("<size><width>40</width><height>30</height></size>", False),
        ("<size><width>400</width><height>30</height></size>", True),
        ("<size><width>0</width><height>0</height></size>", True),
        (
            "<size><width>30</width><height>40</height></size>",
            True,
        ),  # swapped, but no EXIF turn behind it
        ("", False),
        ("<size><width>wide</width></size>", False),
    ],
)
def test_pixels_are_trusted_over_size(tmp_path, capsys, size, counted):
    dataset = one(tmp_path, xml(thing(box=bndbox(11, 6, 400, 25)), size))
    for _ in range(2):
        assert dataset[0][1]["boxes_xyxy"].tolist() == [[10, 5, 40, 25]]
    assert capsys.readouterr().err.count("pixels count") == counted
    assert dataset.report() == ("1 images whose <size> is wrong" if counted else "")


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_exif_turns_nothing_and_a_turned_annotation_is_an_error(tmp_path, orientation):
    stored, turned = xml(thing()), xml(thing(), "<size><width>30</width><height>40</height></size>")
    dataset = one(tmp_path, stored)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "set" / "JPEGImages" / "a.jpg"
    Image.new("RGB", (40, 30)).save(path, exif=exif)
    assert dataset[0][0].shape == (30, 40, 3)
    (tmp_path / "set" / "Annotations" / "a.xml").write_text(turned)
    dataset = VOC(str(tmp_path / "set"), ["train"])
    if orientation == 3:  # upside down keeps its sides: the size alone is wrong
        assert dataset[0][0].shape == (30, 40, 3)
    else:
        with pytest.raises(UserError, match=r"a\.jpg: 40x30, turned by EXIF, but 30x40 in"):
            dataset[0]


def test_unknown_classes_are_counted_and_the_nearest_name_given(tmp_path):
    for name, objects in {
        "a": thing("Person") + thing("Person"),
        "b": thing("Person"),
        "c": thing("racoon"),
    }.items():
        add(tmp_path / "set", name, xml(objects))
    write_split(tmp_path / "set", "train", "a", "b", "c")
    with pytest.raises(UserError) as error:
        VOC(str(tmp_path / "set"), ["train"])
    message = str(error.value)
    assert (
        "a.xml: unknown class 'Person', the nearest known is 'person'; list the classes in `names:`"
        in message
    )
    assert message.endswith("(unknown: 'Person' 3x, 'racoon' 1x)")
    dataset = VOC(str(tmp_path / "set"), ["train"], names=["racoon", "Person"])
    assert [dataset[i][1]["labels"].tolist() for i in range(3)] == [[1, 1], [1], [0]]
    for names in ([], ["Person", "racoon", "Person"]):
        with pytest.raises(UserError, match="names"):
            VOC(str(tmp_path / "set"), ["train"], names=names)


def test_all_problems_are_told_at_once(tmp_path, capsys):
    folder = tmp_path / "set"
    for name in "abcde":
        add(folder, name)
    write_split(folder, "train", *"abcde")
    (folder / "JPEGImages" / "a.jpg").unlink()
    (folder / "Annotations" / "b.xml").unlink()
    (folder / "Annotations" / "c.xml").write_text("")
    (folder / "JPEGImages" / "d.jpg").write_text("<html>")
    dataset = VOC(str(folder), ["train"])
    with pytest.raises(
        UserError, match=r"^train: 4 of 5 images are bad, as .*a\.jpg: no such file; .*on_bad=skip$"
    ):
        Store(dataset, 32, name="train")
    lines = [line for line in capsys.readouterr().err.splitlines() if ": no" in line]
    assert [Path(line.split(":")[0]).name for line in lines] == ["a.jpg", "b.xml", "c.xml", "d.jpg"]
    assert [target["id"] for target in Store(dataset, 32, on_bad="skip").targets] == ["set/e"]
    with pytest.raises(UserError, match=r"b\.xml: no such file; restore it or take 'b' out"):
        dataset[1]


@pytest.mark.parametrize("part, ending", [("JPEGImages", ".jpg"), ("Annotations", ".xml")])
def test_a_link_out_of_the_set_is_refused_and_one_inside_is_followed(
    tmp_path, capsys, part, ending
):
    folder = tmp_path / "set"
    for name in "abc":
        add(folder, name)
    outside = tmp_path / "set2" / f"x{ending}"  # a name that begins like the folder's is not in it
    outside.parent.mkdir()
    (folder / part / f"b{ending}").rename(outside)
    (folder / part / f"b{ending}").symlink_to(outside)
    (folder / "more").mkdir()
    (folder / part / f"c{ending}").rename(folder / "more" / f"c{ending}")
    (folder / part / f"c{ending}").symlink_to(folder / "more" / f"c{ending}")
    dataset = VOC(str(folder), ["all"])
    with pytest.raises(
        UserError, match=rf"b{ending}: a link that leads out of the set; put a copy"
    ):
        dataset[1]
    assert [dataset[i][1]["id"] for i in (0, 2)] == ["set/a", "set/c"]
    outside.rename(folder / part / f"d{ending}")
    (folder / part / f"b{ending}").unlink()
    (folder / part / f"b{ending}").symlink_to(folder / part / f"d{ending}")
    (folder / part).rename(tmp_path / "disk")  # a whole folder may lie elsewhere
    (folder / part).symlink_to(tmp_path / "disk")
    write_split(folder, "train", "a", "b", "c")
    assert ids(VOC(str(folder), ["train"])) == ["set/a", "set/b", "set/c"]


@pytest.mark.parametrize("part, ending", [("JPEGImages", ".jpg"), ("Annotations", ".xml")])
def test_what_is_no_file_is_not_waited_for(tmp_path, part, ending):
    add(tmp_path, "a")
    (tmp_path / part / f"a{ending}").unlink()
    os.mkfifo(tmp_path / part / f"a{ending}")
    write_split(tmp_path, "train", "a")
    done = run(lambda: VOC(str(tmp_path), ["train"])[0], tmp_path / "out", limit=10)
    assert done.code == 1 and f"a{ending}: no such file" in done.last


def test_a_photograph_is_known_in_every_set_that_names_it(tmp_path):
    for root in ("here", "there", "flat"):
        place = tmp_path / root if root == "flat" else tmp_path / root / "VOCdevkit"
        for folder, names in {
            "VOC2007": ("000027", "000032"),
            "VOC2012": ("2007_000027", "2008_000032"),
        }.items():
            for name in names:
                add(place / folder, name)
            write_split(place / folder, "train", *names)
    here = VOC(str(tmp_path / "here"), ["VOC2012/train"]).photographs
    assert len(here) == 2
    for root in ("here", "here/VOCdevkit"):
        assert len(here & VOC(str(tmp_path / root), ["VOC2007/train"]).photographs) == 1
    (tmp_path / "link").symlink_to(tmp_path / "here")
    assert VOC(str(tmp_path / "link" / "VOCdevkit" / "VOC2012"), ["train"]).photographs == here
    assert (
        not here & VOC(str(tmp_path / "there"), ["VOC2012/train"]).photographs
    )  # equal ids, other photographs
    (tmp_path / "flat" / "VOCdevkit").mkdir()  # one year here, one there: `exclude` sees through it
    (tmp_path / "flat" / "VOC2007").rename(tmp_path / "flat" / "VOCdevkit" / "VOC2007")
    mixed = VOC(str(tmp_path / "flat"), ["VOC2012/train"], exclude=["VOC2007/train"])
    assert ids(mixed) == ["VOC2012/2008_000032"]


def test_splits_are_found_below_root_or_voccdevkit_or_are_root_itself(tmp_path):
    folder = tmp_path / "VOCdevkit" / "VOC2007"
    add(folder, "000001")
    write_split(folder, "test", "000001")
    found = [
        VOC(str(tmp_path), ["VOC2007/test"]),
        VOC(str(tmp_path / "VOCdevkit"), ["VOC2007/test"]),
        VOC(str(folder), ["test"]),
    ]
    assert [ids(dataset) for dataset in found] == [["VOC2007/000001"]] * 3


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


def test_missing_things_give_one_line_with_a_remedy(tmp_path):
    add(tmp_path / "VOC2007", "000001")
    write_split(tmp_path / "VOC2007", "trainval", "000001")
    write_split(tmp_path / "VOC2007", "empty", " ", "")
    for splits, said in [
        (["VOC2012/trainval"], "VOC2012: no such folder"),
        (["VOC2007/test"], "no such split (empty, trainval, and `all`); fetch it with"),
        (["mine/train"], "correct `root` or `splits`"),
        (["train"], "no Annotations in it"),
        (["VOC2007/empty"], "lists no image"),
        ([], "no image is left"),
    ]:
        with pytest.raises(UserError) as error:
            VOC(str(tmp_path), splits)
        message = str(error.value)
        assert said in message and "\n" not in message
        assert ("python -m kdmini.tools.download --root" in message) == any(
            "VOC20" in split for split in splits
        )


def test_all_takes_every_annotation_and_prints_both_counts(tmp_path, capsys):
    folder = tmp_path / "VOC2012"
    for name in ("2008_000003", "2007_000027", "2008_000002"):
        add(folder, name)
    write_split(folder, "trainval", "2008_000002", "2008_000003")
    assert len(VOC(str(tmp_path), ["VOC2012/all"])) == 3
    assert (
        "VOC2012/all: 3 annotated images, of which ImageSets/Main/trainval lists 2"
        in capsys.readouterr().out
    )


def test_photographs_are_left_out_and_taken_once_whatever_their_id(tmp_path, capsys):
    for name in ("2007_000027", "2007_000032", "2008_000032", "000027"):
        add(tmp_path / "VOC2012", name)
    for name in ("000027", "000032", "000040"):
        add(tmp_path / "VOC2007", name)
    write_split(tmp_path / "VOC2007", "test", "000027")
    write_split(tmp_path / "VOC2007", "trainval", "000032", "000040", "000040")
    dataset = VOC(str(tmp_path), ["VOC2012/all"], exclude=["VOC2007/test"])
    assert ids(dataset) == ["VOC2012/000027", "VOC2012/2007_000032", "VOC2012/2008_000032"]
    assert "VOC2012/all: 1 of 4 images left out, as in VOC2007/test" in capsys.readouterr().out
    union = VOC(str(tmp_path), ["VOC2007/trainval", "VOC2012/all"])
    assert ids(union)[:2] == ["VOC2007/000032", "VOC2007/000040"]  # the first of equals, in order
    assert len(union) == len(set(ids(union))) == 5
    assert "VOC2007/trainval + VOC2012/all: 2 repeated images taken once" in capsys.readouterr().out
    with pytest.raises(UserError, match="no image is left"):
        VOC(str(tmp_path), ["VOC2007/test"], exclude=["VOC2007/test"])


@pytest.mark.parametrize("ending", [".JPG", ".jpeg", ".JPEG", ".png", ".PNG"])
def test_other_endings_are_found(tmp_path, ending):
    assert one(tmp_path, xml(thing()), ending=ending)[0][0].shape == (30, 40, 3)


def test_dataset_pickles_serves_threads_and_writes_nothing(tmp_path):
    for number in range(20):
        add(
            tmp_path / "set",
            f"{number:02}",
            xml(thing(box=bndbox(50, 50, 60, 60)) + thing()),
            size=(40 + number, 30),
        )
    write_split(tmp_path / "set", "train", *(f"{number:02}" for number in range(20)))
    before = tree_hash(tmp_path)
    dataset = copy.deepcopy(VOC(str(tmp_path / "set"), ["train"]))  # as pickle does it
    assert pickle.dumps(dataset)
    with ThreadPoolExecutor(8) as pool:
        samples = list(pool.map(dataset.__getitem__, range(20)))
    assert [image.shape[1] for image, _ in samples] == list(range(40, 60))
    assert (
        dataset.report()
        == "19 images whose <size> is wrong, 20 boxes under 1 px dropped in 20 images"
    )
    assert tree_hash(tmp_path) == before


def test_paths_may_hold_spaces_and_any_script(tmp_path):
    assert one(tmp_path / "한글 폴더", xml(thing()))[0][0].shape == (30, 40, 3)


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "RGBA", "CMYK", "RGB"])
def test_every_mode_becomes_rgb_as_pillow_has_it(tmp_path, mode):
    ramp = np.linspace(0, 255, 20 * 30 * 3).reshape(20, 30, 3).astype(np.uint8)
    image = Image.fromarray(ramp).convert(mode)
    path = tmp_path / "a.jpg"
    image.save(path, format="JPEG" if mode in ("L", "CMYK") else "PNG")
    decoded = decode(path)
    assert decoded.shape == (20, 30, 3) and decoded.dtype == np.uint8
    with Image.open(path) as stored:
        assert stored.mode == mode
        np.testing.assert_array_equal(decoded, np.asarray(stored.convert("RGB")))


@pytest.mark.filterwarnings("error")
def test_a_transparent_palette_is_read_without_a_warning(tmp_path):
    image = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).convert("P")
    image.save(tmp_path / "a.png", transparency=bytes(range(256)))
    assert decode(tmp_path / "a.png").shape == (16, 16, 3)


def test_sixteen_bits_are_scaled_and_not_saturated(tmp_path):
    ramp = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    decoded = decode(tmp_path / "a.png")
    assert decoded.shape == (64, 64, 3)
    assert np.abs(decoded.astype(float) - ramp[:, :, None] / 65535 * 255).max() <= 1


@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP", "BMP"])
def test_content_decides_and_not_the_ending(tmp_path, kind):
    Image.new("RGB", (30, 20), (255, 0, 0)).save(tmp_path / "a.jpg", format=kind)
    assert decode(tmp_path / "a.jpg").shape == (20, 30, 3)


def huge_png():
    """The header and a little of a picture of 1.6e9 pixels."""

    def chunk(kind, content):
        return (
            struct.pack(">I", len(content))
            + kind
            + content
            + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 10**6))
    )


@pytest.mark.parametrize(
    "kind", ["half", "empty", "header", "page", "postscript", "huge", "missing"]
)
def test_files_that_are_no_whole_image_are_refused_by_name(tmp_path, kind):
    path = tmp_path / "a.jpg"
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    whole, postscript = path.read_bytes(), io.BytesIO()
    Image.fromarray(noise).save(postscript, "EPS")
    contents = {
        "half": whole[: len(whole) // 2],
        "empty": b"",
        "header": whole[:20],
        "page": b"<!DOCTYPE html><html>not found</html>",
        "postscript": postscript.getvalue(),
        "huge": huge_png(),
    }
    if kind == "missing":
        path.unlink()
    else:
        path.write_bytes(contents[kind])
    with pytest.raises(UserError, match=r"a\.jpg: not a usable image") as error:
        decode(path)
    assert "\n" not in str(error.value) and (kind != "huge" or "pixels" in str(error.value))
    assert kind != "postscript" or "cannot identify" in str(
        error.value
    )  # Pillow would start Ghostscript on it


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_the_limit_of_pixels_is_our_own(tmp_path):
    Image.new("1", (10_001, 10_000)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="10001x10000 pixels"):
        decode(tmp_path / "a.png")


@photos
def test_real_sets_agree_with_torchvision():
    for folder, counts in {"voc20-320": (3000, 800), "voc-original": (32, 8)}.items():
        for split, count in zip(("train", "val"), counts, strict=True):
            dataset = VOC(str(PHOTOS / folder), [split])
            assert len(dataset) == count
            for index in range(0, count, max(count // 20, 1)):
                image, target = dataset[index]
                name = target["id"].removeprefix(f"{folder}/")
                tree = VOCDetection.parse_voc_xml(
                    ET.parse(PHOTOS / folder / "Annotations" / f"{name}.xml").getroot()
                )
                objects = tree["annotation"]["object"]
                boxes = [
                    [float(o["bndbox"][side]) for side in ("xmin", "ymin", "xmax", "ymax")]
                    for o in objects
                ]
                np.testing.assert_array_equal(target["boxes_xyxy"] + [1, 1, 0, 0], boxes)
                assert [dataset.names[label] for label in target["labels"]] == [
                    o["name"] for o in objects
                ]
                with Image.open(PHOTOS / folder / "JPEGImages" / f"{name}.jpg") as photo:
                    np.testing.assert_array_equal(image, np.asarray(photo.convert("RGB")))
            assert dataset.report() == ""


MESSY = {  # file -> names, boxes kept, one of them, report
    "bccd/BloodImage_00343": (
        ["RBC", "WBC", "Platelets"],
        12,
        [180, 328, 181, 329],
        "",
    ),  # a point is one pixel
    "cctv/000000": (["vehicle"], 10, [0, 89, 8, 110], ""),  # floats from 0, no <difficult>, .jpeg
    "coco256/000000000086": (
        ["person", "motorbike", "handbag"],
        3,
        [152, 183, 281, 559],
        "",
    ),  # gray
    "helmet/000102": (
        ["head", "helmet"],
        6,
        [793, 354, 839, 409],
        "1 images whose <size> is wrong",
    ),
    "helmet/000574": (["helmet"], 2, [499, 340, 500, 341], ""),
    "raccoon/raccoon-150": (["raccoon"], 1, [79, 61, 187, 169], ""),  # gray
    "voc_part/2007_000027": (VOC_NAMES, 1, [173, 100, 349, 351], ""),
}


@photos
@pytest.mark.parametrize("file", MESSY)
def test_real_messy_files(tmp_path, file):
    names, count, box, report = MESSY[file]
    source = PHOTOS / "messy" / file
    for part in ("Annotations", "JPEGImages"):
        (tmp_path / part).mkdir()
    for path in source.parent.glob(f"{source.name}.*"):
        (
            tmp_path / ("Annotations" if path.suffix == ".xml" else "JPEGImages") / path.name
        ).write_bytes(path.read_bytes())
    dataset = VOC(str(tmp_path), ["all"], names=names)
    image, target = dataset[0]
    assert image.ndim == 3 and image.shape[2] == 3
    assert len(target["boxes_xyxy"]) == count and box in target["boxes_xyxy"].tolist()
    assert (target["boxes_xyxy"] >= 0).all()
    assert (target["boxes_xyxy"][:, 2:] <= [image.shape[1], image.shape[0]]).all()
    assert dataset.report() == report


@photos
@pytest.mark.parametrize("file", ["grayscale.jpg", "rgba_png_named.jpg"])
def test_real_messy_pixels(file):
    with Image.open(PHOTOS / "messy" / "pixels" / file) as image:
        np.testing.assert_array_equal(
            decode(PHOTOS / "messy" / "pixels" / file), np.asarray(image.convert("RGB"))
        )
