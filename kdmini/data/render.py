"""From packed pixels to a batch: mosaic, scale, shift, flip and colour, or a letterbox, in one
gather.

A `Layout` says, in numbers, where each image of a batch takes its pixels from: up to four tiles an
image, each with the map x_out = a * x_source + b, the same for pixels and boxes. Rotation and shear
are left out, as in the public recipe: so x depends on the column alone and y on the row alone.
Coordinates are continuous: the first pixel covers 0 to 1.
Legend: N images, S image size, 4 tiles (left/right of the centre, above/below it).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kdmini.data.store import Store

PAD = 114  # grey level where there is no image


@dataclass(frozen=True)
class Layout:
    """Where N rendered images take their pixels from."""

    image: np.ndarray  # (N, 4) index into the store
    a: (
        np.ndarray
    )  # (N, 4, 2) x, y: scale from stored pixels to rendered pixels, negative where mirrored
    b: np.ndarray  # (N, 4, 2) x, y: offset, rendered pixels
    shown: (
        np.ndarray
    )  # (N, 4, 2, 2) [low, high] of x, y: the part of the output that the tile fills
    centre: (
        np.ndarray
    )  # (N, 2) x, y: where the tiles meet; beyond the output where there is one tile
    colour: np.ndarray | None = None  # (N, 3) factors of hue, saturation and value


def letterbox(store: Store, images: np.ndarray, imgsz: int) -> Layout:
    """Each whole image in the middle of the square, as large as fits, at whole pixels. images:
    (N,).
    """
    wh = store.sizes[images][:, ::-1]  # (N, 2)
    placed = np.maximum(np.round(wh * (imgsz / wh.max(1, keepdims=True))), 1)
    corner = (imgsz - placed) // 2
    return single(images, placed / wh, corner, np.stack([corner, corner + placed], -1))


def single(images: np.ndarray, a: np.ndarray, b: np.ndarray, shown: np.ndarray) -> Layout:
    """A layout of one tile an image: (N,), (N, 2), (N, 2), (N, 2, 2)."""
    n = len(images)
    nothing = np.zeros((n, 3, 2, 2))
    return Layout(
        image=np.repeat(images[:, None], 4, 1),
        a=np.repeat(a[:, None], 4, 1).astype(float),
        b=np.repeat(b[:, None], 4, 1).astype(float),
        shown=np.concatenate([shown[:, None], nothing], 1),
        centre=np.full((n, 2), np.inf),
    )


def mosaic(store: Store, images: np.ndarray, imgsz: int, centre: np.ndarray) -> Layout:
    """Four images round a centre on a canvas of twice the size. images: (N, 4), centre: (N, 2)
    canvas pixels.
    """
    wh = store.sizes[images][..., ::-1]  # (N, 4, 2)
    a = np.repeat(imgsz / wh.max(-1, keepdims=True), 2, -1)  # (N, 4, 2)
    placed = wh * a
    after = np.array(
        [[0, 0], [1, 0], [0, 1], [1, 1]]
    )  # left above, right above, left below, right below
    b = centre[:, None] - placed * (1 - after)
    shown = np.stack([b, b + placed], -1).clip(0, 2 * imgsz)
    return Layout(images, a, b, shown, centre)


def zoom(layout: Layout, factor: np.ndarray, about: float, to: np.ndarray) -> Layout:
    """Scales each image by factor, (N,), about the point (about, about), which moves to `to`, (N,
    2).
    """
    factor = factor[:, None]
    return replace(
        layout,
        a=layout.a * factor[..., None],
        b=(layout.b - about) * factor[..., None] + to[:, None],
        shown=(layout.shown - about) * factor[..., None, None] + to[:, None, :, None],
        centre=(layout.centre - about) * factor + to,
    )


def mirror(layout: Layout, which: np.ndarray, imgsz: int) -> Layout:
    """Swaps left and right of the images named by `which`, (N,) bool."""
    a, b, shown, centre = (x.copy() for x in (layout.a, layout.b, layout.shown, layout.centre))
    a[which, :, 0] *= -1
    b[which, :, 0] = imgsz - b[which, :, 0]
    shown[which, :, 0] = imgsz - shown[which, :, 0, ::-1]
    centre[which, 0] = imgsz - centre[which, 0]
    return replace(layout, a=a, b=b, shown=shown, centre=centre)


def choose(which: np.ndarray, one: Layout, other: Layout) -> Layout:
    """`one` for the images named by `which`, (N,) bool, `other` for the rest."""

    def pick(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.where(which.reshape(-1, *(1,) * (x.ndim - 1)), x, y)

    fields = ("image", "a", "b", "shown", "centre")
    return Layout(*(pick(getattr(one, name), getattr(other, name)) for name in fields))


def render(store: Store, layout: Layout, imgsz: int) -> Tensor:
    """-> (N, 3, S, S) float32 RGB in 0..1, on the store's device. Bilinear between the centres of
    source pixels.
    """
    device = store.pixels.device
    numbers = [x.astype(np.float32) for x in (layout.a, layout.b, layout.shown, layout.centre)]
    numbers += [store.sizes[layout.image][..., ::-1], store.offsets[layout.image]]
    columns, rows = axes(imgsz, *(to_device(x, device) for x in numbers))
    colour = None if layout.colour is None else to_device(layout.colour.astype(np.float32), device)
    images = torch.empty(len(layout.image), 3, imgsz, imgsz, device=device)
    run = compiled_gather() if store.compiled else gather
    run(images.unbind(1), store.pixels, columns, rows, colour)
    return images


class Axis(NamedTuple):
    """What each column, or each row, knows of its source. It knows on which side of the centre it
    is, but not on which side the pixel is along the other axis, so it has two answers: for the
    first tile there and for the second.
    """

    second: Tensor  # (N, S) bool: right of the centre, or below it
    low: Tensor  # (N, 2, S) source pixel: a column's in its row, a row's first one in the store
    high: Tensor  # (N, 2, S) the next one
    share: Tensor  # (N, 2, S) of the pixel at `high`
    filled: Tensor  # (N, 2, S) bool: the tile reaches here


def axes(
    imgsz: int, a: Tensor, b: Tensor, shown: Tensor, centre: Tensor, wh: Tensor, offset: Tensor
) -> tuple[Axis, Axis]:
    """A Layout's numbers, sizes wh (N, 4, 2) and offsets (N, 4) of its tiles in the store ->
    columns, rows.
    """
    cells = torch.arange(imgsz, device=a.device) + 0.5  # (S,)
    source = (cells - b.unsqueeze(-1)) / a.unsqueeze(-1) - 0.5  # (N, 4, 2, S)
    last = wh.unsqueeze(-1) - 1
    source = torch.minimum(source.clamp(min=0), last)
    low = source.long()
    answers = (
        low,
        torch.minimum(low + 1, last),
        source - low,
        (shown[..., :1] <= cells) & (cells < shown[..., 1:]),
    )
    second = cells >= centre.unsqueeze(-1)  # (N, 2, S)
    right = second[:, 0] ^ (a[:, 0, :1] < 0)  # mirrored images have their left tile on the right
    below = second[:, 1]
    columns = [torch.where(right.unsqueeze(1), x[:, 1::2, 0], x[:, 0::2, 0]) for x in answers]
    starts = [
        offset.unsqueeze(-1) + row[:, :, 1] * wh[:, :, :1] for row in answers[:2]
    ]  # (N, 4, S)
    rows = [
        torch.where(below.unsqueeze(1), y[:, 2:], y[:, :2])
        for y in (*starts, *(x[:, :, 1] for x in answers[2:]))
    ]
    return Axis(right, *columns), Axis(below, *rows)


def gather(
    images: Sequence[Tensor], pixels: Tensor, columns: Axis, rows: Axis, colour: Tensor | None
) -> None:
    """Fills the planes of red, green and blue, (N, S, S) each. Planes, as a compiler then fetches a
    pixel only once.
    """
    right, below = columns.second.unsqueeze(1), rows.second.unsqueeze(2)
    x_low, x_high, share_x, filled_x = (
        torch.where(below, x[:, 1:2], x[:, :1]) for x in columns[1:]
    )
    top, bottom, share_y, filled_y = (
        torch.where(right, y[:, 1].unsqueeze(2), y[:, 0].unsqueeze(2)) for y in rows[1:]
    )
    packed = [
        pixels[index] for index in (top + x_low, top + x_high, bottom + x_low, bottom + x_high)
    ]  # (N, S, S)
    planes = []
    for shift in (0, 8, 16):
        left_above, right_above, left_below, right_below = (
            (corner >> shift & 255).float() for corner in packed
        )
        upper, lower = (
            torch.lerp(left_above, right_above, share_x),
            torch.lerp(left_below, right_below, share_x),
        )
        planes.append(
            torch.where(filled_x & filled_y, torch.lerp(upper, lower, share_y), float(PAD)) / 255
        )
    for image, plane in zip(
        images, planes if colour is None else recolour(planes, colour), strict=True
    ):
        image.copy_(plane)


@cache
def compiled_gather() -> Callable[..., None]:
    return torch.compile(gather, dynamic=False)


def recolour(planes: Sequence[Tensor], factors: Tensor) -> list[Tensor]:
    """Multiplies hue (modulo one turn), saturation and value: RGB planes (N, S, S) 0..1, (N, 3) ->
    new planes.
    """
    hue_factor, saturation_factor, value_factor = factors[..., None, None].unbind(1)  # (N, 1, 1)
    red, green, blue = planes
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    divisor = chroma.clamp(min=1e-12)
    hue = torch.where(  # in sixths of a turn
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )

    def turned(x: Tensor) -> Tensor:  # modulo 6; several times faster than torch.remainder
        return x - 6 * (x / 6).floor()

    hue = turned(hue) * hue_factor
    saturation = (chroma / value.clamp(min=1e-12) * saturation_factor).clamp(max=1)
    value = (value * value_factor).clamp(max=1)
    away = [turned(hue + start) for start in (5, 3, 1)]
    return [value * (1 - saturation * torch.minimum(x, 4 - x).clamp(0, 1)) for x in away]


def to_device(x: np.ndarray, device: torch.device) -> Tensor:
    """Without waiting for what the device still has to do: only from pinned memory is a copy
    asynchronous.
    """
    tensor = torch.from_numpy(np.ascontiguousarray(x))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
