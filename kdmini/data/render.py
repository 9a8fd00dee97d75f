"""From packed pixels to a batch: a Layout's mosaic, scale, shift, flip and colour, or its
letterbox, in one gather.

Legend: N images, S image size, 4 tiles (outside/inside an interval of columns, of rows).
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kdmini.data.layout import Layout
from kdmini.data.store import Store
from kdmini.data.tiles import Tiles, tiles_of

PAD = 114  # grey level where there is no image
NO_LABEL = 255  # of a pixel there


def render(store: Store, layout: Layout, imgsz: int, tiles: Tiles | None = None) -> Tensor:
    """-> (N, 3, S, S) float32 RGB in 0..1, on the store's device. Bilinear between the
    centres of source pixels.

    tiles: of the layout, if they have been found already.
    """
    images, _ = render_labelled(store, layout, imgsz, tiles)
    return images


def render_labelled(
    store: Store, layout: Layout, imgsz: int, tiles: Tiles | None = None
) -> tuple[Tensor, Tensor | None]:
    """-> images as `render` makes them, and the labels of their pixels (N, S, S) uint8, each of
    the nearest source pixel, NO_LABEL where there is no image; None where the store has none.
    """
    tiles = tiles or tiles_of(store, layout)
    device = store.device
    pixels = tiles.pixels.to(device, non_blocking=True)
    if store.compiled and pixels is not store.pixels:
        torch._dynamo.mark_dynamic(pixels, 0)  # else every length would be compiled anew

    def numbers(x: np.ndarray) -> Tensor:
        return to_device(x.astype(np.float32), device)

    columns, rows = axes(
        imgsz,
        numbers(layout.a),
        numbers(layout.b),
        numbers(layout.shown),
        numbers(layout.second),
        wh=to_device(store.sizes[layout.image][..., ::-1], device),
        offset=to_device(tiles.offset, device),
    )
    colour = None if layout.colour is None else numbers(layout.colour)
    images = torch.empty(len(layout.image), 3, imgsz, imgsz, device=device)
    labels = None
    if store.labelled:
        labels = torch.empty(images[:, 0].shape, dtype=torch.uint8, device=device)
    fill = compiled_gather() if store.compiled else gather
    fill(images.unbind(1), pixels, columns, rows, colour, labels)
    if layout.under is not None and layout.share is not None:
        share = numbers(layout.share)[:, None, None, None]
        images.lerp_(render(store, layout.under, imgsz), share)
    return images, labels


class Axis(NamedTuple):
    """What each column, or each row, knows of its source. It knows in which of two tiles it
    is, but not in which the pixel is along the other axis, so it has two answers: for the first
    tile there and for the second.
    """

    second: Tensor  # (N, S) bool: in the interval, as right of the centre of a mosaic
    # (N, 2, S) where the source is: of a column, its pixel's place in the row; of a row, its
    # first pixel's place in the store
    low: Tensor
    high: Tensor  # (N, 2, S) the next one
    share: Tensor  # (N, 2, S) of the pixel at `high`
    filled: Tensor  # (N, 2, S) bool: the tile reaches here


def axes(
    imgsz: int, a: Tensor, b: Tensor, shown: Tensor, interval: Tensor, wh: Tensor, offset: Tensor
) -> tuple[Axis, Axis]:
    """A Layout's numbers, sizes wh (N, 4, 2) and offsets (N, 4) of its tiles in the store
    -> columns, rows.
    """
    cells = torch.arange(imgsz, device=a.device) + 0.5  # (S,)
    source = (cells - b.unsqueeze(-1)) / a.unsqueeze(-1) - 0.5  # (N, 4, 2, S)
    last = wh.unsqueeze(-1) - 1
    source = torch.minimum(source.clamp(min=0), last)
    low = source.long()
    high = torch.minimum(low + 1, last)
    share = source - low
    filled = (shown[..., :1] <= cells) & (cells < shown[..., 1:])

    second = (interval[..., :1] <= cells) & (cells < interval[..., 1:])  # (N, 2, S)
    right = second[:, 0]
    below = second[:, 1]

    def of_columns(x: Tensor) -> Tensor:
        """(N, 4, 2, S) -> (N, 2, S): of the tile above and of the one below."""
        return torch.where(right.unsqueeze(1), x[:, 1::2, 0], x[:, 0::2, 0])

    def of_rows(y: Tensor) -> Tensor:
        """(N, 4, S) -> (N, 2, S): of the left tile and of the right one."""
        return torch.where(below.unsqueeze(1), y[:, 2:], y[:, :2])

    def in_store(row: Tensor) -> Tensor:
        """Rows (N, 4, 2, S) -> the number in the store of their first pixel, (N, 4, S)."""
        return offset.unsqueeze(-1) + row[:, :, 1] * wh[:, :, :1]

    columns = Axis(right, of_columns(low), of_columns(high), of_columns(share), of_columns(filled))
    rows = Axis(
        below,
        of_rows(in_store(low)),
        of_rows(in_store(high)),
        of_rows(share[:, :, 1]),
        of_rows(filled[:, :, 1]),
    )
    return columns, rows


def gather(
    images: Sequence[Tensor],
    pixels: Tensor,
    columns: Axis,
    rows: Axis,
    colour: Tensor | None,
    labels: Tensor | None = None,
) -> None:
    """Fills the planes of red, green and blue, (N, S, S) each, and that of the labels where
    one is wanted. Planes, as a compiler then fetches a pixel only once.
    """
    second_column = columns.second.unsqueeze(1)
    second_row = rows.second.unsqueeze(2)

    def at_column(x: Tensor) -> Tensor:
        """(N, 2, S) -> (N, S, S): each pixel takes the answer of its row's side."""
        return torch.where(second_row, x[:, 1:2], x[:, :1])

    def at_row(y: Tensor) -> Tensor:
        """(N, 2, S) -> (N, S, S): each pixel takes the answer of its column's side."""
        return torch.where(second_column, y[:, 1].unsqueeze(2), y[:, 0].unsqueeze(2))

    left_x = at_column(columns.low)
    right_x = at_column(columns.high)
    share_x = at_column(columns.share)
    top = at_row(rows.low)
    bottom = at_row(rows.high)
    share_y = at_row(rows.share)
    filled = at_column(columns.filled) & at_row(rows.filled)

    left_above = pixels[top + left_x]  # (N, S, S) packed, as are the three others
    right_above = pixels[top + right_x]
    left_below = pixels[bottom + left_x]
    right_below = pixels[bottom + right_x]
    if labels is not None:
        above = torch.where(share_x < 0.5, left_above, right_above)
        below = torch.where(share_x < 0.5, left_below, right_below)
        nearest = torch.where(share_y < 0.5, above, below)
        labels.copy_(torch.where(filled, nearest >> 24 & 255, NO_LABEL))
    planes = []
    for shift in (0, 8, 16):
        upper = torch.lerp(byte(left_above, shift), byte(right_above, shift), share_x)
        lower = torch.lerp(byte(left_below, shift), byte(right_below, shift), share_x)
        level = torch.where(filled, torch.lerp(upper, lower, share_y), float(PAD))
        planes.append(level / 255)
    if colour is not None:
        planes = recolour(planes, colour)
    for image, plane in zip(images, planes, strict=True):
        image.copy_(plane)


def byte(packed: Tensor, shift: int) -> Tensor:
    return (packed >> shift & 255).float()


@cache
def compiled_gather() -> Callable[..., None]:
    return torch.compile(gather, dynamic=False)


def recolour(planes: Sequence[Tensor], factors: Tensor) -> list[Tensor]:
    """Multiplies hue (modulo one turn), saturation and value: RGB planes (N, S, S) 0..1,
    (N, 3) -> new planes.
    """
    hue_factor, saturation_factor, value_factor = factors[..., None, None].unbind(1)  # (N, 1, 1)
    red, green, blue = planes
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    divisor = chroma.clamp(min=1e-12)
    from_green = 2 + (blue - red) / divisor
    from_blue = 4 + (red - green) / divisor
    other = torch.where(value == green, from_green, from_blue)
    hue = torch.where(value == red, (green - blue) / divisor, other)  # in sixths of a turn

    hue = turned(hue) * hue_factor
    saturation = (chroma / value.clamp(min=1e-12) * saturation_factor).clamp(max=1)
    value = (value * value_factor).clamp(max=1)
    recoloured = []
    for start in (5, 3, 1):  # red, green, blue
        away = turned(hue + start)
        missing = torch.minimum(away, 4 - away).clamp(0, 1)
        recoloured.append(value * (1 - saturation * missing))
    return recoloured


def turned(sixths: Tensor) -> Tensor:
    """Modulo a turn, 6; several times faster than torch.remainder."""
    return sixths - 6 * (sixths / 6).floor()


def to_device(x: np.ndarray, device: torch.device) -> Tensor:
    """Without waiting for what the device still has to do: only from pinned memory is a copy
    asynchronous.
    """
    tensor = torch.from_numpy(np.ascontiguousarray(x))
    if device.type != "cuda":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
