"""Masks, counted and drawn, for kdmini.tools.look.

Legend: K classes.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from kdmini.contracts import Target
from kdmini.segmentation.truth import VOID
from kdmini.tools.draw import Figure, blank, grid, show
from kdmini.tools.draw_masks import blended
from kdmini.tools.segmentations import CELL, COLUMNS, add_legend
from kdmini.tools.sheet import Split, table


def counted(target: Target) -> Target:
    """With the pixels of each index, (256,), in the place of a mask: those of a whole set would
    fill the memory.
    """
    if "mask" not in target:
        return target
    rest = {key: value for key, value in target.items() if key != "mask"}
    return {**rest, "pixels": np.bincount(target["mask"].ravel(), minlength=256)}


def pixels_of(split: Split) -> np.ndarray:
    """(images, 256) of each index."""
    return np.stack([read.target["pixels"] for read in split.images])


def tables(splits: Sequence[Split]) -> list[str]:
    """Lines: of each class the images that show it and its share of the pixels."""
    found = [pixels_of(split) for split in splits]
    titles = ["class"]
    for split in splits:
        titles += [split.name, "pixels"]
    rows = []
    for label, name in [*enumerate(splits[0].names), (VOID, "void")]:
        row = [name]
        for pixels in found:
            share = pixels[:, label].sum() / pixels.sum()
            row += [f"{(pixels[:, label] > 0).sum():,}", f"{share:.2%}"]
        rows.append(row)
    return ["", *table(titles, rows)]


def sheet(split: Split, count: int) -> Figure:
    """A few images under their masks."""
    labels = [np.flatnonzero(row[:VOID]) for row in pixels_of(split)]
    shown = split.shown(count, labels)
    ratios = [one.native[0] / one.native[1] for one in shown]
    heights = [max(ratios[start : start + COLUMNS]) for start in range(0, len(shown), COLUMNS)]
    title = f"{len(shown)} of the {len(split.images):,} images of {split.name}"
    figure = blank(CELL * COLUMNS, CELL * sum(heights) + 0.25 * len(heights) + 1.1, title)
    axes = grid(figure, len(shown), COLUMNS, height_ratios=heights)
    for axis, one in zip(axes, shown, strict=True):
        show(axis, blended(Image.fromarray(one.image), one.target["mask"]), one.target["id"])
    add_legend(figure, [one.target["mask"] for one in shown], split.names)
    return figure
