"""Rendered pictures, worked out pixel by pixel in double precision."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

GREY = 114.0  # where there is no picture


def grey_levels(images: Tensor) -> np.ndarray:
    """(N, 3, S, S) 0..1 -> (N, S, S, 3) 0..255."""
    return images.permute(0, 2, 3, 1).numpy() * 255.0


def sample(image: np.ndarray, x: float, y: float) -> np.ndarray:
    """The colour at a point, between the four nearest centres of pixels.

    The border goes on outside.
    """
    height, width = image.shape[:2]
    column = min(max(x - 0.5, 0), width - 1)
    row = min(max(y - 0.5, 0), height - 1)
    left = int(column)
    top = int(row)
    right = min(left + 1, width - 1)
    bottom = min(top + 1, height - 1)
    to_right = column - left
    to_bottom = row - top

    pixels = image.astype(float)
    above = (1 - to_right) * pixels[top, left] + to_right * pixels[top, right]
    below = (1 - to_right) * pixels[bottom, left] + to_right * pixels[bottom, right]
    return (1 - to_bottom) * above + to_bottom * below


def expected_letterbox(image: np.ndarray, size: int) -> np.ndarray:
    """The picture in the middle, as large as fits, at whole pixels -> (S, S, 3)."""
    height, width = image.shape[:2]
    longest = max(height, width)
    placed_w = max(round(width * size / longest), 1)
    placed_h = max(round(height * size / longest), 1)
    left = (size - placed_w) // 2
    top = (size - placed_h) // 2
    out = np.full((size, size, 3), GREY)
    for row in range(top, top + placed_h):
        y = (row + 0.5 - top) * height / placed_h
        for column in range(left, left + placed_w):
            x = (column + 0.5 - left) * width / placed_w
            out[row, column] = sample(image, x, y)
    return out


def expected_zoom(
    image: np.ndarray, size: int, factor: float, to: Any, mirrored: bool = False
) -> np.ndarray:
    """A letterbox zoomed about its middle, which is shown at `to` -> (S, S, 3).

    The longer side of the picture is S: the scale of the letterbox itself is one.
    """
    height, width = image.shape[:2]
    left = (size - width) // 2
    top = (size - height) // 2
    out = np.full((size, size, 3), GREY)
    for row in range(size):
        y = (row + 0.5 - to[1]) / factor + size / 2 - top
        for column in range(size):
            out_x = size - (column + 0.5) if mirrored else column + 0.5
            x = (out_x - to[0]) / factor + size / 2 - left
            if 0 <= x < width and 0 <= y < height:
                out[row, column] = sample(image, x, y)
    return out


def expected_mosaic(
    four: Sequence[np.ndarray], size: int, centre: Any, factor: float, to: Any, mirrored: bool
) -> np.ndarray:
    """Four pictures round `centre` of a canvas (2S, 2S), zoomed -> (S, S, 3).

    to: x, y at which the middle of the canvas is shown.
    """
    out = np.full((size, size, 3), GREY)
    for row in range(size):
        canvas_y = (row + 0.5 - to[1]) / factor + size
        for column in range(size):
            out_x = size - (column + 0.5) if mirrored else column + 0.5
            canvas_x = (out_x - to[0]) / factor + size
            on_canvas = 0 <= canvas_x < 2 * size and 0 <= canvas_y < 2 * size
            if on_canvas:
                colour = canvas_colour(four, size, centre, canvas_x, canvas_y)
                out[row, column] = GREY if colour is None else colour
    return out


def canvas_colour(
    four: Sequence[np.ndarray], size: int, centre: Any, canvas_x: float, canvas_y: float
) -> np.ndarray | None:
    """At a point of the canvas; None where the picture there does not reach so far."""
    in_right = bool(canvas_x >= centre[0])
    in_lower = bool(canvas_y >= centre[1])
    image = four[2 * in_lower + in_right]
    height, width = image.shape[:2]
    ratio = size / max(height, width)
    left = centre[0] if in_right else centre[0] - width * ratio
    top = centre[1] if in_lower else centre[1] - height * ratio
    x = (canvas_x - left) / ratio
    y = (canvas_y - top) / ratio
    if not (0 <= x < width and 0 <= y < height):
        return None
    return sample(image, x, y)
