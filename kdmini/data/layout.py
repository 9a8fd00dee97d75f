"""Where each image of a batch takes its pixels from: mosaic, zoom, shift, flip, letterbox.

A `Layout` says so in numbers: up to four tiles an image, each with the map
x_out = a * x_source + b, the same for pixels and boxes. Rotation and shear are left out, as
in the public recipe: so x depends on the column alone and y on the row alone. Tiles share the
cells of a picture; a layout and the one `under` it share its light.
Coordinates are continuous: the first pixel covers 0 to 1.
Legend: N images, S image size, 4 tiles (outside/inside an interval of columns, of rows).
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from kdmini.data.store import Store


@dataclass(frozen=True)
class Layout:
    """Where N rendered images take their pixels from."""

    image: np.ndarray  # (N, 4) index into the store
    a: np.ndarray  # (N, 4, 2) x, y: from stored to rendered pixels, negative where mirrored
    b: np.ndarray  # (N, 4, 2) x, y: offset, rendered pixels
    shown: np.ndarray  # (N, 4, 2, 2) [low, high] of x, y: the part that the tile fills
    # (N, 2, 2) [low, high) of x, y: the columns of tiles 1 and 3, the rows of 2 and 3. From where
    # the tiles of a mosaic meet to infinity; empty where there is one tile
    second: np.ndarray
    colour: np.ndarray | None = None  # (N, 3) factors of hue, saturation and value
    under: "Layout | None" = None  # shines through
    share: np.ndarray | None = None  # (N,) of the light that comes from there

    @property
    def tiled(self) -> np.ndarray:
        """(N,) bool: whether there are tiles beside the first."""
        return np.all(self.second[..., 0] < self.second[..., 1], axis=1)


class Frame(NamedTuple):
    """How one letterboxed image lies over its file: native = (x - corner) * scale."""

    scale: np.ndarray  # (2,) x, y
    corner: np.ndarray  # (2,) x, y of the picture in the square
    native: np.ndarray  # (2,) width, height of the file
    imgsz: int  # side of the square


def letterbox(store: Store, images: np.ndarray, imgsz: int) -> Layout:
    """Each whole image in the middle of the square, as large as fits, at whole pixels.

    images: (N,).
    """
    wh = store.sizes[images][:, ::-1]  # (N, 2)
    ratio = imgsz / wh.max(1, keepdims=True)
    placed = np.maximum(np.round(wh * ratio), 1)
    corner = (imgsz - placed) // 2
    shown = np.stack([corner, corner + placed], -1)
    return one_tile(images, placed / wh, corner, shown)


def one_tile(images: np.ndarray, a: np.ndarray, b: np.ndarray, shown: np.ndarray) -> Layout:
    """A layout of one tile an image: (N,), (N, 2), (N, 2), (N, 2, 2)."""
    n = len(images)
    nothing = np.zeros((n, 3, 2, 2))
    return Layout(
        image=np.repeat(images[:, None], 4, 1),
        a=np.repeat(a[:, None], 4, 1).astype(float),
        b=np.repeat(b[:, None], 4, 1).astype(float),
        shown=np.concatenate([shown[:, None], nothing], 1),
        second=np.full((n, 2, 2), np.inf),
    )


def mosaic(store: Store, images: np.ndarray, imgsz: int, centre: np.ndarray) -> Layout:
    """Four images round a centre on a canvas of twice the size.

    images: (N, 4). centre: (N, 2) canvas pixels.
    """
    wh = store.sizes[images][..., ::-1]  # (N, 4, 2)
    a = np.repeat(imgsz / wh.max(-1, keepdims=True), 2, -1)  # (N, 4, 2)
    placed = wh * a
    # left above, right above, left below, right below: does the tile begin at the centre?
    after = np.array([[0, 0], [1, 0], [0, 1], [1, 1]])
    b = centre[:, None] - placed * (1 - after)
    shown = np.stack([b, b + placed], -1).clip(0, 2 * imgsz)
    return Layout(images, a, b, shown, np.stack([centre, np.full_like(centre, np.inf)], -1))


def zoom(layout: Layout, factor: np.ndarray, about: float, to: np.ndarray) -> Layout:
    """Scales each image by factor, (N,), about the point (about, about), which moves to
    `to`, (N, 2).
    """
    factor = factor[:, None]
    return replace(
        layout,
        a=layout.a * factor[..., None],
        b=(layout.b - about) * factor[..., None] + to[:, None],
        shown=(layout.shown - about) * factor[..., None, None] + to[:, None, :, None],
        second=(layout.second - about) * factor[..., None] + to[..., None],
    )


def mirror(layout: Layout, which: np.ndarray, imgsz: int) -> Layout:
    """Swaps left and right of the images named by `which`, (N,) bool."""
    a = layout.a.copy()
    b = layout.b.copy()
    shown = layout.shown.copy()
    second = layout.second.copy()
    a[which, :, 0] *= -1
    b[which, :, 0] = imgsz - b[which, :, 0]
    shown[which, :, 0] = imgsz - shown[which, :, 0, ::-1]
    second[which, 0] = imgsz - second[which, 0, ::-1]
    return replace(layout, a=a, b=b, shown=shown, second=second)


def where(which: np.ndarray, one: Layout, other: Layout) -> Layout:
    """`one` for the images named by `which`, (N,) bool, `other` for the rest.

    Colour is that of `one`: it is drawn for an image, whatever its layout.
    """

    def mixed(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        condition = which.reshape(-1, *(1,) * (x.ndim - 1))
        return np.where(condition, x, y)

    return Layout(
        image=mixed(one.image, other.image),
        a=mixed(one.a, other.a),
        b=mixed(one.b, other.b),
        shown=mixed(one.shown, other.shown),
        second=mixed(one.second, other.second),
        colour=one.colour,
    )


def areas(layout: Layout, imgsz: int) -> np.ndarray:
    """(N, 4): how many cells of the picture each tile fills, counted."""
    cells = np.arange(imgsz) + 0.5

    def inside(interval: np.ndarray) -> np.ndarray:
        """(..., 2) -> (..., S) bool, in float32 as render.py has it."""
        ends = interval.astype(np.float32)
        return (ends[..., :1] <= cells) & (cells < ends[..., 1:])

    # of each tile: is it the second one along x, along y?
    place = np.array([[0, 0], [1, 0], [0, 1], [1, 1]], bool)
    own = inside(layout.second)[:, None] == place[..., None]  # (N, 4, 2, S)
    return (own & inside(layout.shown)).sum(-1).prod(-1)
