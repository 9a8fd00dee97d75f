"""Generated scenes: boxes against the drawn pixels, and the set as VOC reads it."""

import hashlib

import numpy as np
import pytest
from PIL import Image

from examples.paint import FILLS, ground, outline, stamp
from examples.shapes import HIDDEN, QUALITY, SHAPE_NAMES, draw_scene, main, write_set
from kdmini.classification.folders import Folders
from kdmini.contracts import UserError
from kdmini.detection.voc import VOC
from kdmini.segmentation.voc import VOC as Segmentation


def digests(root):
    """Path below root -> sha256, of every file."""
    sha256_of = {}
    for path in root.rglob("*"):
        if path.is_file():
            sha256_of[path.relative_to(root)] = hashlib.sha256(path.read_bytes()).hexdigest()
    return sha256_of


def polygon_area(points):
    """By the shoelace formula."""
    x, y = points.T
    return abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2


@pytest.mark.parametrize("name", SHAPE_NAMES)
def test_outlines_reach_the_unit_circle(name):
    assert np.hypot(*outline(name).T).max() == pytest.approx(1)


@pytest.mark.parametrize(
    "name, area",
    [
        ("circle", np.pi),
        ("ring", np.pi),
        ("square", 2),
        ("triangle", 3 * 3**0.5 / 4),
        ("cross", 5 * 0.4),  # five squares of side 2 / sqrt(10)
    ],
)
def test_outlines_have_the_areas_of_geometry(name, area):
    assert polygon_area(outline(name)) == pytest.approx(area, rel=2e-3)


def test_a_star_is_less_than_half_a_circle():
    assert polygon_area(outline("star")) < 0.5 * np.pi


@pytest.mark.parametrize("name", SHAPE_NAMES)
def test_a_stamp_is_covered_up_to_its_four_sides(name):
    for seed in range(8):
        colours, cover = stamp(np.random.default_rng(seed), name, 30.0)
        height, width = cover.shape
        assert max(height, width) == 30
        assert colours.shape == (height, width, 3)
        assert 0 <= colours.min() <= colours.max() <= 255
        rows, columns = np.nonzero(cover >= 0.5)
        assert max(rows.min(), columns.min()) <= 1
        assert rows.max() >= height - 3  # a sharp point fades
        assert columns.max() >= width - 3


@pytest.mark.parametrize("name", SHAPE_NAMES)
def test_a_ring_alone_has_a_hole_in_the_middle(name):
    _, cover = stamp(np.random.default_rng(7), name, 30.0)
    height, width = cover.shape
    assert (cover[height // 2 - 1, width // 2 - 1] == 0) == (name == "ring")


def test_boxes_are_tight_around_the_pixels_that_differ_from_the_ground():
    """The ground is drawn again from the scene's numbers: what differs are the objects."""
    checked = 0
    for index in range(60):
        scene = draw_scene(5, index, 128)
        rng = np.random.default_rng([5, index])
        rng.uniform(size=3)  # long side, short side, which of them is the height
        empty = ground(rng, scene.image.height, scene.image.width)
        differs = np.asarray(scene.image) != empty.clip(0, 255).astype(np.uint8)
        rows, columns = np.nonzero(differs.any(2))
        drawn = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        boxes_xyxy = np.array([thing.box_xyxy for thing in scene.things])
        union = np.concatenate([boxes_xyxy[:, :2].min(0), boxes_xyxy[:, 2:].max(0)])
        assert np.abs(union - drawn).max() <= 2  # pixels covered by less than half
        checked += len(scene.things)
    assert checked > 100


@pytest.fixture(scope="module")
def scenes():
    return [draw_scene(1, index, 96) for index in range(150)]


def test_boxes_are_tight_around_what_can_be_seen(scenes):
    for scene in scenes:
        owner = scene.owner
        assert owner.shape == (scene.image.height, scene.image.width)
        assert 1 <= len(scene.things) <= 4
        seen = [number for number in range(owner.max() + 1) if (owner == number).any()]
        for number, thing in zip(seen, scene.things, strict=True):
            x0, y0, x1, y1 = thing.box_xyxy
            mask = owner == number
            inside = mask[y0:y1, x0:x1]
            assert inside.sum() == mask.sum()
            edges = (inside[0], inside[-1], inside[:, 0], inside[:, -1])
            assert all(edge.any() for edge in edges)


def test_some_objects_are_difficult_but_never_the_last(scenes):
    assert HIDDEN == 0.6
    assert not any(scene.things[-1].difficult for scene in scenes)  # nothing lies over it
    assert 0 < sum(thing.difficult for scene in scenes for thing in scene.things) < 75


@pytest.fixture(scope="module")
def larger_scenes():
    return [draw_scene(0, index, 128) for index in range(120)]


def test_scenes_vary_in_their_objects(larger_scenes):
    names = {thing.name for scene in larger_scenes for thing in scene.things}
    assert names == set(SHAPE_NAMES)
    assert len(FILLS) == 4
    assert {len(scene.things) for scene in larger_scenes} == {1, 2, 3, 4}


def test_scenes_vary_in_size_about_the_one_asked_for(larger_scenes):
    sizes = np.array([scene.image.size for scene in larger_scenes])  # width, height
    assert len({tuple(size) for size in sizes}) > 60
    assert sizes.max() <= 160
    assert sizes.max(1).min() >= 102
    assert (sizes[:, 0] > sizes[:, 1]).any()


def test_objects_vary_in_size(larger_scenes):
    sides = []  # in long sides of the image, of objects that nothing lies over
    for scene in larger_scenes:
        if len(scene.things) == 1:
            x0, y0, x1, y1 = scene.things[0].box_xyxy
            sides.append(max(x1 - x0, y1 - y0) / max(scene.image.size))
    assert min(sides) > 0.13
    assert max(sides) < 0.47
    assert max(sides) > 2 * min(sides)


@pytest.mark.parametrize(
    "split, numbers", [("train", range(6)), ("val", range(6, 9)), ("all", range(9))]
)
def test_the_set_is_read_back_as_it_was_drawn(tmp_path, split, numbers):
    write_set(tmp_path / "set", train=6, val=3, size=64, seed=4)
    dataset = VOC(str(tmp_path / "set"), [split], names=SHAPE_NAMES)
    assert len(dataset) == len(numbers)
    for sample, index in enumerate(numbers):
        pixels, target = dataset[sample]
        scene = draw_scene(4, index, 64)
        difference = np.abs(pixels.astype(int) - np.asarray(scene.image)).mean()
        assert difference < 15  # JPEG; another scene is farther off
        assert target["boxes_xyxy"].tolist() == [list(thing.box_xyxy) for thing in scene.things]
        names = [SHAPE_NAMES[label] for label in target["labels"]]
        assert names == [thing.name for thing in scene.things]
        assert target["difficult"].tolist() == [thing.difficult for thing in scene.things]
    assert dataset.report() == ""


CLASSES = ["ground", *SHAPE_NAMES]
VOID = 255


def test_a_mask_names_what_is_seen_and_is_void_along_borders(larger_scenes):
    """Pixel by pixel, of a few scenes, and in all of them inside of objects and ground."""
    for scene in larger_scenes[:3]:
        owner = np.pad(scene.owner, 1, mode="edge")
        for row, column in np.ndindex(scene.mask.shape):
            y, x = row + 1, column + 1
            around = {owner[y - 1, x], owner[y + 1, x], owner[y, x - 1], owner[y, x + 1]}
            is_border = around != {owner[y, x]}
            assert (scene.mask[row, column] == VOID) == is_border
    for scene in larger_scenes:
        solid = scene.mask != VOID
        assert ((scene.mask == 0) == (scene.owner < 0))[solid].all()
        seen = [number for number in range(scene.owner.max() + 1) if (scene.owner == number).any()]
        for number, thing in zip(seen, scene.things, strict=True):
            indices = scene.mask[solid & (scene.owner == number)]
            assert set(indices.tolist()) <= {CLASSES.index(thing.name)}


def test_void_leaves_something_of_every_shape(larger_scenes):
    pixels = sum(np.bincount(scene.mask.ravel(), minlength=256) for scene in larger_scenes)
    assert (pixels[: len(CLASSES)] > 0.005 * pixels.sum()).all()
    assert 0.02 < pixels[VOID] / pixels.sum() < 0.05
    assert pixels[len(CLASSES) : VOID].sum() == 0


EXPECTED = [  # width and height, sum of the pixels, things
    (
        (109, 139),
        6656562,
        [("circle", (10, 1, 61, 50), False), ("circle", (40, 39, 102, 89), False)],
    ),
    (
        (128, 106),
        5872814,
        [
            ("ring", (37, 45, 73, 85), False),
            ("triangle", (42, 66, 57, 85), False),
            ("square", (92, 82, 113, 100), False),
        ],
    ),
    ((76, 79), 3137438, [("ring", (41, 45, 61, 69), False)]),
]


def test_masks_do_not_change_pictures_and_boxes():
    """As they were drawn before there were masks; a sum, as sines may differ in a last bit."""
    drawn = []
    for seed, index, size in ((0, 0, 128), (0, 319, 128), (7, 3, 64)):
        scene = draw_scene(seed, index, size)
        total = int(np.asarray(scene.image).sum())
        drawn.append((scene.image.size, total, [tuple(thing) for thing in scene.things]))
    for (size, total, things), expected in zip(drawn, EXPECTED, strict=True):
        assert (size, things) == (expected[0], expected[2])
        assert total == pytest.approx(expected[1], abs=100)


@pytest.mark.parametrize("split, numbers", [("train", range(6)), ("val", range(6, 9))])
def test_masks_are_read_back_as_they_were_drawn(tmp_path, split, numbers):
    write_set(tmp_path / "set", train=6, val=3, size=64, seed=4)
    dataset = Segmentation(str(tmp_path / "set"), [split], names=CLASSES)
    boxes = VOC(str(tmp_path / "set"), [split], names=SHAPE_NAMES)
    assert dataset.photographs == boxes.photographs
    for sample, index in enumerate(numbers):
        image, target = dataset[sample]
        np.testing.assert_array_equal(target["mask"], draw_scene(4, index, 64).mask)
        assert target["id"] == boxes[sample][1]["id"]
        np.testing.assert_array_equal(image, boxes[sample][0])


def test_same_settings_same_bytes_and_other_seeds_differ(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_set(tmp_path / name, train=2, val=1, size=48, seed=seed)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    first = digests(tmp_path / "a/JPEGImages")
    other = digests(tmp_path / "c/JPEGImages")
    assert first.keys() == other.keys()
    assert not set(first.values()) & set(other.values())


def test_only_the_named_shapes_at_the_sides_asked_for_and_indices_in_that_order():
    names = ["ring", "cross"]
    for number in range(40):
        scene = draw_scene(0, number, 96, names, (0.6, 0.65))
        last = scene.things[-1]  # which nothing covers
        x0, y0, x1, y1 = last.box_xyxy
        long = max(scene.image.size)
        assert 0.6 * long - 1.5 <= max(x1 - x0, y1 - y0) <= 0.65 * long + 1.5
        inside = scene.mask[y0:y1, x0:x1]
        assert (inside == 1 + names.index(last.name)).any()
        assert set(np.unique(scene.mask)) <= {0, 1, 2, 255}


def test_the_named_shapes_belong_to_the_settings(tmp_path):
    write_set(tmp_path / "set", train=2, val=1, size=32, names=["ring"], side=(0.5, 0.6))
    with pytest.raises(UserError, match="delete it"):
        write_set(tmp_path / "set", train=2, val=1, size=32)
    with pytest.raises(UserError, match="the lowest goes first"):
        write_set(tmp_path / "other", side=(0.6, 0.5))


def test_folders_hold_one_shape_an_image_and_as_many_of_each(tmp_path, capsys):
    names = ["ring", "cross", "star"]
    settings = {"train": 12, "val": 6, "size": 48, "seed": 2, "names": names}
    write_set(tmp_path / "set", **settings, folders=True)
    for split, first, each in (("train", 0, 4), ("val", 12, 2)):
        dataset = Folders(str(tmp_path / "set"), split, names=names)
        labels = [dataset[index][1]["label"] for index in range(len(dataset))]
        assert labels == [0] * each + [1] * each + [2] * each
        scene = draw_scene(2, first + 1, 48, ["cross"], most=1)
        assert [thing.name for thing in scene.things] == ["cross"]
        scene.image.save(tmp_path / "again.jpg", quality=QUALITY)
        with Image.open(tmp_path / "again.jpg") as again:
            np.testing.assert_array_equal(dataset[each][0], np.asarray(again))
    write_set(tmp_path / "set", **settings, folders=True)
    assert "there already" in capsys.readouterr().out
    with pytest.raises(UserError, match=r'"folders": true.*delete it'):
        write_set(tmp_path / "set", **settings)


def test_a_scene_is_a_pure_function_of_its_numbers():
    assert draw_scene(0, 1, 48).things == draw_scene(0, 1, 48).things


def times(root):
    return {path: path.stat().st_mtime_ns for path in root.rglob("*")}


def test_a_complete_set_is_kept_and_another_refused(tmp_path, capsys):
    root = tmp_path / "set"
    write_set(root, train=2, val=1, size=48)
    before = times(root)
    write_set(root, train=2, val=1, size=48)
    assert "there already" in capsys.readouterr().out
    with pytest.raises(UserError, match=r'"train": 2.*another --root or delete it$'):
        write_set(root, train=3, val=1, size=48)
    assert times(root) == before


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("keep")
    with pytest.raises(UserError, match="holds something else"):
        write_set(tmp_path, train=2, val=1, size=48)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_nothing_half_written_stays(tmp_path, monkeypatch):
    saved = Image.Image.save

    def fail_at_the_third(self, path, **options):
        if path.stem == "000002":
            raise OSError(28, "No space left on device")
        saved(self, path, **options)

    monkeypatch.setattr(Image.Image, "save", fail_at_the_third)
    with pytest.raises(UserError, match=r"cannot be written .*No space left"):
        write_set(tmp_path / "set", train=3, val=1, size=48)
    assert not list(tmp_path.iterdir())


def test_what_a_killed_run_left_is_cleared(tmp_path):
    (tmp_path / ".set.part" / "JPEGImages").mkdir(parents=True)
    (tmp_path / "set").mkdir()
    write_set(tmp_path / "set", train=3, val=1, size=48)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_the_command_line(tmp_path, capsys):
    settings = "--train 1 --val 1 --size 40 --seed 2"
    main(["--root", str(tmp_path / "set"), *settings.split()])
    assert len(list((tmp_path / "set" / "JPEGImages").iterdir())) == 2
    with pytest.raises(SystemExit, match="2"):
        main(["--root", str(tmp_path / "other"), "--val", "0"])
    assert "argument --val: 0 is out of range; use 1 to " in capsys.readouterr().err
