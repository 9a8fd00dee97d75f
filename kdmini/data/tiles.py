"""The pixels that a batch takes: where they lie, or packed together for a card.

Legend: N images, 4 tiles.
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kdmini.data.layout import Layout
from kdmini.data.store import Store


class Tiles(NamedTuple):
    """Packed pixels, among them those of the tiles of a Layout."""

    pixels: Tensor  # (P,) int32
    offset: np.ndarray  # (N, 4) int64, place of each tile's first pixel


def is_in_place(store: Store) -> bool:
    """Whether its pixels lie on the device to which its batches go."""
    return store.pixels.device.type == store.device.type


def tiles_of(store: Store, layout: Layout) -> Tiles:
    """The pixels of the store itself, where they are in place."""
    if is_in_place(store):
        return Tiles(store.pixels, store.offsets[layout.image])
    return pack_tiles(store, layout)


def pack_tiles(store: Store, layout: Layout) -> Tiles:
    """A copy of the images that the layout shows, each once; for a card in pinned memory, from
    which it copies while the host goes on.
    """
    images, position = np.unique(layout.image, return_inverse=True)
    first = store.offsets[images]
    sizes = store.sizes[images].prod(1, dtype=np.int64)
    ends = sizes.cumsum()
    pinned = store.device.type == "cuda"
    pixels = torch.empty(int(ends[-1]), dtype=torch.int32, pin_memory=pinned)
    parts = [store.pixels[start:end] for start, end in zip(first, first + sizes, strict=True)]
    torch.cat(parts, out=pixels)
    return Tiles(pixels, (ends - sizes)[position].reshape(layout.image.shape))


def with_tiles(store: Store, layouts: Iterable[Layout]) -> Iterator[tuple[Layout, Tiles]]:
    """Each layout with its tiles. What has to be packed is packed by a thread, which is a layout
    ahead: while the device works on one batch, the next is read.
    """
    find = partial(tiles_of, store)
    if is_in_place(store):
        yield from ((layout, find(layout)) for layout in layouts)
        return
    before: tuple[Layout, Future[Tiles]] | None = None
    with ThreadPoolExecutor(1, "tiles") as thread:
        for layout in layouts:
            packed = thread.submit(find, layout)
            if before:
                yield before[0], before[1].result()
            before = layout, packed
        if before:
            yield before[0], before[1].result()
