"""From packed pixels to a batch: mosaic, scale, shift, flip and colour, or a letterbox, in one gather.

A `Layout` says, in numbers, where each image of a batch takes its pixels from: up to four tiles an
image, each with the map x_out = a * x_source + b, the same for pixels and boxes. Rotation and shear
are left out, as in the public recipe: so x depends on the column alone and y on the row alone.
Coordinates are continuous: the first pixel covers 0 to 1.
Legend: N images, S image size, 4 tiles (left/right of the centre, above/below it).
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from kdmini.data.store import Store

PAD = 114  # grey level where there is no image


@dataclass(frozen=True)
class Layout:
    """Where N rendered images take their pixels from."""

    image: np.ndarray  # (N, 4) index into the store
    a: np.ndarray  # (N, 4, 2) x, y: scale from stored pixels to rendered pixels, negative where mirrored
    b: np.ndarray  # (N, 4, 2) x, y: offset, rendered pixels
    shown: np.ndarray  # (N, 4, 2, 2) [low, high] of x, y: the part of the output that the tile fills
    centre: np.ndarray  # (N, 2) x, y: where the tiles meet; beyond the output where there is one tile
    colour: np.ndarray | None = None  # (N, 3) factors of hue, saturation and value


def letterbox(store: Store, images: np.ndarray, imgsz: int) -> Layout:
    """Each whole image in the middle of the square, as large as fits, at whole pixels. images: (N,)."""
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
    """Four images round a centre on a canvas of twice the size. images: (N, 4), centre: (N, 2) canvas pixels."""
    wh = store.sizes[images][..., ::-1]  # (N, 4, 2)
    a = np.repeat(imgsz / wh.max(-1, keepdims=True), 2, -1)  # (N, 4, 2)
    placed = wh * a
    after = np.array([[0, 0], [1, 0], [0, 1], [1, 1]])  # left above, right above, left below, right below
    b = centre[:, None] - placed * (1 - after)
    shown = np.stack([b, b + placed], -1).clip(0, 2 * imgsz)
    return Layout(images, a, b, shown, centre)


def zoom(layout: Layout, factor: np.ndarray, about: float, to: np.ndarray) -> Layout:
    """Scales each image by factor, (N,), about the point (about, about), which moves to `to`, (N, 2)."""
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
    """-> (N, 3, S, S) float32 RGB in 0..1, on the store's device. Bilinear between the centres of source pixels.

    Every output pixel asks its column for x and its row for y; the only thing that mixes the two is
    which tile it lies in, and that too is one bit of its column and one of its row.
    """
    device = store.pixels.device

    def on_device(x: np.ndarray, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(x)).to(device, dtype, non_blocking=True)

    a, b, shown = on_device(layout.a), on_device(layout.b), on_device(layout.shown)
    wh = on_device(store.sizes[layout.image][..., ::-1], torch.int64)  # (N, 4, 2)
    offset = on_device(store.offsets[layout.image], torch.int64)  # (N, 4)
    cells = torch.arange(imgsz, device=device) + 0.5  # (S,)

    source = (cells - b.unsqueeze(-1)) / a.unsqueeze(-1) - 0.5  # (N, 4, 2, S)
    last = wh.unsqueeze(-1) - 1
    source = torch.minimum(source.clamp(min=0), last)
    low = source.long()
    high = torch.minimum(low + 1, last)
    share = source - low  # of the pixel at `high`
    filled = (shown[..., :1] <= cells) & (cells < shown[..., 1:])  # (N, 4, 2, S)
    second = cells >= on_device(layout.centre).unsqueeze(-1)  # (N, 2, S) right of or below the centre
    right = second[:, 0] ^ (a[:, 0, :1] < 0)  # (N, S) of the columns; mirrored images have their left tile on the right
    below = second[:, 1]  # (N, S) of the rows

    def of_column(x: Tensor) -> Tensor:  # (N, 4, S) by tile and column -> (N, S, S)
        by_column = torch.where(right.unsqueeze(1), x[:, 1::2], x[:, 0::2])  # (N, 2, S)
        return torch.where(below.unsqueeze(2), by_column[:, 1].unsqueeze(1), by_column[:, 0].unsqueeze(1))

    def of_row(y: Tensor) -> Tensor:  # (N, 4, S) by tile and row -> (N, S, S)
        by_row = torch.where(below.unsqueeze(1), y[:, 2:], y[:, :2])  # (N, 2, S)
        return torch.where(right.unsqueeze(1), by_row[:, 1].unsqueeze(2), by_row[:, 0].unsqueeze(2))

    x_low, x_high = of_column(low[:, :, 0]), of_column(high[:, :, 0])
    rows = offset.unsqueeze(-1) + torch.stack([low[:, :, 1], high[:, :, 1]]) * wh[:, :, :1]  # (2, N, 4, S)
    top, bottom = of_row(rows[0]), of_row(rows[1])
    share_x, share_y = of_column(share[:, :, 0]).unsqueeze(1), of_row(share[:, :, 1]).unsqueeze(1)  # (N, 1, S, S)

    def rgb(index: Tensor) -> Tensor:  # (N, S, S) -> (N, 3, S, S) 0..255
        packed = store.pixels[index]
        return torch.stack([packed & 255, packed >> 8 & 255, packed >> 16], 1).float()

    upper = torch.lerp(rgb(top + x_low), rgb(top + x_high), share_x)
    lower = torch.lerp(rgb(bottom + x_low), rgb(bottom + x_high), share_x)
    inside = (of_column(filled[:, :, 0]) & of_row(filled[:, :, 1])).unsqueeze(1)
    images = torch.where(inside, torch.lerp(upper, lower, share_y), float(PAD)) / 255
    return images if layout.colour is None else recolour(images, on_device(layout.colour))


def recolour(images: Tensor, factors: Tensor) -> Tensor:
    """Multiplies hue (modulo one turn), saturation and value: (N, 3, S, S) RGB 0..1, (N, 3) -> same as images."""
    hue_factor, saturation_factor, value_factor = factors[..., None, None].unbind(1)  # (N, 1, 1)
    red, green, blue = images.unbind(1)
    value, chroma = images.amax(1), images.amax(1) - images.amin(1)
    divisor = chroma.clamp(min=1e-12)
    hue = torch.where(  # in sixths of a turn
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    hue = torch.remainder(hue, 6) * hue_factor
    saturation = (chroma / value.clamp(min=1e-12) * saturation_factor).clamp(max=1)
    value = (value * value_factor).clamp(max=1)
    place = torch.remainder(torch.stack([hue + 5, hue + 3, hue + 1], 1), 6)  # (N, 3, S, S)
    return (value * (1 - saturation * torch.minimum(place, 4 - place).clamp(0, 1).transpose(0, 1))).transpose(0, 1)


MIN_SIDE, MAX_ASPECT, MIN_AREA = 2.0, 100.0, 0.1  # what must be left of a box: pixels, ratio, share of its area


def render_boxes(store: Store, layout: Layout, imgsz: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """-> per image boxes_xyxy (G, 4) float32 in rendered pixels and labels (G,); difficult objects are left out.

    A box stays if what the picture shows of it has sides over 2 pixels, an aspect under 100 and more
    than a tenth of its area (of the part on the mosaic's canvas, as in the public recipe).
    """
    rendered = []
    for n, images in enumerate(layout.image):
        boxes, labels = [np.empty((0, 4))], [np.empty(0, np.int64)]
        for tile in range(4 if np.isfinite(layout.centre[n, 0]) else 1):
            image = images[tile]
            target = store.targets[image]
            keep = ~target["difficult"]
            corners = target["boxes_xyxy"][keep].reshape(-1, 2, 2).astype(float)  # (G, corner, xy)
            corners *= (store.sizes[image] / store.native[image])[::-1]
            corners = np.sort(corners * layout.a[n, tile] + layout.b[n, tile], 1)  # sorted: mirrored ones swap
            low, high = layout.shown[n, tile].T
            whole = corners.clip(low, high)
            seen = whole.clip(0, imgsz)
            boxes.append(seen.reshape(-1, 4)[remains(whole, seen)])
            labels.append(target["labels"][keep][remains(whole, seen)])
        rendered.append((np.concatenate(boxes).astype(np.float32), np.concatenate(labels)))
    return rendered


def remains(whole: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """(G, corner, xy) before and after clipping to the picture -> (G,) bool."""
    sides, whole_sides = seen[:, 1] - seen[:, 0], whole[:, 1] - whole[:, 0]  # (G, 2)
    aspect = sides.max(1) / np.maximum(sides.min(1), 1e-9)
    area = sides.prod(1) / np.maximum(whole_sides.prod(1), 1e-9)
    return (sides.min(1) > MIN_SIDE) & (aspect < MAX_ASPECT) & (area > MIN_AREA)
