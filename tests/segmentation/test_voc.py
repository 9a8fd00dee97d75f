"""VOC for segmentation: masks that are indices, lists, photographs, and all that is refused."""

import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from kdmini.contracts import UserError
from kdmini.data.palette import with_palette
from kdmini.data.store import Store
from kdmini.segmentation.voc import SEGMENTED_NAMES, VOC
from tests.segmentation.masked import HEIGHT, WIDTH, add, mask_of, write_split

NAMES = ["ground", "cat", "dog"]


def ids(dataset):
    return [dataset[index][1]["id"] for index in range(len(dataset))]


def one(tmp_path, mask, **settings):
    """The mask of a single image, as it is read. Raises what its reading raises."""
    orientation = settings.pop("orientation", None)
    size = settings.pop("size", (WIDTH, HEIGHT))
    add(tmp_path / "set", "a", mask, orientation, size)
    _, target = VOC(str(tmp_path / "set"), ["all"], **settings)[0]
    return target["mask"]


# --- indices


def test_a_sample_is_the_picture_and_the_indices_of_its_mask(tmp_path):
    mask = mask_of(0, 15, 20, 255)
    add(tmp_path / "set", "a", mask)
    add(tmp_path / "set", "b")
    write_split(tmp_path / "set", "train", "b", "a")
    dataset = VOC(str(tmp_path / "set"), ["train"])
    image, target = dataset[1]
    assert target.keys() == {"mask", "id"}
    assert target["id"] == "set/a"
    assert target["mask"].dtype == np.uint8
    np.testing.assert_array_equal(target["mask"], mask)
    with Image.open(tmp_path / "set/JPEGImages/a.jpg") as photograph:
        np.testing.assert_array_equal(image, np.asarray(photograph))
    assert ids(dataset) == ["set/b", "set/a"]
    assert dataset.names == SEGMENTED_NAMES
    assert dataset.names[15] == "person"


def grey(mask):
    return Image.fromarray(mask)


def bleak(mask):
    """All colours of the palette are black."""
    image = with_palette(mask)
    image.putpalette(bytes(768))
    return image


def see_through(mask):
    image = with_palette(mask)
    image.info["transparency"] = bytes(range(256))
    return image


@pytest.mark.parametrize("form", [with_palette, grey, bleak, see_through])
def test_a_palette_says_nothing_and_grey_is_taken_as_indices(tmp_path, form):
    mask = mask_of(0, 3, 255, 20)
    np.testing.assert_array_equal(one(tmp_path, form(mask)), mask)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_palettes_of_few_bits_are_indices_too(tmp_path, bits):
    mask = mask_of(*range(2**bits))
    path = add(tmp_path, "a", mask)
    with_palette(mask).save(path, bits=bits)
    with Image.open(path) as stored:
        assert f"P;{bits}" in str(stored.tile)
    np.testing.assert_array_equal(VOC(str(tmp_path), ["all"])[0][1]["mask"], mask)


def rgb(mask):
    return with_palette(mask).convert("RGB")


def rgba(mask):
    return with_palette(mask).convert("RGBA")


def grey_and_alpha(mask):
    return grey(mask).convert("LA")


def deep(mask):
    return Image.fromarray(mask.astype(np.uint16))


def bilevel(mask):
    return grey(mask).convert("1")


def grey_of(bits):
    """A PNG of grey values of so few bits, 40x30: Pillow reads such files and writes none."""

    def chunk(kind, data):
        code = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", code)

    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, bits, 0, 0, 0, 0)
    rows = bytes(1 + WIDTH * bits // 8) * HEIGHT
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in chunks)


@pytest.mark.parametrize("bits", [2, 4])
def test_grey_of_few_bits_which_readers_stretch_is_refused(tmp_path, bits):
    path = add(tmp_path, "a")
    path.write_bytes(grey_of(bits))
    with pytest.raises(UserError, match=r"a\.png: a grey mask of fewer than 8 bits a pixel"):
        VOC(str(tmp_path), ["all"])[0]


CONVERT = "map each colour to its index and save it with a palette (Pillow's mode P), the index"


@pytest.mark.parametrize(
    "form, said",
    [
        (rgb, f"a mask of RGB colours, which are no class indices; {CONVERT}"),
        (rgba, f"a mask of RGBA colours, which are no class indices; {CONVERT}"),
        (grey_and_alpha, "a mask of LA colours"),
        (deep, "a mask of 16 bits a pixel, where an index takes 8; save it with a palette"),
        (bilevel, "a grey mask of fewer than 8 bits a pixel; save it with a palette"),
    ],
)
def test_what_holds_no_indices_is_refused(tmp_path, form, said):
    with pytest.raises(UserError) as error:
        one(tmp_path, form(mask_of(0, 1)))
    assert str(error.value).startswith(f"{tmp_path}/set/SegmentationClass/a.png: {said}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "indices, said",
    [
        ((0, 3), "index 3 in 600 pixels, but `names` has 3 classes, 0 to 2, and 255 is void"),
        ((254, 1, 255), "index 254 in "),
        ((0, 3, 7, 200), "index 3 in 300 pixels (and 2 more such indices), but"),
    ],
)
def test_an_index_without_a_name_is_named_with_its_pixels(tmp_path, indices, said):
    with pytest.raises(UserError) as error:
        one(tmp_path, mask_of(*indices), names=NAMES)
    assert f"SegmentationClass/a.png: {said}" in str(error.value)


def test_names_are_checked(tmp_path):
    add(tmp_path, "a", mask_of(0, 254))
    many = [str(index) for index in range(255)]
    assert VOC(str(tmp_path), ["all"], names=many)[0][1]["mask"].max() == 254
    for names, said in ((["a", "a"], "names a class twice"), ([*many, "b"], "255 at most")):
        with pytest.raises(UserError, match=said):
            VOC(str(tmp_path), ["all"], names=names)


# --- whose mask it is

TURN = 6  # a quarter
MIRROR = 2


@pytest.mark.parametrize(
    "size, orientation, said",
    [
        ((80, 60), None, "a mask of 40x30 pixels, but .*a.jpg is 80x60; restore the one"),
        ((30, 40), None, "a mask of 40x30 pixels, but .*a.jpg is 30x40; restore the one"),
        (
            (30, 40),
            TURN,
            "a mask of 40x30 pixels, but .*a.jpg is 30x40 and turned by EXIF; store the",
        ),
        ((30, 41), TURN, "a mask of 40x30 pixels, but .*a.jpg is 30x41; restore the one"),
        ((40, 30), MIRROR, "EXIF turns .*a.jpg, so the mask may belong to it as it is stored or"),
    ],
)
def test_a_mask_that_does_not_fit_its_photograph_is_refused(tmp_path, size, orientation, said):
    with pytest.raises(UserError, match=rf"SegmentationClass/a\.png: {said}") as error:
        one(tmp_path, None, size=size, orientation=orientation)
    assert "\n" not in str(error.value)


def test_a_mask_that_can_only_belong_to_the_pixels_is_taken_and_counted(tmp_path):
    add(tmp_path, "a", orientation=TURN)
    dataset = VOC(str(tmp_path), ["all"], names=[*map(str, range(16))])
    image, target = dataset[0]
    assert image.shape[:2] == target["mask"].shape == (HEIGHT, WIDTH)
    assert "1 images turned by EXIF, and their masks are not" in dataset.report()


def test_as_stored_settles_it_but_for_the_size(tmp_path):
    one(tmp_path, None, orientation=MIRROR, as_stored=True)
    with pytest.raises(UserError, match="turned by EXIF"):
        one(tmp_path, None, orientation=TURN, size=(30, 40), as_stored=True)


# --- files


def test_files_that_are_missing_or_no_masks_are_named(tmp_path):
    for name in ("a", "b", "c", "d"):
        add(tmp_path / "set", name)
    write_split(tmp_path / "set", "train", *"abcd")
    masks = tmp_path / "set/SegmentationClass"
    (masks / "a.png").unlink()
    (masks / "b.png").rename(masks / "b.jpg")
    (masks / "c.png").write_bytes((masks / "d.png").read_bytes()[:60])
    with_palette(mask_of(0)).save(tmp_path / "elsewhere.png")
    (masks / "d.png").unlink()
    os.symlink(tmp_path / "elsewhere.png", masks / "d.png")
    dataset = VOC(str(tmp_path / "set"), ["train"])
    for index, said in enumerate(
        ["a.png: no such file; restore", "b.jpg: not one of .png", "c.png: not a usable image",
         "d.png: a link that leads out"]
    ):  # fmt: skip
        with pytest.raises(UserError, match=said):
            dataset[index]


def test_a_store_tells_of_all_that_is_wrong_or_leaves_it_out(tmp_path, capsys):
    for name in "abc":
        add(tmp_path, name)
    add(tmp_path, "b", rgb(mask_of(0, 1)))
    add(tmp_path, "c", mask_of(0, 77))
    with pytest.raises(
        UserError, match=r"train: 2 of 3 images are bad, as .*b\.png: a mask of RGB"
    ):
        Store(VOC(str(tmp_path), ["all"]), 32, name="train")
    store = Store(VOC(str(tmp_path), ["all"]), 32, name="train", on_bad="skip")
    assert len(store) == 1
    assert "c.png: index 77 in 600 pixels" in capsys.readouterr().err


def test_a_store_to_learn_from_has_the_masks_beside_their_pixels(tmp_path):
    mask = mask_of(0, 15, 20, 255)
    add(tmp_path, "a", mask)
    store = Store(VOC(str(tmp_path), ["all"]), WIDTH, training=True)
    labels = (store.pixels >> 24 & 255).reshape(HEIGHT, WIDTH)
    np.testing.assert_array_equal(labels, mask)


# --- lists


def test_lists_are_those_of_segmentation(tmp_path):
    folder = tmp_path / "VOCdevkit/VOC2012"
    for name in ("2007_000032", "2008_000002", "2008_000003"):
        add(folder, name)
    (folder / "ImageSets/Main").mkdir()
    (folder / "ImageSets/Main/train.txt").write_text("2008_000003\n")
    write_split(folder, "train", "2007_000032")
    write_split(folder, "val", "2008_000002")
    write_split(folder, "trainval", "2007_000032", "2008_000002")
    for root, split in ((tmp_path, "VOC2012/train"), (folder, "train")):
        assert ids(VOC(str(root), [split])) == ["VOC2012/2007_000032"]
    assert len(VOC(str(tmp_path), ["VOC2012/trainval"])) == 2
    assert len(VOC(str(tmp_path), ["VOC2012/train", "VOC2012/val"])) == 2
    assert len(VOC(str(tmp_path), ["VOC2012/all"])) == 3


@pytest.mark.parametrize(
    "splits, said",
    [
        (["val"], r"ImageSets/Segmentation/val\.txt: no such split \(empty, train, and `all`\)"),
        (["empty"], "lists no image"),
        (["other/train"], "other: no such folder, or no SegmentationClass in it"),
        ([], "no image is left"),
        (["own.txt"], "own.txt: no such file; .*ends with .txt is the path of a list"),
        (["a\0.txt"], "is not a folder and a name"),
    ],
)
def test_lists_that_are_missing_or_empty_are_one_line(tmp_path, splits, said):
    add(tmp_path, "a")
    write_split(tmp_path, "train", "a")
    write_split(tmp_path, "empty", "")
    with pytest.raises(UserError, match=said) as error:
        VOC(str(tmp_path), splits)
    assert "\n" not in str(error.value)


@pytest.fixture
def with_sbd(tmp_path):
    """VOC2012 of one image to learn from and one to evaluate on, and masks of three."""
    folder = tmp_path / "VOCdevkit/VOC2012"
    for name in ("2007_000032", "2008_000002"):
        add(folder, name)
    write_split(folder, "val", "2008_000002")
    for name in ("2007_000032", "2008_000002", "2008_000015"):
        mask = Image.fromarray(mask_of(0, 7))
        add(folder, name, mask, masks="../../sbd")
    return tmp_path


@pytest.mark.parametrize(
    "form",
    ["{}", "/JPEGImages/{}.jpg /SegmentationClassAug/{}.png", "JPEGImages/{}.jpg sbd/{}.png"],
)
def test_masks_and_a_list_of_them_may_lie_elsewhere(with_sbd, form):
    own = with_sbd / "train_aug.txt"
    lines = [form.format(name, name) for name in ("2008_000015", "2007_000032", "2008_000002")]
    own.write_text("\n".join(lines))
    root = str(with_sbd / "VOCdevkit/VOC2012")
    train = VOC(root, [str(own)], masks=str(with_sbd / "sbd"), exclude=["val"])
    assert ids(train) == ["VOC2012/2008_000015", "VOC2012/2007_000032"]
    assert set(np.unique(train[0][1]["mask"])) == {0, 7}  # of SBD, also where VOC has one
    val = VOC(str(with_sbd), ["VOC2012/val"])
    assert set(np.unique(val[0][1]["mask"])) == {0, 15}
    assert not train.photographs & val.photographs
    assert ids(VOC(str(with_sbd), ["VOC2012/val"], masks=str(with_sbd / "sbd"))) == ids(val)
    assert val.photographs < VOC(root, [str(own)], masks=str(with_sbd / "sbd")).photographs


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "own.txt: lists no image"),
        ("../../x\n", "is not the name of an image"),
        ("JPEGImages/../../x.jpg\n", "is not the name of an image"),
    ],
)
def test_lists_of_ones_own_are_checked(with_sbd, monkeypatch, text, said):
    monkeypatch.chdir(with_sbd)
    (with_sbd / "own.txt").write_text(text)
    with pytest.raises(UserError, match=said):
        VOC("VOCdevkit/VOC2012", ["own.txt"])
    with pytest.raises(UserError, match="`root` is the folder of JPEGImages itself"):
        VOC(".", ["own.txt"])


def test_masks_elsewhere_have_to_be_there(with_sbd):
    for masks, said in (
        (with_sbd / "sdb", "sdb: no such folder; correct `masks`"),
        ("x", "no x in"),
    ):
        with pytest.raises(UserError, match=said):
            VOC(str(with_sbd), ["VOC2012/val"], masks=str(masks))


# --- the report


def read_all(tmp_path, masks):
    """The data set of masks of three classes, read twice."""
    for name, mask in masks.items():
        add(tmp_path, name, mask)
    dataset = VOC(str(tmp_path), ["all"], names=NAMES)
    for index in (*range(len(dataset)), *range(len(dataset))):
        dataset[index]
    return dataset


def test_pixels_are_counted_once_however_often_an_image_is_read(tmp_path):
    dataset = read_all(tmp_path, {"a": mask_of(0, 1, 2, 255), "b": mask_of(0)})
    assert [count.pixels.tolist() for count in dataset.counts.values()] == [
        [300, 300, 300, 300],
        [1200, 0, 0, 0],
    ]
    assert dataset.report() == ""


def test_masks_of_void_alone_and_classes_that_are_nowhere_are_said(tmp_path):
    void = mask_of(255)
    dataset = read_all(tmp_path, {"a": mask_of(0, 255), "b": void, "c": void})
    name = tmp_path.name
    assert dataset.report() == f"2 masks of void alone, as {name}/b, no pixel of cat, dog"


def test_a_set_of_void_alone_is_refused(tmp_path):
    dataset = read_all(tmp_path, {"a": mask_of(255)})
    with pytest.raises(UserError, match="masks of all 1 images are void, index 255, alone"):
        dataset.report()


def test_nothing_read_is_nothing_to_report(tmp_path):
    add(tmp_path, "a")
    assert VOC(str(tmp_path), ["all"]).report() == ""
