"""Images with boxes, drawn from plain arrays. Nothing here knows a network or a file.

Legend: S image size.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

from kdmini.tools.draw import SMALL, Axes, Figure, blank, grid

CELL = 4.0  # inches that an image is wide
ENTRY = 3.9  # inches of an entry of the legend
LINE_WIDTH = 2  # points
HALO = [withStroke(linewidth=4, foreground="black")]  # a line is then seen on any ground

# about the size of a text, as a share of the image's longer side
TEXT_HEIGHT = 0.045
LETTER_WIDTH = 0.5  # of the height
LATE = 0.6  # where a box begins whose text would leave the image, as a share of its width


class Kind(NamedTuple):
    """How boxes of one kind look."""

    colour: str
    line: Literal["-", "--", "-.", ":"]
    words: str  # in the legend


KINDS = {
    "hit": Kind("#56B4E9", "-", "hit: object and the detection that found it"),
    "missed": Kind("#F0E442", "--", "missed object"),
    "false alarm": Kind("#D55E00", "-.", "false alarm: no such object, or found already"),
    "difficult": Kind(
        "#FFFFFF", ":", "difficult object, and detections of it: neither hit nor miss"
    ),
    "detection": Kind("#56B4E9", "-", "detection"),
    "object": Kind("#56B4E9", "-", "object"),
}


class Box(NamedTuple):
    """A box to draw; kind is one of KINDS."""

    xyxy: Sequence[float]
    text: str
    kind: str


class BoxedImage(NamedTuple):
    """An image with boxes. Coordinates are those of the boxes."""

    image: np.ndarray  # (S, S, 3) RGB 0..1
    extent: tuple[float, float, float, float]  # left, right, bottom, top; padding lies outside
    size: tuple[float, float]  # width, height of what is shown, from 0
    boxes: list[Box]
    title: str


def draw_boxes(images: Sequence[BoxedImage], columns: int, title: str) -> Figure:
    """The images in rows of at most `columns`, with a legend of the kinds of boxes."""
    columns = min(columns, len(images))
    heights = [min(image.size[1] / image.size[0], 1) for image in images]  # in cells
    row_heights = [
        max(heights[start : start + columns]) for start in range(0, len(images), columns)
    ]
    height = CELL * sum(row_heights) + 0.3 * len(row_heights) + 0.9
    figure = blank(CELL * columns, height, title)
    axes = grid(figure, len(images), columns, height_ratios=row_heights)
    for axis, image in zip(axes, images, strict=True):
        draw_image(axis, image)
    kinds = {box.kind for image in images for box in image.boxes}
    if len(kinds) > 1 or "hit" in kinds:
        add_legend(figure, kinds)
    return figure


def draw_image(axis: Axes, image: BoxedImage) -> None:
    width, height = image.size
    axis.imshow(image.image, extent=image.extent)
    axis.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
    axis.set_title(image.title, fontsize=SMALL + 1)
    axis.set_anchor("N")
    texts: list[tuple[float, float]] = []  # left and bottom of each so far
    for box in image.boxes:
        draw_box(axis, box)
        draw_text(axis, box, image.size, texts)


def draw_box(axis: Axes, box: Box) -> None:
    kind = KINDS[box.kind]
    left, top, right, bottom = box.xyxy
    rectangle = Rectangle(
        (left, top),
        right - left,
        bottom - top,
        fill=False,
        edgecolor=kind.colour,
        linestyle=kind.line,
        linewidth=LINE_WIDTH,
        path_effects=HALO,
    )
    axis.add_patch(rectangle)


def draw_text(
    axis: Axes, box: Box, size: tuple[float, float], texts: list[tuple[float, float]]
) -> None:
    """At the upper edge of the box, or further down where another of `texts` is.

    Adds its own place to them.
    """
    width, height = size
    left, top, right, _ = box.xyxy
    text_height = TEXT_HEIGHT * max(width, height)
    text_width = LETTER_WIDTH * text_height * len(box.text)
    late = left > LATE * width  # the text then ends with the box, and stays inside the image
    start = right - text_width if late else left
    bottom = max(top, text_height)

    def covered() -> bool:
        return any(
            abs(start - other_start) < text_width and abs(bottom - other_bottom) < text_height
            for other_start, other_bottom in texts
        )

    while covered():
        bottom += text_height
    texts.append((start, bottom))
    plate = {
        "facecolor": KINDS[box.kind].colour,
        "edgecolor": "black",
        "linewidth": 0.5,
        "pad": 1,
    }
    text = axis.text(
        right if late else left,
        bottom,
        box.text,
        ha="right" if late else "left",
        va="bottom",
        fontsize=SMALL,
        bbox=plate,
        clip_on=True,
    )
    text.set_in_layout(False)


def add_legend(figure: Figure, kinds: set[str]) -> None:
    handles = [
        Line2D(
            [],
            [],
            color=kind.colour,
            linestyle=kind.line,
            linewidth=LINE_WIDTH,
            label=kind.words,
            path_effects=HALO,
        )
        for name, kind in KINDS.items()
        if name in kinds
    ]
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=min(len(handles), max(int(figure.get_figwidth() / ENTRY), 1)),
        fontsize=SMALL + 1,
        handlelength=4,
    )
