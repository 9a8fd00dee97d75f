"""The palette of VOC, by its published colours."""

import io

import numpy as np
import pytest
from PIL import Image

from kdmini.data.palette import PALETTE, palette_png
from kdmini.segmentation.truth import VOID


@pytest.mark.parametrize(
    "index, colour",
    [
        (0, (0, 0, 0)),
        (1, (128, 0, 0)),  # aeroplane
        (9, (192, 0, 0)),  # chair
        (15, (192, 128, 128)),  # person
        (20, (0, 64, 128)),  # tvmonitor
        (VOID, (224, 224, 192)),
    ],
)
def test_the_colours_are_those_of_voc(index, colour):
    assert tuple(PALETTE[index]) == colour


def test_no_two_indices_have_one_colour():
    assert len(np.unique(PALETTE, axis=0)) == 256


def test_a_png_keeps_indices_and_shows_colours():
    mask = np.arange(256, dtype=np.uint8).reshape(8, 32)
    with Image.open(io.BytesIO(palette_png(mask))) as image:
        assert image.mode == "P"
        np.testing.assert_array_equal(np.asarray(image), mask)
        np.testing.assert_array_equal(np.asarray(image.convert("RGB")), PALETTE[mask])
