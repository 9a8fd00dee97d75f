"""Figures from plain arrays: attention maps, boxes, curves. Nothing here knows a network or a file.

Each function returns a matplotlib Figure of its own, without pyplot and its list of open figures.
Colours are those of Okabe and Ito, and viridis: told apart by the colour-blind, and in grey.
Legend: N images, S image size, h, w cells of a map.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

try:
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke
    from matplotlib.ticker import MaxNLocator
except ImportError:
    sys.exit(
        "error: pictures are drawn by matplotlib, which is not installed: pip install 'kdmini[plots]'"
    )

DPI = 100  # a figure of 16 inches is 1600 pixels wide
SMALL = 9  # points; labels and captions
MAP_SIDE, GAP = 1.3, 0.05  # inches of a map; share of it between two maps of a pair
DIMMED = 0.25  # how much of the image shows through a map
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")

KINDS = {  # what a box may be: colour, line style, words of the legend
    "hit": ("#56B4E9", "-", "hit: object and the detection that found it"),
    "missed": ("#F0E442", "--", "missed object"),
    "false alarm": ("#D55E00", "-.", "false alarm: no such object, or found already"),
    "difficult": ("#FFFFFF", ":", "difficult object, and detections of it: neither hit nor miss"),
    "detection": ("#56B4E9", "-", "detection"),
    "object": ("#56B4E9", "-", "object"),
}


class Box(NamedTuple):
    """A box to draw; kind is one of KINDS."""

    xyxy: Sequence[float]
    text: str
    kind: str


class Frame(NamedTuple):
    """An image with boxes. Coordinates are those of the boxes."""

    image: np.ndarray  # (S, S, 3) RGB 0..1
    extent: tuple[
        float, float, float, float
    ]  # left, right, bottom, top of the image; what is padding lies outside
    size: tuple[float, float]  # width, height of what is shown, from 0
    boxes: list[Box]
    title: str


def attention(
    images: np.ndarray,
    ids: Sequence[str],
    maps: Mapping[str, Sequence[np.ndarray]],
    sides: Sequence[str],
    captions: Mapping[str, Sequence[str]],
    title: str,
) -> Figure:
    """A row for each image, a column for each tap, in it the maps of the sides next to each other,
    the caption below.

    images: (N, S, S, 3) RGB 0..1. maps: tap -> for each side (N, h, w); one colour scale for the
    maps of a cell.
    captions: tap -> N.
    """
    rows, right = len(images), len(sides) + GAP * (len(sides) - 1)
    lines = max(text.count("\n") + 1 for texts in captions.values() for text in texts)
    size = (
        MAP_SIDE * (1.1 + len(maps) * (right + 0.1)),
        (MAP_SIDE + 0.1 + 0.18 * lines) * rows + 1.5,
    )
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    figure.suptitle(title + "\n", fontsize=SMALL + 4)  # what stands over the axes comes close
    axes = figure.subplots(
        rows, 1 + len(maps), squeeze=False, width_ratios=[1.0] + [right] * len(maps)
    )
    for row, (image, name) in enumerate(zip(images, ids, strict=True)):
        axes[row, 0].imshow(image, extent=(0, 1, 1, 0))
        axes[row, 0].set(xticks=[], yticks=[])
        axes[row, 0].set_xlabel(name, fontsize=SMALL)
    grey = images @ [0.299, 0.587, 0.114]  # (N, S, S)
    for column, (tap, shown) in enumerate(maps.items(), 1):
        height, width = shown[0].shape[1:]
        axes[0, column].set_title(f"{tap}, {height}x{width}", fontsize=SMALL + 1)
        for row, axis in enumerate(axes[:, column]):
            largest = max(float(side[row].max()) for side in shown)
            for place, side in enumerate(shown):
                extent = place * (1 + GAP), place * (1 + GAP) + 1, 1, 0
                axis.imshow(
                    grey[row], "gray", vmin=0, vmax=1.6, extent=extent
                )  # dimmed: white is not to pale the map
                axis.imshow(
                    side[row],
                    "viridis",
                    vmin=0,
                    vmax=largest,
                    alpha=1 - DIMMED,
                    extent=extent,
                    interpolation="bilinear",
                )
            axis.set(xlim=(0, right), ylim=(1, 0), yticks=[])
            middles = (
                [place * (1 + GAP) + 0.5 for place in range(len(sides))] if len(sides) > 1 else []
            )
            axis.set_xticks(middles, sides[: len(middles)], fontsize=SMALL)
            axis.tick_params(top=False, bottom=False, labeltop=row == 0, labelbottom=False, pad=1)
            axis.spines[:].set_visible(False)
            axis.set_xlabel(captions[tap][row], fontsize=SMALL)
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
    return figure


def boxes(frames: Sequence[Frame], columns: int, title: str, cell: float = 4.0) -> Figure:
    """The frames in rows of at most `columns`, each `cell` inches wide, with a legend of the kinds
    of boxes.
    """
    columns = min(columns, len(frames))
    rows = math.ceil(len(frames) / columns)
    tall = [min(frame.size[1] / frame.size[0], 1) for frame in frames]
    shares = [max(tall[row * columns : (row + 1) * columns]) for row in range(rows)]
    size = cell * columns, cell * sum(shares) + 0.3 * rows + 0.9
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    figure.suptitle(title, fontsize=SMALL + 4)
    axes = figure.subplots(rows, columns, squeeze=False, height_ratios=shares).ravel()
    for axis in axes[len(frames) :]:
        axis.set_visible(False)
    for axis, frame in zip(axes, frames, strict=False):
        width, height = frame.size
        axis.imshow(frame.image, extent=frame.extent)
        axis.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
        axis.set_title(frame.title, fontsize=SMALL + 1)
        axis.set_anchor("N")
        taken: list[tuple[float, float]] = []  # left and bottom of the texts so far
        line = 0.045 * max(width, height)  # about the height of a text; a letter is half as wide
        for (x0, y0, x1, y1), text, kind in frame.boxes:
            colour, style, _ = KINDS[kind]
            halo = [withStroke(linewidth=4, foreground="black")]
            axis.add_patch(
                Rectangle(
                    (x0, y0),
                    x1 - x0,
                    y1 - y0,
                    fill=False,
                    ec=colour,
                    ls=style,
                    lw=2,
                    path_effects=halo,
                )
            )
            late = x0 > 0.6 * width  # the text stays inside the image
            wide = 0.5 * line * len(text)
            left, y = x1 - wide if late else x0, max(y0, line)
            while any(abs(left - u) < wide and abs(y - v) < line for u, v in taken):
                y += line
            taken.append((left, y))
            axis.text(
                x1 if late else x0,
                y,
                text,
                ha="right" if late else "left",
                va="bottom",
                fontsize=SMALL,
                bbox={"facecolor": colour, "edgecolor": "black", "linewidth": 0.5, "pad": 1},
                clip_on=True,
            ).set_in_layout(False)
    present = {box.kind for frame in frames for box in frame.boxes}
    if len(present) > 1 or "hit" in present:
        shown = [
            (colour, style, words)
            for kind, (colour, style, words) in KINDS.items()
            if kind in present
        ]
        handles = [
            Line2D(
                [],
                [],
                color=c,
                ls=s,
                lw=2,
                label=w,
                path_effects=[withStroke(linewidth=4, foreground="black")],
            )
            for c, s, w in shown
        ]
        figure.legend(
            handles=handles,
            loc="outside lower center",
            ncols=len(handles),
            fontsize=SMALL + 1,
            handlelength=4,
        )
    return figure


Line = list[tuple[float, float]]  # x, y


class Panel(NamedTuple):
    """One set of axes with lines."""

    title: str
    ylabel: str
    lines: dict[str, Line]  # by label


def curves(panels: Sequence[Panel], xlabel: str, title: str) -> Figure:
    """The panels in rows of three, on one x axis. A line that is alone is named beside its axis."""
    rows = math.ceil(len(panels) / 3)
    figure = Figure(figsize=(15, 3.6 * rows + 0.6), dpi=DPI, layout="constrained")
    figure.suptitle(title, fontsize=SMALL + 4)
    axes = figure.subplots(rows, 3, squeeze=False, sharex=True).ravel()
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    for axis, panel in zip(axes, panels, strict=False):
        for number, (label, points) in enumerate(panel.lines.items()):
            style = {
                "color": COLOURS[number % len(COLOURS)],
                "marker": MARKERS[number % len(MARKERS)],
            }
            axis.plot(
                *zip(*points, strict=True),
                label=label,
                ms=4,
                markevery=math.ceil(len(points) / 12),
                **style,
            )
        only = [*panel.lines, panel.ylabel] if len(panel.lines) == 1 else [panel.ylabel]
        plain(axis, panel.title, xlabel, ", ".join(filter(None, only)))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.tick_params(labelbottom=True)
        if all(y >= 0 for points in panel.lines.values() for _, y in points):
            axis.set_ylim(bottom=0)
        if len(panel.lines) > 1:
            axis.legend(fontsize=SMALL, frameon=False, ncols=2 if len(panel.lines) > 3 else 1)
    return figure


def precision_recall(found: Mapping[str, np.ndarray], title: str) -> Figure:
    """found: class -> (count,), the best precision at recall 1/count, 2/count ... 1, 0 beyond what
    was reached.

    The area under a drawn line is the mean of its values, the average precision.
    """
    columns = math.ceil(math.sqrt(len(found) * 1.25))
    rows = math.ceil(len(found) / columns)
    figure = Figure(figsize=(2.6 * columns, 2.5 * rows + 0.7), dpi=DPI, layout="constrained")
    figure.suptitle(title, fontsize=SMALL + 4)
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    for axis in axes[len(found) :]:
        axis.set_visible(False)
    for number, (axis, (name, curve)) in enumerate(zip(axes, found.items(), strict=False)):
        count = len(curve)
        plain(
            axis,
            f"{name}: AP {curve.mean():.2f}, {count:,} objects" if count else f"{name}: no objects",
        )
        axis.set(xlim=(0, 1), ylim=(0, 1.02), xticks=[0, 0.5, 1], yticks=[0, 0.5, 1])
        axis.tick_params(labelbottom=number + columns >= len(found))
        if count:
            recall = np.arange(count + 1) / count
            stairs = np.concatenate([curve[:1], curve])
            axis.fill_between(recall, stairs, step="pre", color=COLOURS[0], alpha=0.2, linewidth=0)
            axis.step(recall, stairs, where="pre", color=COLOURS[0])
    figure.supxlabel("recall", fontsize=SMALL + 1)
    figure.supylabel("precision", fontsize=SMALL + 1)
    return figure


def plain(axis, title: str, xlabel: str = "", ylabel: str = "") -> None:
    """Axes with a title in words, a faint grid and no frame on two sides."""
    axis.set_title(title, fontsize=SMALL + 1)
    axis.set_xlabel(xlabel, fontsize=SMALL)
    axis.set_ylabel(ylabel, fontsize=SMALL)
    axis.tick_params(labelsize=SMALL)
    axis.grid(color="#DDDDDD", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
