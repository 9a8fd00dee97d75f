"""Boxes in random mosaics and letterboxes, against the pixels that are lit."""

from typing import NamedTuple

import numpy as np
import pytest

from kdmini.data.layout import Layout, mirror, where
from kdmini.data.render import render
from kdmini.data.store import Store
from kdmini.detection.truth import Rendered, objects_of, render_boxes
from tests.data.arrays import Mosaics, Size, random_mosaics, zoomed_letterbox, zoomed_mosaic
from tests.data.pixel_by_pixel import grey_levels
from tests.detection.boxed import keep_boxed
from tests.detection.lit import extent, lit

SIDE = 64  # of the rendered pictures
COUNT = 8  # of them in a scene


class Drawn(NamedTuple):
    """A random picture with one box."""

    size: Size
    reduced: int  # times, by a whole number: edges lie between pixels before and after
    box: list[int]


class Scene(NamedTuple):
    """Eight pictures rendered from three that have a box each, and one that has none.

    Each box is lit in a channel of its own.
    """

    drawn: list[Drawn]
    store: Store
    mosaics: Mosaics
    tiled: np.ndarray  # (8,) bool; the others are letterboxes
    layout: Layout
    pictures: np.ndarray  # (8, S, S, 3) grey levels
    objects: list[Rendered]


SHAPES = [  # size, how often it is reduced
    ((64, 64), 1),
    ((40, 64), 1),
    ((64, 21), 1),
    ((30, 22), 1),
    ((192, 256), 4),
    ((320, 150), 5),
]
EMPTY = 3  # the number of the picture without a box


def random_picture(rng: np.random.Generator) -> Drawn:
    size, reduced = SHAPES[rng.integers(len(SHAPES))]
    height, width = np.array(size) // reduced
    left = rng.integers(0, width - 4)
    top = rng.integers(0, height - 4)
    right = rng.integers(left + 4, width + 1)
    bottom = rng.integers(top + 4, height + 1)
    box = [int(corner) * reduced for corner in (left, top, right, bottom)]
    return Drawn(size, reduced, box)


def random_scene(seed: int) -> Scene:
    rng = np.random.default_rng(seed)
    drawn = [random_picture(rng) for _ in range(3)]
    images = [lit(one.size, one.box, channel) for channel, one in enumerate(drawn)]
    images.append(np.zeros((50, 64, 3), np.uint8))
    store = keep_boxed(images, SIDE, [*([one.box] for one in drawn), []])

    mosaics = random_mosaics(COUNT, 4, SIDE, seed)
    mosaics = mosaics._replace(four=np.array([rng.permutation(4) for _ in range(COUNT)]))
    tiled = rng.random(COUNT) < 0.7
    layout = where(
        tiled, zoomed_mosaic(store, mosaics, SIDE), zoomed_letterbox(store, mosaics, SIDE)
    )
    layout = mirror(layout, mosaics.mirrored, SIDE)
    pictures = grey_levels(render(store, layout, SIDE))
    objects = render_boxes(objects_of(store), layout, SIDE)
    return Scene(drawn, store, mosaics, tiled, layout, pictures, objects)


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [random_scene(seed) for seed in range(60)]


class Comparison(NamedTuple):
    """What became of one box in one rendered picture."""

    name: str
    box: np.ndarray | None  # as render_boxes has it
    lit: np.ndarray | None  # as the pixels have it
    whole: np.ndarray  # (2,) sides of the whole box, rendered pixels
    canvas: float  # side of the canvas, rendered pixels
    slack: np.ndarray  # (4,) by which corners may differ
    mirrored: bool
    tiled: bool


def comparison(scene: Scene, n: int, channel: int) -> Comparison:
    drawn = scene.drawn[channel]
    four = list(scene.mosaics.four[n])
    scale = abs(scene.layout.a[n, four.index(channel)])  # (2,) from stored to rendered pixels
    sides = np.subtract(drawn.box[2:], drawn.box[:2]) / drawn.size[::-1]  # shares of the picture
    slack = 0.5 + 0.25 * scale * (drawn.reduced > 1)

    boxes_xyxy, labels = scene.objects[n]
    (match,) = np.nonzero(labels == channel)
    return Comparison(
        name=f"picture {n}, channel {channel} of {drawn}",
        box=boxes_xyxy[match[0]] if len(match) else None,
        lit=extent(scene.pictures[n], channel),
        whole=sides * scene.store.sizes[channel][::-1] * scale,
        canvas=2 * SIDE * scene.mosaics.factor[n],
        slack=np.tile(slack, 2) + 1e-3,
        mirrored=scene.mosaics.mirrored[n],
        tiled=scene.tiled[n],
    )


@pytest.fixture(scope="module")
def comparisons(scenes) -> list[Comparison]:
    every = []
    for scene in scenes:
        for n in range(COUNT):
            four = scene.mosaics.four[n]
            shown = four if scene.tiled[n] else four[:1]
            every += [comparison(scene, n, channel) for channel in shown if channel != EMPTY]
    return every


def test_boxes_lie_where_the_pixels_are(comparisons):
    kept = [one for one in comparisons if one.box is not None]
    for one in kept:
        assert one.lit is not None, one.name
        assert (abs(one.box - one.lit) <= one.slack).all(), (one.name, one.box, one.lit)

    # so that the comparison compares something
    clipped = [one for one in kept if (one.box[2:] - one.box[:2] < one.whole - 1).any()]
    assert len(clipped) > 100
    assert sum(one.mirrored for one in kept) > 100
    assert sum(one.tiled for one in kept) > 100


def test_boxes_that_are_left_out_are_thin_or_hardly_seen(comparisons):
    left_out = [one for one in comparisons if one.box is None and one.lit is not None]
    for one in left_out:
        sides = one.lit[2:] - one.lit[:2]
        on_canvas = one.whole.clip(max=one.canvas)
        hardly_seen = sides.prod() < 0.1 * (on_canvas + 2).prod()
        assert sides.min() <= 3 or hardly_seen, (one.name, one.lit)
    assert len(left_out) > 10


def test_only_what_is_shown_has_boxes_and_once(scenes):
    for scene in scenes:
        for n, rendered in enumerate(scene.objects):
            labels = rendered.labels.tolist()
            four = scene.mosaics.four[n]
            assert set(labels) <= set(four if scene.tiled[n] else four[:1]) - {EMPTY}
            assert len(set(labels)) == len(labels)
