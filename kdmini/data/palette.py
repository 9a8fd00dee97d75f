"""Masks in colours: PASCAL VOC's palette, and a PNG whose pixels stay indices."""

import io

import numpy as np
from PIL import Image


def voc_palette() -> np.ndarray:
    """-> (256, 3) uint8 RGB, a colour for each index, no two the same.

    Bits 0, 1 and 2 of an index are the highest of red, green and blue, bits 3 to 5 the next,
    and so on.
    """
    indices = np.arange(256)
    colours = np.zeros((256, 3), np.uint8)
    for level in range(8):
        for channel in range(3):
            bit = indices >> (3 * level + channel) & 1
            colours[:, channel] |= (bit << (7 - level)).astype(np.uint8)
    return colours


PALETTE = voc_palette()


def with_palette(mask: np.ndarray) -> Image.Image:
    """(H, W) uint8 indices -> an image of mode P, in the colours of VOC."""
    image = Image.fromarray(mask)
    image.putpalette(PALETTE.tobytes())
    return image


def palette_png(mask: np.ndarray) -> bytes:
    """(H, W) uint8 indices -> a file like those in VOC's SegmentationClass."""
    content = io.BytesIO()
    with_palette(mask).save(content, "PNG")
    return content.getvalue()
