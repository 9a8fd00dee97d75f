"""XML of other tools, deep images, and sets in which most boxes are lost."""

import numpy as np
import pytest
from PIL import Image

from kdmini.contracts import BadObjects, UserError
from kdmini.data.store import Store
from kdmini.detection.samples import Marked, Samples
from kdmini.detection.voc import VOC
from tests.data.voc_folder import BOX, add, bndbox, one, thing, write_split, xml

# --- <difficult>


@pytest.mark.parametrize(
    "text, expected",
    [
        *[(text, False) for text in ("0", "", " 0\n", "0.0", "false", "False", "no")],
        *[(text, True) for text in ("1", "1.0", "true", "True", "Yes")],
        *[(text, None) for text in ("Unspecified", "unspecified", "Unknown")],
    ],
)
def test_difficult_is_read_as_tools_write_it(tmp_path, text, expected):
    dataset = one(tmp_path, xml(thing(extra=f"<difficult>{text}</difficult>") + thing()))
    _, target = dataset[0]
    assert target["difficult"].tolist() == [bool(expected), False]
    unsaid = "1 objects that do not say if difficult, taken as not"
    assert dataset.report() == (unsaid if expected is None else "")


# --- objects without a box

ROBNDBOX = "<robndbox><cx>20</cx><cy>15</cy><w>10</w><h>4</h><angle>{}</angle></robndbox>"
POLYGON = "<polygon><x1>1</x1><y1>2</y1></polygon>"
NO_BOX = {
    ROBNDBOX.format(0.5): "no <bndbox> but <robndbox>; `enclose: true` takes the box around it",
    POLYGON: "no <bndbox> but <polygon>",
    "": "no <bndbox> but nothing",
}


@pytest.fixture
def two(tmp_path):
    """-> a set of a, whose second object has the given box, and b, which is well."""

    def make(box, **settings):
        add(tmp_path / "set", "a", xml(thing() + thing("cat", box)))
        add(tmp_path / "set", "b")
        write_split(tmp_path / "set", "train", "a", "b")
        return VOC(str(tmp_path / "set"), ["train"], **settings)

    return make


@pytest.mark.parametrize("box", [*NO_BOX, bndbox(9, 9, 4, 4), bndbox(0.1, 0.2, 0.3, 0.4)])
def test_only_the_object_is_left_out_where_only_that_is_bad(two, capsys, box):
    dataset = two(box)
    with pytest.raises(BadObjects, match=r"a\.xml: object 2 \('cat'\): ") as error:
        dataset[0]
    assert NO_BOX.get(box, "") in str(error.value)
    with pytest.raises(UserError, match=r"train: 1 objects are bad, as .*a\.xml: object 2"):
        Store(dataset, 32, name="train")
    store = Store(dataset, 32, name="train", on_bad="skip")
    assert [target["boxes_xyxy"].tolist() for target in store.targets] == [[[10, 5, 30, 25]]] * 2
    assert "train: 1 objects are bad and left out" in capsys.readouterr().err


@pytest.mark.parametrize("box", NO_BOX)
def test_an_image_of_bad_objects_alone_is_bad_and_no_background(tmp_path, box):
    add(tmp_path, "a", xml(thing(box=box)))
    add(tmp_path, "b")
    write_split(tmp_path, "train", "a", "b")
    dataset = VOC(str(tmp_path), ["train"])
    with pytest.raises(UserError, match="train: 1 of 2 images are bad"):
        Store(dataset, 32, name="train")
    assert len(Store(dataset, 32, on_bad="skip")) == 1


def test_bad_images_and_bad_objects_are_told_together(two):
    dataset = two(POLYGON)
    dataset.records[1] = UserError("b: gone")
    with pytest.raises(UserError, match="train: 1 of 2 images and 1 objects are bad, as b: gone"):
        Store(dataset, 32, name="train")


@pytest.mark.parametrize(
    "angle, expected",
    [
        (0, [14, 12, 25, 17]),
        (np.pi / 2, [17, 9, 22, 20]),
        (np.pi, [14, 12, 25, 17]),
        (np.pi / 4, [14.0503, 9.0503, 24.9497, 19.9497]),  # half of 14 / sqrt(2) is 4.9497
        (-np.pi / 4, [14.0503, 9.0503, 24.9497, 19.9497]),
    ],
)
def test_a_rotated_box_gives_the_one_around_it_if_so_configured(two, angle, expected):
    dataset = two(ROBNDBOX.format(angle), enclose=True)
    _, target = dataset[0]
    assert target["boxes_xyxy"][0].tolist() == [10, 5, 30, 25]
    np.testing.assert_allclose(target["boxes_xyxy"][1], expected, atol=1e-3)
    with pytest.raises(UserError, match=r"object 2 \('cat'\): angle is 'x', not a number"):
        two(ROBNDBOX.format("x"), enclose=True)[0]


# --- objects elsewhere


@pytest.mark.parametrize(
    "text, said",
    [
        (f"<objects>{thing() * 3}</objects>", "3 <object> within <objects>"),
        (f"{thing()}<objects>{thing()}</objects>", "1 <object> within <objects>"),
        (thing(box=BOX + thing()), "1 <object> within <object>"),
    ],
)
def test_objects_within_another_element_are_not_passed_over(tmp_path, text, said):
    with pytest.raises(UserError, match=rf"a\.xml: {said}, where none is looked for; move them"):
        one(tmp_path, xml(text))


@pytest.mark.parametrize("box", [(0.1, 0.2, 0.5, 0.9), (0, 0, 1, 0.5), (0, 0, 0.001, 1)])
def test_parts_of_the_sides_are_no_pixels(tmp_path, box):
    with pytest.raises(UserError, match="are parts of the sides, from 0 to 1; multiply"):
        one(tmp_path, xml(thing(box=bndbox(*box))))


@pytest.mark.parametrize("box", [(0, 0, 1, 1), (1, 1, 1, 1), (0.5, 0.5, 1.5, 1.5)])
def test_small_boxes_in_pixels_are_none(tmp_path, box):
    assert one(tmp_path, xml(thing(box=bndbox(*box))))[0]


# --- sets in which most boxes are lost


def read_all(tmp_path, *boxes_of_images, **settings):
    """The samples of images of 40x30 with these boxes, all read."""
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    samples = Samples(**settings)
    for index, boxes in enumerate(boxes_of_images):
        count = len(boxes)
        marked = Marked(
            id=f"image {index}",
            boxes_xyxy=np.array(boxes, np.float32).reshape(-1, 4),
            labels=np.zeros(count, np.int64),
            difficult=np.zeros(count, bool),
        )
        samples.sample(index, str(tmp_path / "a.png"), marked)
    return samples


GOOD = [10, 5, 30, 25]
OUT = [60, 50, 80, 60]
SMALL = [5, 5, 5.5, 25]


@pytest.mark.parametrize(
    "images, said",
    [
        ([[GOOD, OUT, OUT]], "2 of 3 boxes lie outside their images, as in image 0, as if"),
        ([[GOOD], [OUT], [OUT]], "as in image 1, as if these were 2.0 times larger"),
        ([[GOOD], [SMALL], [SMALL]], "2 of 3 boxes have under 1 px in their images, as in image 1"),
        ([[SMALL], [OUT]], "none of the 2 images has an object"),
        ([[], []], "none of the 2 images has an object"),
    ],
)
def test_a_set_that_loses_most_boxes_for_one_reason_stops(tmp_path, images, said):
    samples = read_all(tmp_path, *images)
    with pytest.raises(UserError, match=said) as error:
        samples.report()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "images, report",
    [
        ([], ""),
        ([[GOOD], []], ""),
        ([[GOOD, OUT], []], "1 boxes mostly outside the picture in 1 images"),
        ([[GOOD, SMALL], [GOOD, SMALL]], "2 boxes under 1 px dropped in 2 images"),
        (
            [[GOOD, GOOD, SMALL, OUT]],
            "1 boxes under 1 px dropped in 1 images, "
            "1 boxes mostly outside the picture in 1 images",
        ),
    ],
)
def test_fewer_are_counted(tmp_path, images, report):
    assert read_all(tmp_path, *images).report() == report


def test_the_store_says_of_which_set_a_report_is(tmp_path):
    add(tmp_path, "a", xml(""))
    write_split(tmp_path, "train", "a")
    with pytest.raises(UserError, match=r"^val: none of the 1 images has an object"):
        Store(VOC(str(tmp_path), ["train"]), 32, name="val")


# --- deep images


@pytest.fixture
def thermal(tmp_path):
    """-> the only image of a set, with values of 12 bits in 16."""
    add(tmp_path / "set", "a", ending=".png")
    write_split(tmp_path / "set", "train", "a")
    values = np.linspace(0, 4012, 30 * 40).astype(np.uint16).reshape(30, 40)
    Image.fromarray(values).save(tmp_path / "set/JPEGImages/a.png")
    return str(tmp_path / "set")


def test_deep_images_that_use_few_bits_are_said(thermal):
    dataset = VOC(thermal, ["train"])
    image, _ = dataset[0]
    assert image.max() == 15
    assert dataset.report() == (
        "1 images of 16 bits use 12 of them, so they are dark (`bits: 12` scales grey ones)"
    )


def test_stated_bits_scale_deep_images(thermal):
    dataset = VOC(thermal, ["train"], bits=12)
    image, _ = dataset[0]
    assert image.max() == 4012 // 16
    assert len(np.unique(image)) == 251
    assert dataset.report() == ""


def test_bits_that_do_not_hold_the_values_are_refused(thermal):
    with pytest.raises(UserError, match=r"a\.png: its values take 12 bits, which `bits: 11` does"):
        VOC(thermal, ["train"], bits=11)[0]
