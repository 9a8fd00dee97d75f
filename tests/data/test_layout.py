"""Layouts: numbers written down, and what becomes of them when they are rendered."""

import numpy as np
import pytest
import torch

from kdmini.data.layout import letterbox, mirror, mosaic, where, zoom
from kdmini.data.render import render
from tests.data.arrays import keep, noise, random_mosaics, zoomed_mosaic
from tests.data.test_render import SIZES

GREY_LEVEL = 1 / 255


def extents(layout, store):
    """Where each whole tile comes to lie: [left, top, right, bottom], (N, 4, 4)."""
    wh = store.sizes[layout.image][..., ::-1]
    ends = np.sort(np.stack([layout.b, layout.b + layout.a * wh]), 0)
    return np.concatenate(list(ends), -1)


# --- written down


@pytest.mark.parametrize(
    ("size", "extent"),  # height, width; left, top, right, bottom in a square of 64
    [
        ((64, 64), [0, 0, 64, 64]),
        ((32, 64), [0, 16, 64, 48]),
        ((16, 8), [16, 0, 48, 64]),
        ((64, 63), [0, 0, 63, 64]),  # an odd margin is on the right
    ],
)
def test_a_letterbox_is_centred_at_whole_pixels(size, extent):
    store = keep(noise([size]), 64)
    layout = letterbox(store, np.array([0]), 64)
    assert extents(layout, store)[0, 0].tolist() == extent
    assert layout.shown[0, 0].T.flatten().tolist() == extent
    assert not layout.tiled.any()


def test_the_tiles_of_a_mosaic_meet_at_its_centre():
    store = keep(noise([(32, 64), (64, 64), (64, 32), (16, 16)]), 64)
    layout = mosaic(store, np.array([[0, 1, 2, 3]]), 64, np.array([[50.0, 70.0]]))
    assert extents(layout, store)[0].tolist() == [
        [50 - 64, 70 - 32, 50, 70],  # left above
        [50, 70 - 64, 50 + 64, 70],  # right above
        [50 - 32, 70, 50, 70 + 64],  # left below
        [50, 70, 50 + 64, 70 + 64],  # right below
    ]
    assert layout.shown[0, 0].T.flatten().tolist() == [0, 38, 50, 70]  # cut off at the canvas


def test_a_zoom_keeps_one_point_and_moves_it():
    store = keep(noise([(64, 64)]), 64)
    layout = letterbox(store, np.array([0]), 64)
    halved = zoom(layout, np.array([0.5]), 32, np.array([[40.0, 20.0]]))
    assert extents(halved, store)[0, 0].tolist() == [40 - 16, 20 - 16, 40 + 16, 20 + 16]


def test_a_mirrored_tile_lies_as_far_from_the_other_side():
    store = keep(noise([(32, 64)]), 64)
    layout = zoom(letterbox(store, np.array([0]), 64), np.ones(1), 32, np.array([[42.0, 32.0]]))
    assert extents(layout, store)[0, 0].tolist() == [10, 16, 74, 48]
    mirrored = mirror(layout, np.array([True]), 64)
    assert extents(mirrored, store)[0, 0].tolist() == [-10, 16, 54, 48]


# --- rendered


def test_where_takes_each_image_from_one_of_the_two():
    store = keep(noise(SIZES), 48)
    one = letterbox(store, np.array([0, 1, 2]), 48)
    other = mosaic(store, np.array([[3, 4, 5, 6]] * 3), 48, np.full((3, 2), 48.0))
    rendered = render(store, where(np.array([True, False, True]), one, other), 48)
    first = render(store, one, 48)
    second = render(store, other, 48)
    assert torch.equal(rendered, torch.stack([first[0], second[1], first[2]]))


@pytest.fixture(scope="module")
def store():
    return keep(noise(SIZES), 48)


@pytest.fixture(params=["mosaic", "letterbox", "either"])
def layout(request, store):
    """Sixteen images."""
    drawn = random_mosaics(16, len(SIZES), 48, seed=2)
    single = letterbox(store, drawn.four[:, 0], 48)
    if request.param == "mosaic":
        return zoomed_mosaic(store, drawn, 48)
    if request.param == "letterbox":
        return single
    return where(drawn.mirrored, mosaic(store, drawn.four, 48, drawn.centre), single)


EVERYONE = np.ones(16, bool)


def test_a_mirrored_layout_is_rendered_flipped(store, layout):
    plain = render(store, layout, 48)
    once = render(store, mirror(layout, EVERYONE, 48), 48)
    assert (once - plain.flip(3)).abs().max() < GREY_LEVEL


def test_mirrored_twice_is_the_identity(store, layout):
    plain = render(store, layout, 48)
    twice = render(store, mirror(mirror(layout, EVERYONE, 48), EVERYONE, 48), 48)
    assert (twice - plain).abs().max() < GREY_LEVEL


def test_a_letterbox_mirrored_twice_is_the_same_to_the_bit(store):
    everyone = np.ones(len(SIZES), bool)
    layout = letterbox(store, np.arange(len(SIZES)), 48)
    twice = mirror(mirror(layout, everyone, 48), everyone, 48)
    assert torch.equal(render(store, twice, 48), render(store, layout, 48))


def test_what_is_not_named_is_not_mirrored(store, layout):
    plain = render(store, layout, 48)
    assert torch.equal(render(store, mirror(layout, ~EVERYONE, 48), 48), plain)
