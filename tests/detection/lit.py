"""Pictures with a rectangle lit in one channel, found again after rendering."""

import numpy as np

from tests.data.arrays import Size


def lit(size: Size, box: list[int], channel: int) -> np.ndarray:
    """A dark picture, (H, W, 3), in which the box is lit."""
    image = np.zeros((*size, 3), np.uint8)
    left, top, right, bottom = box
    image[top:bottom, left:right, channel] = 255
    return image


def extent(picture: np.ndarray, channel: int) -> np.ndarray | None:
    """The corners xyxy of what is lit in one channel of (S, S, 3); None for nothing.

    Lit is what is over half; grey is not. An edge is half lit exactly on the edge, by
    bilinear interpolation: so a corner is at most half a pixel off, and a little more
    where the picture was reduced.
    """
    others = [other for other in range(3) if other != channel]
    over = picture[..., channel] - picture[..., others].max(-1) > 127.5
    if not over.any():
        return None
    rows = np.flatnonzero(over.any(1))
    columns = np.flatnonzero(over.any(0))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
