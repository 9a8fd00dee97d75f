"""Masks over photographs, in the colours of VOC's palette. Nothing here knows a network or a
file.

Legend: H, W size of a mask, K classes.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from kdmini.data.palette import PALETTE, with_palette
from kdmini.tools.canvas import enlarged, font, text_size
from kdmini.typed import short

OPACITY = 0.6  # of a mask over its photograph
UNCOLOURED = 0  # the index that VOC's palette has black: it would only darken the photograph
LEAST_SHARE = 0.001  # that is written as a number
GAP = 0.5  # between the entries of a legend, in lines
PAPER = "white"
INK = "black"


class Entry(NamedTuple):
    """A class in a legend, and where it stands."""

    label: int
    text: str
    x: int  # left, pixels
    row: int
    width: int


def resized(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H, W) uint8 -> the nearest index for each pixel of another size, width and height."""
    return np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))


def blended(photograph: Image.Image, mask: np.ndarray) -> Image.Image:
    """The classes as colours through which the photograph is seen in grey, so that no colour
    but theirs is there.

    mask: (H, W) uint8, of any size.
    """
    grey = photograph.convert("L").convert("RGB")
    on_it = resized(mask, photograph.size)
    coloured = Image.blend(grey, with_palette(on_it).convert("RGB"), OPACITY)
    is_coloured = Image.fromarray((on_it != UNCOLOURED).astype(np.uint8) * 255)
    return Image.composite(coloured, grey, is_coloured)


def shares(mask: np.ndarray) -> dict[int, float]:
    """Index -> its share of the pixels, of those that are there, the largest first."""
    counts = np.bincount(mask.reshape(-1))
    present = [int(label) for label in counts.argsort(kind="stable")[::-1] if counts[label]]
    return {label: float(counts[label] / mask.size) for label in present}


def overlay(
    image: Image.Image, mask: np.ndarray, names: Sequence[str], rows: int | None = None
) -> Image.Image:
    """The mask over its photograph, and below it which colour is which class; a small image is
    enlarged for that.

    rows: of the legend, whatever it takes; a class that finds no room there is left out.
    """
    picture = blended(enlarged(image), mask)
    size = text_size(picture)
    texts = {}
    for label, share in shares(mask).items():
        percent = f"{share:.1%}" if share >= LEAST_SHARE else f"under {LEAST_SHARE:.1%}"
        texts[label] = f"{short(names[label])[1:-1]} {percent}"
    entries = placed(texts, size, picture.width)
    row_height = round(1.5 * size)
    page_width = picture.width
    if rows is None:
        rows = 1 + max(entry.row for entry in entries)
        widest = max(entry.x + entry.width for entry in entries) + size // 2
        page_width = max(picture.width, widest)
    below = row_height * rows + size // 2
    page = Image.new("RGB", (page_width, picture.height + below), PAPER)
    page.paste(picture)
    pen = ImageDraw.Draw(page)
    for entry in entries:
        top = picture.height + size // 2 + entry.row * row_height
        square = (entry.x, top, entry.x + size, top + size)
        pen.rectangle(square, colour_of(entry.label), INK)
        pen.text((entry.x + 1.5 * size, top), entry.text, INK, font(size))
    return page


def colour_of(label: int) -> tuple[int, int, int]:
    """In a legend: RGB 0..255, grey for what is seen as it is."""
    if label == UNCOLOURED:
        return 128, 128, 128
    red, green, blue = PALETTE[label].tolist()
    return red, green, blue


def placed(texts: dict[int, str], size: int, page_width: int) -> list[Entry]:
    """A legend's entries in rows that fit the page, unless one is wider by itself.

    size: of the text, pixels.
    """
    margin = size // 2
    x = margin
    row = 0
    entries = []
    for label, text in texts.items():
        width = round(1.5 * size + font(size).getlength(text))
        if x > margin and x + width > page_width - margin:
            x = margin
            row += 1
        entries.append(Entry(label, text, x, row, width))
        x += width + round(GAP * 2 * size)
    return entries
