"""Rendering, against a picture worked out pixel by pixel in double precision."""

import colorsys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from kdmini.data.layout import letterbox, mirror, zoom
from kdmini.data.render import PAD, recolour, render
from tests.data.arrays import keep, noise, random_mosaics, zoomed_mosaic
from tests.data.pixel_by_pixel import (
    expected_letterbox,
    expected_mosaic,
    expected_zoom,
    grey_levels,
)

# H, W
SIZES = [(48, 48), (31, 47), (48, 17), (10, 13), (1, 48), (48, 1), (5, 30), (29, 20)]


# --- the letterbox


def test_a_picture_of_the_right_size_is_rendered_exactly():
    (image,) = noise([(64, 64)])
    store = keep([image], 64)
    rendered = render(store, letterbox(store, np.array([0]), 64), 64)
    assert torch.equal(rendered[0], torch.from_numpy(image).permute(2, 0, 1).float() / 255)


def test_letterbox_equals_torch_interpolate():
    (image,) = noise([(24, 32)])
    store = keep([image], 64)
    rendered = render(store, letterbox(store, np.array([0]), 64), 64)
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
    enlarged = interpolate(pixels, size=(48, 64), mode="bilinear", align_corners=False)
    assert (rendered[:, :, 8:56] - enlarged).abs().max() < 1e-5
    assert (rendered[:, :, :8] == PAD / 255).all()
    assert (rendered[:, :, 56:] == PAD / 255).all()


def test_letterbox_equals_the_reference_pixel_by_pixel():
    images = noise(SIZES)
    store = keep(images, 48)
    rendered = render(store, letterbox(store, np.arange(len(images)), 48), 48)
    assert rendered.shape == (len(images), 3, 48, 48)
    assert rendered.dtype == torch.float32
    for picture, image in zip(grey_levels(rendered), images, strict=True):
        assert abs(picture - expected_letterbox(image, 48)).max() < 1


def test_zoomed_letterbox_equals_the_reference_pixel_by_pixel():
    size = 32
    images = noise([(32, 32), (20, 32)])
    store = keep(images, size)
    factor = np.array([1.4, 0.6])
    to = np.array([[13.0, 19.5], [20.25, 12.0]])
    layout = zoom(letterbox(store, np.arange(2), size), factor, size / 2, to)
    for n, picture in enumerate(grey_levels(render(store, layout, size))):
        expected = expected_zoom(images[n], size, factor[n], to[n])
        assert abs(picture - expected).max() < 1


# --- the mosaic


def test_mosaic_zoom_and_mirror_equal_the_reference_pixel_by_pixel():
    size = 40
    images = noise(SIZES)
    store = keep(images, 48)  # no picture is reduced: the reference sees the same pixels
    drawn = random_mosaics(24, len(images), size, seed=1)
    layout = mirror(zoomed_mosaic(store, drawn, size), drawn.mirrored, size)
    pictures = grey_levels(render(store, layout, size))
    for n, picture in enumerate(pictures):
        four = [images[i] for i in drawn.four[n]]
        expected = expected_mosaic(
            four, size, drawn.centre[n], drawn.factor[n], drawn.to[n], drawn.mirrored[n]
        )
        assert abs(picture - expected).max() < 1, n
    assert (pictures[~drawn.mirrored] == PAD).any()
    assert drawn.mirrored.any()


# --- colour


def colours(count: int) -> np.ndarray:
    """Random ones, and those where hue or saturation has an edge: (count, 3) 0..1."""
    rng = np.random.default_rng(3)
    rgb = rng.random((count, 3))
    rgb[:40] = rng.random((40, 1))  # greys
    rgb[40:46] = np.eye(3).repeat(2, 0)  # pure
    rgb[46:49] = 1 - np.eye(3)  # mixed from two
    rgb[49] = 0
    rgb[50] = 1
    rgb[51:90] = rng.integers(0, 3, (39, 3)) / 2  # two channels alike
    return rgb


def recoloured(images: Tensor, factors: np.ndarray) -> Tensor:
    """(N, 3, S, S), (N, 3) -> (N, 3, S, S)."""
    return torch.stack(recolour(images.unbind(1), torch.from_numpy(factors).float()), 1)


def by_colorsys(rgb: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """One colour, its hue, saturation and value multiplied by the factors."""
    hue, saturation, value = np.array(colorsys.rgb_to_hsv(*rgb)) * factors
    return np.array(colorsys.hsv_to_rgb(hue % 1, min(saturation, 1), min(value, 1)))


@pytest.mark.parametrize(
    ("rgb", "factors", "expected"),
    [
        ([1.0, 0.0, 0.0], [1.0, 1.0, 0.5], [0.5, 0.0, 0.0]),  # darker
        ([0.0, 0.5, 0.0], [1.0, 1.0, 4.0], [0.0, 1.0, 0.0]),  # no brighter than one
        ([0.0, 0.0, 1.0], [1.0, 0.5, 1.0], [0.5, 0.5, 1.0]),  # paler
        ([0.0, 1.0, 0.0], [2.0, 1.0, 1.0], [0.0, 0.0, 1.0]),  # a hue of 1/3 becomes 2/3
        ([0.0, 0.0, 1.0], [2.0, 1.0, 1.0], [0.0, 1.0, 0.0]),  # 2/3 becomes 4/3, which is 1/3
        ([0.3, 0.3, 0.3], [0.9, 1.7, 2.0], [0.6, 0.6, 0.6]),  # a grey has neither hue nor colour
    ],
)
def test_colours_written_down(rgb, factors, expected):
    image = torch.tensor(rgb).reshape(1, 3, 1, 1)
    out = recoloured(image, np.array([factors]))
    assert out.flatten().tolist() == pytest.approx(expected, abs=1e-6)


def test_recolour_equals_colorsys():
    rng = np.random.default_rng(4)
    rgb = colours(512)
    factors = 1 + np.array([0.5, 0.9, 0.8]) * rng.uniform(-1, 1, (8, 3))
    factors[0] = 1
    images = torch.from_numpy(rgb.T.reshape(3, 16, 32)).float()
    out = recoloured(images.expand(8, 3, 16, 32), factors)
    assert out.shape == (8, 3, 16, 32)
    for n in range(8):
        for colour, pixel in zip(rgb, out[n].reshape(3, -1).T.numpy(), strict=True):
            apart = abs(pixel - by_colorsys(colour, factors[n]))
            assert apart.max() < 2e-4, (colour, factors[n])
    assert (out[0] - images).abs().max() < 1e-5


def test_render_recolours_each_image_with_its_own_factors():
    store = keep(noise([(32, 32)] * 2), 32)
    plain = letterbox(store, np.arange(2), 32)
    factors = np.array([[1.1, 0.5, 0.7], [0.9, 1.5, 1.3]])
    before = render(store, plain, 32)
    after = render(store, replace(plain, colour=factors), 32)
    for n in range(2):
        alone = recoloured(before[n : n + 1], factors[n : n + 1])
        assert torch.equal(after[n], alone[0])
        assert not torch.equal(after[n], before[n])
