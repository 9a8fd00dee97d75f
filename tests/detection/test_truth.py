"""Boxes on their way into the rendered picture and into a batch."""

from typing import NamedTuple

import numpy as np
import pytest
import torch

from kdmini.data.layout import Layout, letterbox, mirror, mosaic, where, zoom
from kdmini.data.loader import Augment, TrainLoader
from kdmini.data.render import render
from kdmini.data.store import Store
from kdmini.detection.truth import (
    Boxes,
    BoxesAndRegions,
    Rendered,
    objects_of,
    pad,
    render_boxes,
)
from tests.data.arrays import Size, noise, random_mosaics, zoomed_mosaic
from tests.data.pixel_by_pixel import grey_levels
from tests.detection.boxed import keep_boxed, some_pictures
from tests.detection.lit import extent, lit

SIDE = 64  # of the rendered pictures
ALONE = np.array([0])  # the first picture of a store


def boxes_of(store: Store, layout: Layout, imgsz: int = SIDE) -> np.ndarray:
    """Of a layout of one image, (G, 4)."""
    (rendered,) = render_boxes(objects_of(store), layout, imgsz)
    assert rendered.boxes_xyxy.dtype == np.float32
    assert len(rendered.boxes_xyxy) == len(rendered.labels)
    return rendered.boxes_xyxy


def moved(layout: Layout, right: float, down: float, factor: float = 1.0) -> Layout:
    """Zoomed about the middle, which is then moved."""
    to = np.array([[SIDE / 2 + right, SIDE / 2 + down]])
    return zoom(layout, np.array([factor]), SIDE / 2, to)


def as_tile(store: Store, position: int) -> Layout:
    """The first picture as one tile of a mosaic of dark ones; they meet at (28, 18)."""
    four = np.ones((1, 4), int)
    four[0, position] = 0
    whole = mosaic(store, four, SIDE, np.array([[60.0, 50.0]]))
    return zoom(whole, np.ones(1), SIDE, np.array([[32.0, 32.0]]))


# --- where boxes lie, written down


class Case(NamedTuple):
    size: Size  # height, width of the file
    box: list[int]
    change: str  # of the letterbox, see `laid_out`
    expected: list[float]


CASES = {
    "as it is": Case((64, 64), [10, 20, 30, 44], "", [10, 20, 30, 44]),
    "below a margin": Case((32, 64), [10, 4, 30, 28], "", [10, 20, 30, 44]),
    "beside a margin": Case((64, 20), [2, 20, 18, 44], "", [24, 20, 40, 44]),
    "enlarged": Case((16, 32), [5, 2, 15, 14], "", [10, 20, 30, 44]),
    "reduced": Case((256, 256), [40, 80, 120, 176], "", [10, 20, 30, 44]),
    "mirrored": Case((64, 64), [34, 20, 54, 44], "mirrored", [10, 20, 30, 44]),
    "shifted": Case((64, 64), [20, 10, 40, 34], "10 left, 10 down", [10, 20, 30, 44]),
    "zoomed out": Case((64, 64), [4, 12, 44, 60], "half as large", [18, 22, 38, 46]),
    "cut off": Case((64, 64), [4, 10, 30, 34], "10 left, 10 down", [0, 20, 20, 44]),
    "left above": Case((64, 64), [40, 50, 60, 62], "tile 0", [4, 4, 24, 16]),
    "right above": Case((64, 64), [2, 50, 22, 62], "tile 1", [30, 4, 50, 16]),
    "left below": Case((64, 64), [40, 4, 60, 30], "tile 2", [4, 22, 24, 48]),
    "right below": Case((64, 64), [2, 4, 22, 30], "tile 3", [30, 22, 50, 48]),
}


def laid_out(store: Store, change: str) -> Layout:
    if change.startswith("tile"):
        return as_tile(store, int(change[-1]))
    layout = letterbox(store, ALONE, SIDE)
    if change == "mirrored":
        return mirror(layout, np.array([True]), SIDE)
    if change == "10 left, 10 down":
        return moved(layout, -10, 10)
    if change == "half as large":
        return moved(layout, 0, 0, factor=0.5)
    assert not change
    return layout


@pytest.mark.parametrize("name", CASES)
def test_boxes_lie_where_they_are_expected_and_pixels_with_them(name):
    case = CASES[name]
    images = [lit(case.size, case.box, channel=0), np.zeros((64, 64, 3), np.uint8)]
    store = keep_boxed(images, SIDE, [[case.box], []])
    layout = laid_out(store, case.change)
    assert boxes_of(store, layout).tolist() == [case.expected]
    (picture,) = grey_levels(render(store, layout, SIDE))
    assert abs(extent(picture, 0) - case.expected).max() <= 0.5


def test_boxes_are_scaled_from_the_pixels_of_the_file():
    store = keep_boxed(noise([(200, 400)]), 128, [[[100, 60, 300, 120]]])  # stored as 64 x 128
    boxes = boxes_of(store, letterbox(store, ALONE, 128), 128)
    assert np.allclose(boxes, [[32, 32 + 19.2, 96, 32 + 38.4]])


def test_boxes_are_scaled_in_x_and_y_each():
    store = keep_boxed(noise([(10, 400)]), 128, [[[100, 1, 300, 9]]])  # stored as 3 x 128
    boxes = boxes_of(store, letterbox(store, ALONE, 128), 128)
    assert np.allclose(boxes, [[32, 62 + 0.3, 96, 62 + 2.7]])


# --- mirrored

SIZES = [(48, 48), (31, 47), (48, 17), (10, 13), (1, 48), (48, 1), (5, 30), (29, 20)]  # H, W


@pytest.mark.parametrize("kind", ["mosaic", "letterbox", "either"])
def test_mirrored_boxes_lie_as_far_from_the_other_side(kind):
    size = 48
    boxes = [[[0, 0, w, h], [0.3 * w, 0.2 * h, 0.9 * w, 0.7 * h]] for h, w in SIZES]
    store = keep_boxed(noise(SIZES), size, boxes)
    drawn = random_mosaics(16, len(SIZES), size, seed=2)
    single = letterbox(store, drawn.four[:, 0], size)
    layout = {
        "mosaic": zoomed_mosaic(store, drawn, size),
        "letterbox": single,
        "either": where(drawn.mirrored, mosaic(store, drawn.four, size, drawn.centre), single),
    }[kind]

    everyone = np.ones(16, bool)
    once = mirror(layout, everyone, size)
    twice = mirror(once, everyone, size)
    every = [render_boxes(objects_of(store), each, size) for each in (layout, once, twice)]
    for plain, mirrored, back in zip(*every, strict=True):
        left, top, right, bottom = mirrored.boxes_xyxy.T
        flipped = np.stack([size - right, top, size - left, bottom], 1)
        assert np.allclose(plain.boxes_xyxy, flipped, atol=1e-4)
        assert np.allclose(plain.boxes_xyxy, back.boxes_xyxy, atol=1e-4)
        assert (plain.labels == mirrored.labels).all()
        assert (plain.labels == back.labels).all()


# --- which boxes stay


def one_box(box: list[float], imgsz: int = 400) -> Store:
    return keep_boxed([np.zeros((400, 400, 3), np.uint8)], imgsz, [[box]])


@pytest.mark.parametrize(
    ("box", "stays"),
    [
        ([10, 10, 12.1, 60], True),
        ([10, 10, 12.0, 60], False),  # a side of 2 pixels
        ([10, 10, 60, 12.1], True),
        ([10, 10, 60, 11.9], False),
        ([10, 10, 13, 309], True),  # aspect 99.67
        ([10, 10, 13, 311], False),  # aspect 100.3
        ([10, 10, 311, 13], False),
    ],
)
def test_small_and_thin_boxes_are_left_out(box, stays):
    store = one_box(box)
    boxes = boxes_of(store, letterbox(store, ALONE, 400), 400)
    assert len(boxes) == stays
    if stays:
        assert np.allclose(boxes[0], box)


@pytest.mark.parametrize(("seen", "stays"), [(12, True), (8, False), (-8, False)])
def test_boxes_of_which_a_tenth_is_seen_stay(seen, stays):
    """Of 100 columns; the picture is moved to the right, out of view."""
    store = one_box([300, 100, 400, 200])
    to = np.array([[200.0 + 100 - seen, 200.0]])
    layout = zoom(letterbox(store, ALONE, 400), np.ones(1), 200.0, to)
    boxes = boxes_of(store, layout, 400)
    assert len(boxes) == stays
    if stays:
        assert np.allclose(boxes[0], [400 - seen, 100, 400, 200])


@pytest.mark.parametrize(("factor", "stays"), [(1.0, True), (0.51, True), (0.49, False)])
def test_sides_are_measured_in_the_rendered_picture(factor, stays):
    store = one_box([10, 10, 14, 30])  # 4 pixels wide
    middle = np.array([[200.0, 200.0]])
    layout = zoom(letterbox(store, ALONE, 400), np.array([factor]), 200.0, middle)
    assert len(boxes_of(store, layout, 400)) == stays


@pytest.mark.parametrize("tiles", [1, 4])
def test_difficult_objects_are_not_trained_on(tiles):
    boxes = [[5, 5, 20, 20], [30, 30, 60, 60], [8, 8, 40, 40]]  # sides 15, 30, 32
    store = keep_boxed(
        [np.zeros((64, 64, 3), np.uint8)], 64, [boxes], difficult=[[False, True, False]]
    )
    layout = letterbox(store, ALONE, 64)
    if tiles == 4:
        layout = mosaic(store, np.zeros((1, 4), int), 64, np.array([[64.0, 64.0]]))
    rendered = boxes_of(store, layout, 128)
    sides = rendered[:, 2] - rendered[:, 0]
    assert sorted(sides.tolist()) == [15] * tiles + [32] * tiles


# --- regions


def test_regions_lie_where_they_would_as_objects():
    """Through mosaic, zoom and flip; objects stay what they are without regions."""
    dataset = some_pictures(further=3)
    batches = []
    for some in ([False, True, False, True], [True, False, True, False]):
        dataset.difficult = [some] * len(dataset)
        for truth in (Boxes, BoxesAndRegions):
            dataset.truth = truth
            store = Store(dataset, SIDE, workers=1, storage="resident")
            loader = TrainLoader(store, 8, 20, Augment())
            batches.append([targets for _, targets in loader.epoch(0)])

    for plain, regions, plain_others, _ in zip(*batches, strict=True):
        assert "ignored_xyxy" not in plain
        for key in ("boxes_xyxy", "labels"):
            assert torch.equal(plain[key], regions[key])
        ignored = regions["ignored_xyxy"]
        assert ignored.shape[1] >= regions["labels"].shape[1]
        real = ignored[ignored.any(2)]
        assert len(real) > 20
        assert torch.equal(real, plain_others["boxes_xyxy"][plain_others["labels"] >= 0])


def test_regions_are_padded_to_the_length_of_the_objects_at_least():
    images = [np.zeros((64, 64, 3), np.uint8)]
    boxes = [[[4 * i, 4, 4 * i + 4, 40] for i in range(12)]]
    for count, lengths in {0: (16, 16), 3: (16, 16), 10: (8, 16)}.items():
        store = keep_boxed(images, 64, boxes, [[i < count for i in range(12)]])
        targets = BoxesAndRegions(store).rendered(letterbox(store, ALONE, 64))
        assert (targets["labels"].shape[1], targets["ignored_xyxy"].shape[1]) == lengths
        assert targets["ignored_xyxy"].any(2).sum() == count


# --- in a batch


@pytest.mark.parametrize(
    ("counts", "padded"),
    [([0, 0], 8), ([3, 8], 8), ([9, 1], 16), ([16], 16), ([17], 32), ([70], 128)],
)
def test_targets_are_padded_to_few_sizes(counts, padded):
    rng = np.random.default_rng(0)
    objects = [
        Rendered(rng.random((count, 4)).astype(np.float32), rng.integers(0, 20, count))
        for count in counts
    ]
    targets = pad(objects, torch.device("cpu"))
    boxes_xyxy = targets["boxes_xyxy"]
    labels = targets["labels"]
    assert boxes_xyxy.shape == (len(counts), padded, 4)
    assert boxes_xyxy.dtype == torch.float32
    assert labels.shape == (len(counts), padded)
    assert labels.dtype == torch.int64
    for n, count in enumerate(counts):
        assert np.array_equal(boxes_xyxy[n, :count], objects[n].boxes_xyxy)
        assert labels[n, :count].tolist() == objects[n].labels.tolist()
        assert (boxes_xyxy[n, count:] == 0).all()
        assert (labels[n, count:] == -1).all()


def test_the_targets_of_a_loader_lie_inside_the_images():
    store = Store(some_pictures(further=6), 64, workers=1, storage="resident")
    loader = TrainLoader(store, 8, 20, Augment())
    count = 0
    for epoch in range(12):
        for _, targets in loader.epoch(epoch):
            boxes_xyxy = targets["boxes_xyxy"][targets["labels"] >= 0]
            assert boxes_xyxy.min() >= 0
            assert boxes_xyxy.max() <= 64
            assert (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2] > 2).all()
            assert targets["labels"].max() < 23
            count += len(boxes_xyxy)
    assert count > 1000


def test_a_loader_names_the_image_that_each_target_was_drawn_for():
    store = Store(some_pictures(), 64, workers=1, storage="resident")
    plain = Augment(mosaic=0, translate=0, scale=0)
    for _, targets in TrainLoader(store, 8, 20, plain).epoch(0):
        labels = targets["labels"][:, 0].tolist()
        assert targets["ids"] == [f"picture {label}" for label in labels]
