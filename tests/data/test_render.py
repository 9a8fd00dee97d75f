"""Rendering, against a picture worked out pixel by pixel in double precision, and boxes, against
the pixels.
"""

import colorsys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from kdmini.data.loader import Augment, TrainLoader
from kdmini.data.render import PAD, choose, letterbox, mirror, mosaic, recolour, render, zoom
from kdmini.data.store import Store
from kdmini.detection.truth import render_boxes

GREY_LEVEL = 1 / 255
SIZES = [(48, 48), (31, 47), (48, 17), (10, 13), (1, 48), (48, 1), (5, 30), (29, 20)]  # H, W


class Pictures:
    """Arrays and their targets as a dataset."""

    names = ("zero", "one", "two", "three")

    def __init__(self, images, boxes=None, difficult=None):
        self.images = images
        self.boxes = boxes or [[] for _ in images]
        self.difficult = difficult or [[False] * len(b) for b in self.boxes]

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        boxes = np.array(self.boxes[index], np.float32).reshape(-1, 4)
        return self.images[index], {
            "boxes_xyxy": boxes,
            "labels": np.full(len(boxes), index, np.int64),
            "difficult": np.array(self.difficult[index], bool),
            "id": str(index),
        }


def noise(sizes, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (*size, 3), np.uint8) for size in sizes]


def keep(images, imgsz, **about):
    return Store(Pictures(images, **about), imgsz, storage="resident", workers=1)


def sample(image, x, y):
    """The colour at a continuous place, between the four nearest centres of pixels; the border goes
    on outside.
    """
    height, width = image.shape[:2]
    x, y = min(max(x - 0.5, 0), width - 1), min(max(y - 0.5, 0), height - 1)
    left, top = int(x), int(y)
    right, bottom = min(left + 1, width - 1), min(top + 1, height - 1)
    fx, fy = x - left, y - top
    above = (1 - fx) * image[top, left].astype(float) + fx * image[top, right]
    below = (1 - fx) * image[bottom, left].astype(float) + fx * image[bottom, right]
    return (1 - fy) * above + fy * below


def expected_letterbox(image, size):
    """-> (S, S, 3) grey levels."""
    height, width = image.shape[:2]
    placed_w, placed_h = (
        max(round(side * size / max(height, width)), 1) for side in (width, height)
    )
    left, top = (size - placed_w) // 2, (size - placed_h) // 2
    out = np.full((size, size, 3), 114.0)
    for row in range(top, top + placed_h):
        for column in range(left, left + placed_w):
            x, y = (column + 0.5 - left) * width / placed_w, (row + 0.5 - top) * height / placed_h
            out[row, column] = sample(image, x, y)
    return out


def expected_mosaic(four, size, centre, factor, to, mirrored):
    """Four pictures meet at `centre` of a canvas (2S, 2S), whose middle is shown at `to` -> (S, S,
    3) grey levels.
    """
    out = np.full((size, size, 3), 114.0)
    for row in range(size):
        for column in range(size):
            x = size - (column + 0.5) if mirrored else column + 0.5
            canvas_x, canvas_y = (x - to[0]) / factor + size, (row + 0.5 - to[1]) / factor + size
            in_right, in_lower = canvas_x >= centre[0], canvas_y >= centre[1]
            image = four[2 * in_lower + in_right]
            height, width = image.shape[:2]
            ratio = size / max(height, width)
            left = centre[0] if in_right else centre[0] - width * ratio
            top = centre[1] if in_lower else centre[1] - height * ratio
            x, y = (canvas_x - left) / ratio, (canvas_y - top) / ratio
            on_canvas = 0 <= canvas_x < 2 * size and 0 <= canvas_y < 2 * size
            if on_canvas and 0 <= x < width and 0 <= y < height:
                out[row, column] = sample(image, x, y)
    return out


def grey_levels(images):
    """(N, 3, S, S) 0..1 -> (N, S, S, 3) 0..255"""
    return images.permute(0, 2, 3, 1).numpy() * 255.0


def test_letterbox_equals_the_reference_pixel_by_pixel():
    images = noise(SIZES)
    store = keep(images, 48)
    rendered = render(store, letterbox(store, np.arange(len(images)), 48), 48)
    assert rendered.shape == (len(images), 3, 48, 48) and rendered.dtype == torch.float32
    for found, image in zip(grey_levels(rendered), images, strict=True):
        assert abs(found - expected_letterbox(image, 48)).max() < 1


def test_letterbox_equals_torch_interpolate():
    (image,) = noise([(24, 32)])
    store = keep([image], 64)
    rendered = render(store, letterbox(store, np.array([0]), 64), 64)
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
    enlarged = interpolate(pixels, size=(48, 64), mode="bilinear", align_corners=False)
    assert (rendered[:, :, 8:56] - enlarged).abs().max() < 1e-5
    assert (rendered[:, :, :8] == PAD / 255).all() and (rendered[:, :, 56:] == PAD / 255).all()


def test_a_picture_of_the_right_size_is_rendered_exactly():
    (image,) = noise([(64, 64)])
    store = keep([image], 64)
    rendered = render(store, letterbox(store, np.array([0]), 64), 64)
    assert torch.equal(rendered[0], torch.from_numpy(image).permute(2, 0, 1).float() / 255)


def draws(count, tiles, size, seed):
    """Random mosaics with their zoom, some shifted far enough to show the end of the canvas."""
    rng = np.random.default_rng(seed)
    four = rng.integers(0, tiles, (count, 4))
    centre = size * rng.uniform(0.5, 1.5, (count, 2))
    factor = rng.uniform(0.3, 1.7, count)
    to = size * rng.uniform(0.1, 0.9, (count, 2))
    return four, centre, factor, to, rng.random(count) < 0.5


def test_mosaic_zoom_and_mirror_equal_the_reference_pixel_by_pixel():
    images, size = noise(SIZES), 40
    store = keep(images, 48)  # no picture is reduced: the reference sees the same pixels
    four, centre, factor, to, mirrored = draws(24, len(images), size, seed=1)
    layout = mirror(zoom(mosaic(store, four, size, centre), factor, size, to), mirrored, size)
    rendered = grey_levels(render(store, layout, size))
    for n, found in enumerate(rendered):
        chosen = [images[i] for i in four[n]]
        expected = expected_mosaic(chosen, size, centre[n], factor[n], to[n], mirrored[n])
        assert abs(found - expected).max() < 1, n
    assert (rendered[~mirrored] == PAD).any() and mirrored.any()


def test_zoomed_letterbox_equals_the_reference_pixel_by_pixel():
    images, size = noise([(32, 32), (20, 32)]), 32
    store = keep(images, size)
    to, factor = np.array([[13.0, 19.5], [20.25, 12.0]]), np.array([1.4, 0.6])
    layout = zoom(letterbox(store, np.arange(2), size), factor, size / 2, to)
    for n, found in enumerate(grey_levels(render(store, layout, size))):
        height, width = images[n].shape[:2]  # no larger than the letterbox: its scale is one
        left, top = (size - width) / 2, (size - height) / 2
        for row in range(size):
            for column in range(size):
                x = (column + 0.5 - to[n, 0]) / factor[n] + 16 - left
                y = (row + 0.5 - to[n, 1]) / factor[n] + 16 - top
                inside = 0 <= x < width and 0 <= y < height
                expected = sample(images[n], x, y) if inside else 114
                assert abs(found[row, column] - expected).max() < 1


def test_mirrored_is_flipped_and_mirrored_twice_is_the_identity():
    images, size = noise(SIZES), 48
    boxes = [[[0, 0, w, h], [0.3 * w, 0.2 * h, 0.9 * w, 0.7 * h]] for h, w in SIZES]
    store = keep(images, size, boxes=boxes)
    four, centre, factor, to, which = draws(16, len(images), size, seed=2)
    everyone = np.ones(16, bool)
    for layout in (
        zoom(mosaic(store, four, size, centre), factor, size, to),
        letterbox(store, four[:, 0], size),
        choose(which, mosaic(store, four, size, centre), letterbox(store, four[:, 0], size)),
    ):
        once = mirror(layout, everyone, size)
        twice = mirror(once, everyone, size)
        plain = render(store, layout, size)
        assert (render(store, once, size) - plain.flip(3)).abs().max() < GREY_LEVEL
        assert (render(store, twice, size) - plain).abs().max() < GREY_LEVEL
        assert torch.equal(render(store, mirror(layout, ~everyone, size), size), plain)
        for (b0, l0), (b1, l1), (b2, l2) in zip(
            *(render_boxes(store, x, size) for x in (layout, once, twice)), strict=True
        ):
            assert np.allclose(b0, b2, atol=1e-4) and (l0 == l1).all() and (l0 == l2).all()
            flipped = np.stack([size - b1[:, 2], b1[:, 1], size - b1[:, 0], b1[:, 3]], 1)
            assert np.allclose(b0, flipped, atol=1e-4)
    store_layout = letterbox(store, np.arange(len(images)), size)
    exact = mirror(mirror(store_layout, everyone[:8], size), everyone[:8], size)
    assert torch.equal(render(store, exact, size), render(store, store_layout, size))


def lit(size, box, channel):
    """A dark picture with a rectangle lit in one channel."""
    image = np.zeros((*size, 3), np.uint8)
    x0, y0, x1, y1 = box
    image[y0:y1, x0:x1, channel] = 255
    return image


def extent(picture, channel):
    """The corners of what is lit in one channel: pixels over half, (S, S, 3) -> xyxy or None. Grey
    is not lit.
    """
    others = [c for c in range(3) if c != channel]
    over = picture[..., channel] - picture[..., others].max(-1) > 127.5
    rows, columns = np.flatnonzero(over.any(1)), np.flatnonzero(over.any(0))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]) if len(rows) else None


def test_boxes_lie_where_the_pixels_are():
    # Bilinear interpolation of an edge is half lit exactly on the edge, so that a box found from
    # the pixels over half is at most half a pixel off; of pictures that were reduced, a little
    # more.
    size, rng = 64, np.random.default_rng(5)
    shapes = [
        ((64, 64), 1),
        ((40, 64), 1),
        ((64, 21), 1),
        ((30, 22), 1),
        ((192, 256), 4),
        ((320, 150), 5),
    ]
    clipped = mirrored_seen = dropped = tiles_seen = 0
    for trial in range(60):
        chosen = [shapes[i] for i in rng.integers(0, len(shapes), 3)]
        boxes = []
        for (height, width), reduced in chosen:
            x0 = rng.integers(0, width // reduced - 4) * reduced
            y0 = rng.integers(0, height // reduced - 4) * reduced
            x1 = rng.integers(x0 // reduced + 4, width // reduced + 1) * reduced
            y1 = rng.integers(y0 // reduced + 4, height // reduced + 1) * reduced
            boxes.append([x0, y0, x1, y1])
        images = [
            lit(shape, box, c)
            for c, ((shape, _), box) in enumerate(zip(chosen, boxes, strict=True))
        ]
        images.append(np.zeros((50, 64, 3), np.uint8))  # a picture without objects
        store = keep(images, size, boxes=[[box] for box in boxes] + [[]])

        count = 8
        four = np.array([rng.permutation(4) for _ in range(count)])
        _, centre, factor, to, mirrored = draws(count, 4, size, seed=trial)
        layout = choose(
            rng.random(count) < 0.7,
            zoom(mosaic(store, four, size, centre), factor, size, to),
            zoom(letterbox(store, four[:, 0], size), factor, size / 2, to),
        )
        layout = mirror(layout, mirrored, size)
        pictures = grey_levels(render(store, layout, size))
        for n, (found_boxes, labels) in enumerate(render_boxes(store, layout, size)):
            single = not np.isfinite(layout.centre[n, 0])
            assert len(set(labels)) == len(labels)
            for channel in set(four[n, :1] if single else four[n]) - {3}:
                seen = extent(pictures[n], channel)
                scale = abs(layout.a[n, list(four[n]).index(channel)])  # (2,)
                slack = np.tile(0.5 + 0.25 * scale * (chosen[channel][1] > 1), 2) + 1e-3
                height, width = chosen[channel][0]
                whole = (np.array(boxes[channel][2:]) - boxes[channel][:2]) / np.array(
                    [width, height]
                )
                whole = whole * scale * store.sizes[channel][::-1]  # (2,) sides in rendered pixels
                if channel in labels:
                    box = found_boxes[labels == channel][0]
                    assert seen is not None and (abs(box - seen) <= slack).all(), (
                        trial,
                        n,
                        channel,
                        box,
                        seen,
                    )
                    clipped += (box[2:] - box[:2] < whole - 1).any()
                    mirrored_seen += mirrored[n]
                    tiles_seen += not single
                elif seen is not None:
                    sides = seen[2:] - seen[:2]
                    on_canvas = whole.clip(max=2 * size * factor[n])
                    small = sides.min() <= 3 or sides.prod() < 0.1 * (on_canvas + 2).prod()
                    assert small, (trial, n, channel, seen)
                    dropped += 1
    assert min(clipped, mirrored_seen, tiles_seen) > 100 and dropped > 10


def one_box(box, size=(400, 400), imgsz=400, **about):
    return keep([np.zeros((*size, 3), np.uint8)], imgsz, boxes=[[box]], **about)


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
    ((boxes, labels),) = render_boxes(store, letterbox(store, np.array([0]), 400), 400)
    assert boxes.dtype == np.float32 and len(boxes) == len(labels) == stays
    if stays:
        assert np.allclose(boxes[0], box)


@pytest.mark.parametrize(("shown", "stays"), [(12, True), (8, False), (-8, False)])
def test_boxes_of_which_a_tenth_is_left_stay(shown, stays):
    store = one_box([300, 100, 400, 200])
    layout = letterbox(store, np.array([0]), 400)
    shift = zoom(
        layout, np.ones(1), 200.0, np.array([[200.0 + 100 - shown, 200.0]])
    )  # to the right, out of view
    ((boxes, _),) = render_boxes(store, shift, 400)
    assert len(boxes) == stays
    if stays:
        assert np.allclose(boxes[0], [400 - shown, 100, 400, 200])


def test_the_size_rule_is_measured_in_the_rendered_picture():
    store = one_box([10, 10, 14, 30], size=(400, 400))  # 4 px
    for factor, stays in ((1.0, True), (0.51, True), (0.49, False)):
        layout = zoom(
            letterbox(store, np.array([0]), 400),
            np.array([factor]),
            200.0,
            np.array([[200.0, 200.0]]),
        )
        ((boxes, _),) = render_boxes(store, layout, 400)
        assert len(boxes) == stays


def test_boxes_are_scaled_from_the_pixels_of_the_file():
    store = one_box([100, 60, 300, 120], size=(200, 400), imgsz=128)  # stored as 64 x 128
    ((boxes, _),) = render_boxes(store, letterbox(store, np.array([0]), 128), 128)
    assert np.allclose(boxes, [[32, 32 + 19.2, 96, 32 + 38.4]])
    store = one_box(
        [100, 1, 300, 9], size=(10, 400), imgsz=128
    )  # stored as 3 x 128: not the same in x and y
    ((boxes, _),) = render_boxes(store, letterbox(store, np.array([0]), 128), 128)
    assert np.allclose(boxes, [[32, 62 + 0.3, 96, 62 + 2.7]])


def test_difficult_objects_are_not_trained_on():
    boxes = [[5, 5, 20, 20], [30, 30, 60, 60], [8, 8, 40, 40]]
    store = keep(
        [np.zeros((64, 64, 3), np.uint8)], 64, boxes=[boxes], difficult=[[False, True, False]]
    )
    for layout in (
        letterbox(store, np.array([0]), 64),
        mosaic(store, np.zeros((1, 4), int), 64, np.array([[64.0, 64.0]])),
    ):
        ((found, _),) = render_boxes(store, layout, 128)
        per_tile = len(found) / (1 if np.isinf(layout.centre[0, 0]) else 4)
        assert per_tile == 2 and not (np.isclose(found[:, 2] - found[:, 0], 30)).any()


def test_no_mosaic_in_the_last_epochs():
    store_of = Pictures(noise([(20, 20)] * 8))
    loader = TrainLoader(
        Store(store_of, 32, workers=1, storage="resident"),
        4,
        epochs=10,
        augment=Augment(close_mosaic=3),
    )
    for epoch in range(10):
        layout = loader.draw(epoch, np.arange(8))
        assert np.isfinite(layout.centre).all() == (epoch < 7)
        assert np.isinf(layout.centre).all() == (epoch >= 7)


def test_choose_takes_each_image_from_one_of_the_two():
    store = keep(noise(SIZES), 48)
    one = letterbox(store, np.array([0, 1, 2]), 48)
    other = mosaic(store, np.array([[3, 4, 5, 6]] * 3), 48, np.full((3, 2), 48.0))
    rendered = render(store, choose(np.array([True, False, True]), one, other), 48)
    first, second = render(store, one, 48), render(store, other, 48)
    assert torch.equal(rendered, torch.stack([first[0], second[1], first[2]]))


def colours(count):
    rng = np.random.default_rng(3)
    chosen = rng.random((count, 3))
    chosen[:40] = rng.random((40, 1))  # greys
    chosen[40:46] = np.eye(3).repeat(2, 0)  # pure, and mixed from two:
    chosen[46:49] = 1 - np.eye(3)
    chosen[49], chosen[50] = 0, 1  # black and white
    chosen[51:90] = rng.integers(0, 3, (39, 3)) / 2  # two channels alike
    return chosen


def test_recolour_equals_colorsys():
    rng = np.random.default_rng(4)
    rgb = colours(512)
    factors = 1 + np.array([0.5, 0.9, 0.8]) * rng.uniform(-1, 1, (8, 3))
    factors[0] = 1
    images = torch.from_numpy(rgb.T.reshape(3, 16, 32)).float()
    found = torch.stack(
        recolour(images.expand(8, 3, 16, 32).unbind(1), torch.from_numpy(factors).float()), 1
    )
    assert found.shape == (8, 3, 16, 32)
    for n, (h, s, v) in enumerate(factors):
        for colour, out in zip(rgb, found[n].reshape(3, -1).T.numpy(), strict=True):
            hue, saturation, value = colorsys.rgb_to_hsv(*colour)
            expected = colorsys.hsv_to_rgb(hue * h % 1, min(saturation * s, 1), min(value * v, 1))
            assert abs(out - expected).max() < 2e-4, (colour, factors[n])
    assert (found[0] - images).abs().max() < 1e-5


def test_render_recolours_each_image_with_its_own_factors():
    images = noise([(32, 32)] * 2)
    store = keep(images, 32)
    plain = letterbox(store, np.arange(2), 32)
    factors = np.array([[1.1, 0.5, 0.7], [0.9, 1.5, 1.3]])
    before = render(store, plain, 32)
    after = render(store, replace(plain, colour=factors), 32)
    for n in range(2):
        alone = torch.stack(
            recolour(before[n : n + 1].unbind(1), torch.from_numpy(factors[n : n + 1]).float()), 1
        )
        assert torch.equal(after[n], alone[0]) and not torch.equal(after[n], before[n])
