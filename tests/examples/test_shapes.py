"""Generated scenes: boxes against the drawn pixels, determinism, and the set as the VOC reader sees
it.
"""

import hashlib

import numpy as np
import pytest
from PIL import Image

from examples.shapes import (
    FILLS,
    HIDDEN,
    SHAPE_NAMES,
    draw_scene,
    ground,
    main,
    outline,
    stamp,
    write_set,
)
from kdmini.contracts import UserError
from kdmini.detection.voc import VOC


def digest(root):
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return [
        (path.relative_to(root), hashlib.sha256(path.read_bytes()).hexdigest()) for path in files
    ]


def polygon_area(points):
    x, y = points.T
    return abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2


def test_outlines_have_the_areas_of_geometry():
    """Shoelace against the textbook: pi r^2, side^2, 3 sqrt(3) / 4 r^2, five squares of side 2 /
    sqrt(10).
    """
    expected = {
        "circle": np.pi,
        "ring": np.pi,
        "square": 2,
        "triangle": 3 * 3**0.5 / 4,
        "cross": 5 * 0.4,
    }
    for name in SHAPE_NAMES:
        points = outline(name)
        assert np.hypot(*points.T).max() == pytest.approx(1)
        if name in expected:
            assert polygon_area(points) == pytest.approx(expected[name], rel=2e-3)
    assert polygon_area(outline("star")) < 0.5 * np.pi


@pytest.mark.parametrize("name", SHAPE_NAMES)
def test_a_stamp_is_covered_up_to_its_four_sides(name):
    for seed in range(8):
        colours, cover = stamp(np.random.default_rng(seed), name, 30.0)
        rows, columns = np.nonzero(cover >= 0.5)
        assert colours.shape == (*cover.shape, 3) and max(cover.shape) == 30
        assert rows.min() <= 1 and columns.min() <= 1
        assert (
            rows.max() >= cover.shape[0] - 3 and columns.max() >= cover.shape[1] - 3
        )  # a sharp point fades
        assert colours.min() >= 0 and colours.max() <= 255
    assert (cover[len(cover) // 2 - 1, cover.shape[1] // 2 - 1] == 0) == (name == "ring")


def test_boxes_are_tight_around_the_pixels_that_differ_from_the_ground():
    """The ground is drawn again from the scene's own numbers: what differs from it are the objects."""
    size, checked = 128, 0
    for index in range(60):
        image, things, _ = draw_scene(5, index, size)
        rng = np.random.default_rng([5, index])
        rng.uniform(size=3)  # long side, short side, which of them is the height
        empty = ground(rng, image.height, image.width).clip(0, 255).astype(np.uint8)
        rows, columns = np.nonzero((np.asarray(image) != empty).any(2))
        union = np.array([thing.box_xyxy for thing in things])
        x0, y0 = union[:, :2].min(0)
        x1, y1 = union[:, 2:].max(0)
        drawn = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert (
            np.abs(np.array([x0, y0, x1, y1]) - drawn).max() <= 2
        )  # pixels covered by less than half
        checked += len(things)
    assert checked > 100


def test_boxes_and_difficult_follow_what_can_be_seen():
    hidden = 0
    for index in range(150):
        image, things, owner = draw_scene(1, index, 96)
        assert owner.shape == (image.height, image.width) and 1 <= len(things) <= 4
        seen = [number for number in range(owner.max() + 1) if (owner == number).any()]
        assert len(seen) == len(things) and not things[-1].difficult  # nothing lies over the last
        for number, thing in zip(seen, things, strict=True):
            x0, y0, x1, y1 = thing.box_xyxy
            mask = owner == number
            assert mask[y0:y1, x0:x1].sum() == mask.sum()
            assert all(
                edge.any() for edge in (mask[y0, :], mask[y1 - 1, :], mask[:, x0], mask[:, x1 - 1])
            )
            hidden += thing.difficult
    assert 0 < hidden < 75 and HIDDEN == 0.6


def test_scenes_vary():
    scenes = [draw_scene(0, index, 128) for index in range(120)]
    sizes = np.array([image.size for image, _, _ in scenes])
    things = [thing for _, found, _ in scenes for thing in found]
    assert {thing.name for thing in things} == set(SHAPE_NAMES) and len(FILLS) == 4
    assert {len(found) for _, found, _ in scenes} == {1, 2, 3, 4}
    assert len({tuple(size) for size in sizes}) > 60
    assert sizes.max() <= 160 and sizes.max(1).min() >= 102 and (sizes[:, 0] > sizes[:, 1]).any()
    sides = [
        max(thing.box_xyxy[2] - thing.box_xyxy[0], thing.box_xyxy[3] - thing.box_xyxy[1])
        / max(image.size)
        for image, found, _ in scenes
        for thing in found
        if len(found) == 1
    ]
    assert min(sides) > 0.13 and max(sides) < 0.47 and max(sides) > 2 * min(sides)


def test_the_set_is_read_back_as_it_was_drawn(tmp_path):
    write_set(tmp_path / "set", train=6, val=3, size=64, seed=4)
    for split, numbers in {"train": range(6), "val": range(6, 9), "all": range(9)}.items():
        dataset = VOC(str(tmp_path / "set"), [split], names=SHAPE_NAMES)
        assert len(dataset) == len(numbers)
        for sample, index in enumerate(numbers):
            pixels, target = dataset[sample]
            image, things, _ = draw_scene(4, index, 64)
            assert (
                np.abs(pixels.astype(int) - np.asarray(image)).mean() < 15
            )  # JPEG; another scene is farther off
            assert target["boxes_xyxy"].tolist() == [list(thing.box_xyxy) for thing in things]
            assert [SHAPE_NAMES[label] for label in target["labels"]] == [
                thing.name for thing in things
            ]
            assert target["difficult"].tolist() == [thing.difficult for thing in things]
        assert dataset.report() == ""


def test_same_settings_same_bytes_and_other_seeds_differ(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_set(tmp_path / name, train=2, val=1, size=48, seed=seed)
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    first, other = (
        {path: sha for path, sha in digest(tmp_path / name) if path.suffix == ".jpg"}
        for name in "ac"
    )
    assert first.keys() == other.keys() and not set(first.values()) & set(other.values())
    assert draw_scene(0, 1, 48)[1] == draw_scene(0, 1, 48)[1]


def test_a_complete_set_is_kept_and_another_refused(tmp_path, capsys):
    root = tmp_path / "set"
    write_set(root, train=2, val=1, size=48)
    before = [path.stat().st_mtime_ns for path in sorted(root.rglob("*"))]
    write_set(root, train=2, val=1, size=48)
    assert "there already" in capsys.readouterr().out
    with pytest.raises(UserError, match=r'"train": 2.*another --root or delete it$'):
        write_set(root, train=3, val=1, size=48)
    assert [path.stat().st_mtime_ns for path in sorted(root.rglob("*"))] == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("keep")
    with pytest.raises(UserError, match="holds something else"):
        write_set(tmp_path / "mine", train=2, val=1, size=48)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


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
    monkeypatch.undo()
    (tmp_path / ".set.part" / "JPEGImages").mkdir(parents=True)  # as a killed run leaves it
    (tmp_path / "set").mkdir()
    write_set(tmp_path / "set", train=3, val=1, size=48)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_the_command_line(tmp_path):
    main(
        [
            "--root",
            str(tmp_path / "set"),
            "--train",
            "1",
            "--val",
            "1",
            "--size",
            "40",
            "--seed",
            "2",
        ]
    )
    assert len(list((tmp_path / "set" / "JPEGImages").iterdir())) == 2
    with pytest.raises(SystemExit, match=r"^error: .*at least 1"):
        main(["--root", str(tmp_path / "other"), "--val", "0"])
