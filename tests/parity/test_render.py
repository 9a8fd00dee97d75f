"""Rendering, against a picture worked out pixel by pixel in float64; boxes, against the pixels;
colour, colorsys.
"""

import colorsys
from typing import Any

import numpy as np
import pytest
import torch
from witness import witness

from kdmini.data.render import choose, letterbox, mirror, mosaic, recolour, render, zoom
from kdmini.detection.truth import render_boxes
from tests.data.test_render import (
    SIZES,
    colours,
    draws,
    expected_letterbox,
    expected_mosaic,
    extent,
    grey_levels,
    keep,
    lit,
    noise,
    sample,
)

pytestmark = pytest.mark.parity

PER_PIXEL = "every pixel in float64"


def compare(what: str, found: np.ndarray, expected: np.ndarray) -> None:
    """(S, S, 3) each, grey levels."""
    witness(f"Rendering: {what}, grey levels", PER_PIXEL, abs(found - expected).max(), 1.0)


def test_letterbox() -> None:
    for seed, size in enumerate((48, 56, 64)):  # the largest pictures as they are, and enlarged
        images = noise(SIZES, seed)
        store = keep(images, size)
        rendered = grey_levels(render(store, letterbox(store, np.arange(len(images)), size), size))
        for found, image in zip(rendered, images, strict=True):
            compare("letterbox", found, expected_letterbox(image, size))


def test_mosaic_zoom_and_mirror() -> None:
    size, images = 40, noise(SIZES, 7)
    store = keep(images, 48)  # no picture is reduced: the reference sees the same pixels
    four, centre, factor, to, mirrored = draws(60, len(images), size, seed=11)
    layout = mirror(zoom(mosaic(store, four, size, centre), factor, size, to), mirrored, size)
    for n, found in enumerate(grey_levels(render(store, layout, size))):
        chosen = [images[i] for i in four[n]]
        compare(
            "mosaic", found, expected_mosaic(chosen, size, centre[n], factor[n], to[n], mirrored[n])
        )
    assert 10 < mirrored.sum() < 50


def test_tiles_that_end_at_the_centre_of_a_pixel() -> None:
    size, images = 40, noise([(40, 10), (10, 40), (10, 40), (40, 10)], 9)
    store = keep(images, size)
    centre, factor, to = (
        np.array([[40.5, 30.5], [35.5, 45.5]]),
        np.ones(2),
        np.full((2, 2), size / 2),
    )
    four = np.array([[0, 1, 2, 3], [1, 0, 3, 2]])
    layout = zoom(mosaic(store, four, size, centre), factor, size, to)
    for n, found in enumerate(grey_levels(render(store, layout, size))):
        chosen = [images[i] for i in four[n]]
        compare("mosaic", found, expected_mosaic(chosen, size, centre[n], factor[n], to[n], False))


def test_zoomed_and_mirrored_letterbox() -> None:
    size, images = (
        32,
        noise([(32, 32), (20, 32), (32, 11)], 8),
    )  # no larger than the letterbox: its scale is one
    store = keep(images, size)
    four, _, factor, to, mirrored = draws(12, len(images), size, seed=12)
    layout = mirror(zoom(letterbox(store, four[:, 0], size), factor, size / 2, to), mirrored, size)
    for n, found in enumerate(grey_levels(render(store, layout, size))):
        image = images[four[n, 0]]
        height, width = image.shape[:2]
        expected = np.full((size, size, 3), 114.0)
        for row in range(size):
            for column in range(size):
                out_x = size - (column + 0.5) if mirrored[n] else column + 0.5
                x = (out_x - to[n, 0]) / factor[n] + size / 2 - (size - width) // 2
                y = (row + 0.5 - to[n, 1]) / factor[n] + size / 2 - (size - height) // 2
                if 0 <= x < width and 0 <= y < height:
                    expected[row, column] = sample(image, x, y)
        compare("letterbox", found, expected)


def scene(rng: Any, size: int, reduced: int) -> tuple[Any, list[list[int]]]:
    """Three pictures with a rectangle lit in a channel of its own, and one without -> store, boxes
    of the files.
    """
    images, boxes = [], []
    for channel in range(3):
        height, width = (int(side) for side in rng.integers(24, size + 1, 2))
        if reduced > 1:  # by a whole number, so that the edges lie between pixels before and after
            height, width = (size, width) if rng.random() < 0.5 else (height, size)
        x0, y0 = int(rng.integers(0, width - 6)), int(rng.integers(0, height - 6))
        x1, y1 = int(rng.integers(x0 + 6, width + 1)), int(rng.integers(y0 + 6, height + 1))
        boxes.append([reduced * c for c in (x0, y0, x1, y1)])
        images.append(lit((reduced * height, reduced * width), boxes[-1], channel))
    images.append(np.zeros((50, 64, 3), np.uint8))
    return keep(images, size, boxes=[[box] for box in boxes] + [[]]), boxes


@pytest.mark.parametrize("reduced, draws_wanted", [(1, 500), (4, 200)])
def test_boxes_lie_where_rectangles_are_lit(reduced: int, draws_wanted: int) -> None:
    # An edge is half lit on the edge itself: what is over half is off by half a pixel at most.
    size, each, rng = 64, 10, np.random.default_rng(20 + reduced)
    found_again = left_out = on_mosaics = 0
    for trial in range(draws_wanted // each):
        store, boxes = scene(rng, size, reduced)
        four = np.array([rng.permutation(4) for _ in range(each)])
        _, centre, factor, to, mirrored = draws(each, 4, size, seed=1000 * reduced + trial)
        four_tiles = rng.random(each) < 0.7
        layout = choose(
            four_tiles,
            zoom(mosaic(store, four, size, centre), factor, size, to),
            zoom(letterbox(store, four[:, 0], size), factor, size / 2, to),
        )
        layout = mirror(layout, mirrored, size)
        pictures = grey_levels(render(store, layout, size))
        for n, (rendered, labels) in enumerate(render_boxes(store, layout, size)):
            shown = set(four[n] if four_tiles[n] else four[n, :1]) - {3}
            assert set(labels) <= shown and len(set(labels)) == len(labels)
            for channel in shown:
                lit_box = extent(pictures[n], channel)
                if channel in labels:
                    assert lit_box is not None
                    (box,) = rendered[labels == channel]
                    witness(
                        "Rendering: boxes, pixels",
                        "lit rectangles",
                        abs(box - lit_box).max(),
                        0.501,
                    )
                    found_again += 1
                    on_mosaics += four_tiles[n]
                elif lit_box is not None:  # left out: thin, or less than a tenth
                    scale = abs(layout.a[n, list(four[n]).index(channel)])
                    sides, whole = (
                        lit_box[2:] - lit_box[:2],
                        np.subtract(boxes[channel][2:], boxes[channel][:2]),
                    )
                    assert (
                        sides.min() <= 3
                        or sides.prod() < 0.1 * (whole * scale / reduced + 2).prod()
                    )
                    left_out += 1
    assert found_again > draws_wanted and on_mosaics > draws_wanted / 2 and left_out > 0


def test_colour() -> None:
    rng, rgb = np.random.default_rng(14), colours(512)
    factors = 1 + np.array([0.5, 0.9, 0.8]) * rng.uniform(-1, 1, (12, 3))
    factors[0] = 1
    images = torch.from_numpy(rgb.T.reshape(3, 16, 32)).float().expand(12, 3, 16, 32)
    found = (
        torch.stack(recolour(images.unbind(1), torch.from_numpy(factors).float()), 1)
        .flatten(2)
        .mT.numpy()
    )  # (12, 512, 3)
    for n, (h, s, v) in enumerate(factors):
        expected = []
        for colour in rgb:
            hue, saturation, value = colorsys.rgb_to_hsv(*colour)
            expected.append(
                colorsys.hsv_to_rgb(hue * h % 1, min(saturation * s, 1), min(value * v, 1))
            )
        off = 255 * abs(found[n] - np.array(expected)).max()
        witness(
            "Rendering: hue, saturation and value, grey levels", "colorsys", off, 0.05, len(rgb)
        )
