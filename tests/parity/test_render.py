"""Rendering, against a picture worked out pixel by pixel in float64; boxes, against the
pixels; colour, against colorsys.
"""

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from witness import witness

from kdmini.data.layout import letterbox, mirror, where
from kdmini.data.render import render
from kdmini.detection.truth import objects_of, render_boxes
from tests.data.arrays import (
    Mosaics,
    keep,
    noise,
    random_mosaics,
    zoomed_letterbox,
    zoomed_mosaic,
)
from tests.data.pixel_by_pixel import (
    expected_letterbox,
    expected_mosaic,
    expected_zoom,
    grey_levels,
)
from tests.data.test_render import SIZES, by_colorsys, colours, recoloured
from tests.detection.boxed import keep_boxed
from tests.detection.lit import extent, lit

pytestmark = pytest.mark.parity

PER_PIXEL = "every pixel in float64"


def compare(what: str, found: np.ndarray, expected: np.ndarray) -> None:
    """(S, S, 3) each, grey levels."""
    difference = abs(found - expected).max()
    witness(f"Rendering: {what}, grey levels", PER_PIXEL, difference, 1.0)


def test_letterbox() -> None:
    for seed, size in enumerate((48, 56, 64)):  # the largest pictures as they are, and enlarged
        images = noise(SIZES, seed)
        store = keep(images, size)
        layout = letterbox(store, np.arange(len(images)), size)
        rendered = grey_levels(render(store, layout, size))
        for found, image in zip(rendered, images, strict=True):
            compare("letterbox", found, expected_letterbox(image, size))


def compare_mosaics(images: list[np.ndarray], imgsz: int, drawn: Mosaics, size: int) -> None:
    """imgsz: of the store; it reduces no picture, so the reference sees the same pixels."""
    store = keep(images, imgsz)
    layout = mirror(zoomed_mosaic(store, drawn, size), drawn.mirrored, size)
    for n, found in enumerate(grey_levels(render(store, layout, size))):
        tiles = [images[i] for i in drawn.four[n]]
        centre = drawn.centre[n]
        factor = drawn.factor[n]
        expected = expected_mosaic(tiles, size, centre, factor, drawn.to[n], drawn.mirrored[n])
        compare("mosaic", found, expected)


def test_mosaic_zoom_and_mirror() -> None:
    drawn = random_mosaics(60, len(SIZES), 40, seed=11)
    compare_mosaics(noise(SIZES, 7), 48, drawn, 40)
    assert 10 < drawn.mirrored.sum() < 50


def test_tiles_that_end_at_the_centre_of_a_pixel() -> None:
    drawn = Mosaics(
        four=np.array([[0, 1, 2, 3], [1, 0, 3, 2]]),
        centre=np.array([[40.5, 30.5], [35.5, 45.5]]),
        factor=np.ones(2),
        to=np.full((2, 2), 20.0),
        mirrored=np.zeros(2, bool),
    )
    compare_mosaics(noise([(40, 10), (10, 40), (10, 40), (40, 10)], 9), 40, drawn, 40)


def test_zoomed_and_mirrored_letterbox() -> None:
    size = 32
    # no larger than the letterbox: its scale is one
    images = noise([(32, 32), (20, 32), (32, 11)], 8)
    store = keep(images, size)
    drawn = random_mosaics(12, len(images), size, seed=12)
    layout = mirror(zoomed_letterbox(store, drawn, size), drawn.mirrored, size)
    for n, found in enumerate(grey_levels(render(store, layout, size))):
        image = images[drawn.four[n, 0]]
        expected = expected_zoom(image, size, drawn.factor[n], drawn.to[n], drawn.mirrored[n])
        compare("letterbox", found, expected)


# --- boxes

SIDE = 64  # of the rendered pictures
EMPTY = 3  # the number of the picture without a box


def random_box(rng: Any, reduced: int) -> tuple[tuple[int, int], list[int]]:
    """-> height and width of a picture that a store reduces so many times, and a box in it.

    By a whole number, so that the edges lie between pixels before and after.
    """
    height, width = (int(side) for side in rng.integers(24, SIDE + 1, 2))
    if reduced > 1:
        height, width = (SIDE, width) if rng.random() < 0.5 else (height, SIDE)
    left = int(rng.integers(0, width - 6))
    top = int(rng.integers(0, height - 6))
    right = int(rng.integers(left + 6, width + 1))
    bottom = int(rng.integers(top + 6, height + 1))
    box = [reduced * corner for corner in (left, top, right, bottom)]
    return (reduced * height, reduced * width), box


def compare_boxes(reduced: int, count: int, seed: int, rng: Any) -> Counter:
    """Renders three pictures, with a box lit in a channel each, and one without, `count`
    times: every box lies where its channel is lit.

    An edge is half lit on the edge itself: what is over half is off by half a pixel at most.
    -> how many were found, and on mosaics, and how many were left out, and rightly.
    """
    pictures = [random_box(rng, reduced) for _ in range(3)]
    images = [lit(size, box, channel) for channel, (size, box) in enumerate(pictures)]
    images.append(np.zeros((50, 64, 3), np.uint8))
    store = keep_boxed(images, SIDE, [*([box] for _, box in pictures), []])

    drawn = random_mosaics(count, 4, SIDE, seed)
    drawn = drawn._replace(four=np.array([rng.permutation(4) for _ in range(count)]))
    tiled = rng.random(count) < 0.7
    mosaics = zoomed_mosaic(store, drawn, SIDE)
    letterboxes = zoomed_letterbox(store, drawn, SIDE)
    layout = mirror(where(tiled, mosaics, letterboxes), drawn.mirrored, SIDE)
    rendered = grey_levels(render(store, layout, SIDE))

    counts: Counter = Counter()
    for n, (boxes, labels) in enumerate(render_boxes(objects_of(store), layout, SIDE)):
        four = list(drawn.four[n])
        channels = set(four if tiled[n] else four[:1]) - {EMPTY}
        assert set(labels) <= channels
        assert len(set(labels)) == len(labels)
        for channel in channels:
            lit_box = extent(rendered[n], channel)
            if channel in labels:
                assert lit_box is not None
                (box,) = boxes[labels == channel]
                difference = abs(box - lit_box).max()
                witness("Rendering: boxes, pixels", "lit rectangles", difference, 0.501)
                counts["found"] += 1
                counts["on mosaics"] += int(tiled[n])
            elif lit_box is not None:  # left out: thin, or less than a tenth
                _, box = pictures[channel]
                scale = abs(layout.a[n, four.index(channel)])
                whole = np.subtract(box[2:], box[:2]) * scale / reduced
                sides = lit_box[2:] - lit_box[:2]
                assert sides.min() <= 3 or sides.prod() < 0.1 * (whole + 2).prod()
                counts["left out"] += 1
    return counts


@pytest.mark.parametrize("reduced, wanted", [(1, 500), (4, 200)])
def test_boxes_lie_where_rectangles_are_lit(reduced: int, wanted: int) -> None:
    rng = np.random.default_rng(20 + reduced)
    counts: Counter = Counter()
    for trial in range(wanted // 10):
        counts += compare_boxes(reduced, 10, 1000 * reduced + trial, rng)
    assert counts["found"] > wanted
    assert counts["on mosaics"] > wanted / 2
    assert counts["left out"] > 0


# --- colour


def test_colour() -> None:
    rgb = colours(512)
    images = torch.from_numpy(rgb.T.reshape(3, 16, 32)).float().expand(12, 3, 16, 32)
    rng = np.random.default_rng(14)
    factors = 1 + np.array([0.5, 0.9, 0.8]) * rng.uniform(-1, 1, (12, 3))
    factors[0] = 1
    found = recoloured(images, factors).flatten(2).mT.numpy()  # (12, 512, 3)
    for n in range(12):
        expected = np.array([by_colorsys(colour, factors[n]) for colour in rgb])
        difference = 255 * abs(found[n] - expected).max()
        what = "Rendering: hue, saturation and value, grey levels"
        witness(what, "colorsys", difference, 0.05, len(rgb))
