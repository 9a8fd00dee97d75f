"""Figures from plain arrays: attention maps, and what other figures are made of.

Nothing here knows a network or a file. A figure is matplotlib's Figure of its own, without
pyplot and its list of open figures. Colours are those of Okabe and Ito, and viridis: told
apart by the colour-blind, and in grey.

Legend: N images, S image size, H W cells of a map.
"""

import math
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

try:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure
except ImportError:
    sys.exit(
        "error: pictures are drawn by matplotlib, which is not installed: "
        "pip install -e '.[plots]' in the checkout"
    )

DPI = 100  # a figure of 16 inches is 1600 pixels wide

# points
SMALL = 9  # labels and captions
LARGE = SMALL + 4  # the title of a figure

LETTERS = 8  # of a title, in an inch

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")

# attention maps
MAP_SIDE = 1.3  # inches
GAP = 0.05  # between two maps of a cell, as a share of a map
DIMMED = 0.25  # how much of the image shows through a map
WHITE = 1.6  # the grey value that is white under a map, so that no image pales it
LUMA = (0.299, 0.587, 0.114)  # weights of R, G and B in grey


def blank(width: float, height: float, title: str) -> Figure:
    """A figure of so many inches, with a title."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    figure.suptitle(title, fontsize=LARGE)
    return figure


def grid(figure: Figure, count: int, columns: int, **settings: Any) -> list[Axes]:
    """`count` axes in rows of `columns`. settings: of Figure.subplots."""
    rows = math.ceil(count / columns)
    axes = figure.subplots(rows, columns, squeeze=False, **settings).ravel()
    for unused in axes[count:]:
        unused.set_visible(False)
    return list(axes[:count])


def style(axis: Axes, title: str, xlabel: str = "", ylabel: str = "") -> None:
    """Axes with a title in words, a faint grid and no frame on two sides."""
    axis.set_title(title, fontsize=SMALL + 1)
    axis.set_xlabel(xlabel, fontsize=SMALL)
    axis.set_ylabel(ylabel, fontsize=SMALL)
    axis.tick_params(labelsize=SMALL)
    axis.grid(color="#DDDDDD", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def show(axis: Axes, picture: Any, below: str = "") -> None:
    """An image without ticks. below: as it stands, "$" is no formula."""
    axis.imshow(picture, interpolation="nearest")
    axis.set(xticks=[], yticks=[])
    axis.set_xlabel(below, fontsize=SMALL, parse_math=False)


# --- attention maps


class Column(NamedTuple):
    """What is drawn of one tap."""

    maps: Sequence[np.ndarray]  # of each side (N, H, W)
    captions: Sequence[str]  # N, each under the maps of its image


def attention(
    images: np.ndarray,
    ids: Sequence[str],
    sides: Sequence[str],
    columns: Mapping[str, Column],
    title: str,
) -> Figure:
    """A row for each image, a column for each tap, in it the maps of the sides.

    They stand next to each other and share a colour scale.
    images: (N, S, S, 3) RGB 0..1. ids: N, the names of the images. sides: the networks, or
    moments of one. columns: by tap.
    """
    cell_width = len(sides) + GAP * (len(sides) - 1)  # in maps
    captions = [text for column in columns.values() for text in column.captions]
    caption_lines = 1 + max(text.count("\n") for text in captions)
    row_height = MAP_SIDE + 0.1 + 0.18 * caption_lines
    width = MAP_SIDE * (1.1 + len(columns) * (cell_width + 0.1))
    height = row_height * len(images) + 1.5
    lines = textwrap.fill(title, round(width * LETTERS))
    figure = blank(width, height, lines + "\n")  # what stands over the axes comes close
    width_ratios = [1.0] + [cell_width] * len(columns)
    axes = figure.subplots(len(images), 1 + len(columns), squeeze=False, width_ratios=width_ratios)

    for axis, image, name in zip(axes[:, 0], images, ids, strict=True):
        axis.imshow(image, extent=(0, 1, 1, 0))
        axis.set(xticks=[], yticks=[])
        axis.set_xlabel(name, fontsize=SMALL)
    grey = images @ LUMA  # (N, S, S)
    for number, (tap, column) in enumerate(columns.items(), 1):
        map_height, map_width = column.maps[0].shape[1:]
        axes[0, number].set_title(f"{tap}, {map_height}x{map_width}", fontsize=SMALL + 1)
        for row, axis in enumerate(axes[:, number]):
            draw_maps(axis, grey[row], [maps[row] for maps in column.maps])
            name_sides(axis, sides, visible=row == 0)
            axis.set_xlabel(column.captions[row], fontsize=SMALL)
    add_scale(figure, axes)
    return figure


def draw_maps(axis: Axes, grey: np.ndarray, maps: Sequence[np.ndarray]) -> None:
    """Maps (H, W) side by side, each over the image in grey, (S, S)."""
    largest = max(float(values.max()) for values in maps)
    right = 0.0
    for number, values in enumerate(maps):
        left = number * (1 + GAP)
        right = left + 1
        extent = (left, right, 1, 0)
        axis.imshow(grey, "gray", vmin=0, vmax=WHITE, extent=extent)
        axis.imshow(
            values,
            "viridis",
            vmin=0,
            vmax=largest,
            alpha=1 - DIMMED,
            extent=extent,
            interpolation="bilinear",
        )
    axis.set(xlim=(0, right), ylim=(1, 0), yticks=[])
    axis.spines[:].set_visible(False)


def name_sides(axis: Axes, sides: Sequence[str], visible: bool) -> None:
    """Above the maps, where there are several to tell apart."""
    names = sides if len(sides) > 1 else []
    middles = [number * (1 + GAP) + 0.5 for number in range(len(names))]
    axis.set_xticks(middles, names, fontsize=SMALL)
    axis.tick_params(top=False, bottom=False, labeltop=visible, labelbottom=False, pad=1)


def add_scale(figure: Figure, axes: np.ndarray) -> None:
    """What the colours of the maps mean, below the axes."""
    scale = figure.colorbar(
        ScalarMappable(cmap="viridis"),
        ax=axes,
        location="bottom",
        fraction=0.02,
        aspect=60,
        shrink=0.3,
    )
    scale.set_ticks([0, 1], labels=["0", "the largest value"], fontsize=SMALL)
    scale.set_label("attention; maps side by side share one scale", fontsize=SMALL)
