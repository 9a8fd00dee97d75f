"""Tiles packed for a card: the same pixels, at other places; a batch ahead, in a thread."""

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from kdmini.data import tiles as tiles_module
from kdmini.data.layout import letterbox, mirror
from kdmini.data.loader import Augment, TrainLoader, ValLoader
from kdmini.data.render import render
from kdmini.data.store import Store
from kdmini.data.tiles import pack_tiles, tiles_of, with_tiles
from tests.data.arrays import Pictures, keep, noise, random_mosaics, zoomed_mosaic

SIZES = [(48, 48), (31, 47), (48, 17), (10, 13), (1, 48), (48, 1), (5, 30), (29, 20)]
OTHER = torch.device("meta")  # is no host either, as a card


@pytest.fixture(scope="module")
def store():
    return keep(noise(SIZES), 48)


@pytest.fixture
def far(store, monkeypatch):
    """The store, whose batches go elsewhere than its pixels lie."""
    monkeypatch.setattr(store, "device", OTHER)
    return store


def mosaics(store, size=40):
    drawn = random_mosaics(24, len(store), size, seed=1)
    return mirror(zoomed_mosaic(store, drawn, size), drawn.mirrored, size)


LAYOUTS = {
    "mosaic": mosaics,
    "letterbox": lambda store: letterbox(store, np.arange(len(store)), 40),
    "repeated": lambda store: letterbox(store, np.array([5, 2, 5, 5, 2]), 40),
    "one": lambda store: letterbox(store, np.array([7]), 40),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_is_packed_renders_to_the_same_bits(store, name):
    layout = LAYOUTS[name](store)
    layout = replace(layout, colour=np.full((len(layout.image), 3), 1.1))
    packed = pack_tiles(store, layout)
    direct = tiles_of(store, layout)
    assert direct.pixels is store.pixels
    assert torch.equal(render(store, layout, 40, packed), render(store, layout, 40, direct))


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_image_is_packed_once_and_no_other(store, name):
    layout = LAYOUTS[name](store)
    packed = pack_tiles(store, layout)
    images = np.unique(layout.image)
    counts = store.sizes[images].prod(1)
    assert len(packed.pixels) == counts.sum()
    assert packed.offset.shape == layout.image.shape
    assert packed.offset.dtype == np.int64
    assert packed.offset.min() == 0
    assert len(np.unique(packed.offset)) == len(images)
    for image, offset in zip(layout.image.flat, packed.offset.flat, strict=True):
        count = store.sizes[image].prod()
        first = store.offsets[image]
        there = packed.pixels[offset : offset + count]
        assert torch.equal(there, store.pixels[first : first + count])


@pytest.mark.parametrize(("device", "pinned"), [("cuda", True), ("cpu", False)])
def test_memory_is_pinned_for_a_card_alone(store, monkeypatch, device, pinned):
    asked = []
    empty = torch.empty

    def unpinned(*size, pin_memory, **how):
        asked.append(pin_memory)
        return empty(*size, **how)

    monkeypatch.setattr(store, "device", torch.device(device))
    monkeypatch.setattr(tiles_module.torch, "empty", unpinned)
    pack_tiles(store, letterbox(store, np.arange(3), 40))
    assert asked == [pinned]


# --- a batch ahead


def layouts_of(store, count=5):
    return [letterbox(store, np.arange(n, n + 3), 40) for n in range(count)]


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("tiles")]


def test_pixels_that_lie_where_they_are_needed_are_not_packed(store):
    layouts = layouts_of(store)
    for (layout, tiles), same in zip(with_tiles(store, layouts), layouts, strict=True):
        assert layout is same
        assert tiles.pixels is store.pixels
        assert not threads()


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_each_layout_comes_with_its_own_tiles(far, count):
    layouts = layouts_of(far, count)
    found = list(with_tiles(far, layouts))
    assert [layout for layout, _ in found] == layouts
    for layout, tiles in found:
        expected = pack_tiles(far, layout)
        assert torch.equal(tiles.pixels, expected.pixels)
        assert np.array_equal(tiles.offset, expected.offset)
    assert not threads()


def test_the_next_is_packed_while_a_batch_is_used(far, monkeypatch):
    packed = [threading.Event() for _ in range(4)]
    by = []

    def noted(store, layout):
        by.append(threading.current_thread().name)
        packed[layout.image[0, 0]].set()
        return pack_tiles(store, layout)

    monkeypatch.setattr(tiles_module, "tiles_of", noted)
    asked = []

    def layouts():
        for layout in layouts_of(far, 4):
            asked.append(layout)
            yield layout

    for number, _ in enumerate(with_tiles(far, layouts())):
        ahead = min(number + 2, 4)
        assert all(event.wait(10) for event in packed[:ahead])
        assert len(asked) == ahead  # and no more: two batches wait at most
    assert set(by) == {"tiles_0"}


def test_what_goes_wrong_in_the_thread_surfaces_in_the_loop(far, monkeypatch):
    def torn(store, layout):
        if layout.image[0, 0] == 2:
            raise OSError("the disk is gone")
        return pack_tiles(store, layout)

    monkeypatch.setattr(tiles_module, "tiles_of", torn)
    seen = 0
    with pytest.raises(OSError, match="the disk is gone"):
        for _ in with_tiles(far, layouts_of(far)):
            seen += 1
    assert seen == 2
    assert not threads()


class Watched:
    """In the place of the truth: an epoch is left within."""

    def __init__(self, store):
        pass

    def rendered(self, layout, plane):
        return {}


@pytest.mark.parametrize("kind", ["train", "val"])
def test_an_epoch_that_is_left_early_leaves_no_thread(tmp_path, monkeypatch, kind):
    monkeypatch.setenv("KDMINI_CACHE", str(tmp_path))
    monkeypatch.setattr("kdmini.data.loader.render_labelled", lambda *_: (torch.empty(0), None))
    store = Store(Pictures(noise([(8, 8)] * 24)), 32, OTHER, storage="mapped")
    loader = TrainLoader(store, 4, 1, Augment()) if kind == "train" else ValLoader(store, 4)
    epoch = loader.epoch(0) if kind == "train" else iter(loader)
    for _ in epoch:
        assert threads()
        break
    epoch.close()
    assert not threads()


def test_batches_of_the_loaders_are_of_these_tiles(tmp_path, monkeypatch):
    """Bit for bit, though packed in a thread."""
    monkeypatch.setenv("KDMINI_CACHE", str(tmp_path))
    rendered = []

    def on_host(store, layout, imgsz, tiles):
        monkeypatch.setattr(store, "device", torch.device("cpu"))
        rendered.append(render(store, layout, imgsz, tiles))
        monkeypatch.setattr(store, "device", OTHER)
        return rendered[-1], None

    pictures = Pictures(noise(SIZES * 3))
    near = Store(pictures, 48)
    expected = [images for images, _ in TrainLoader(near, 4, 20, Augment(), 3).epoch(1)]
    expected += [images for images, _, _ in ValLoader(near, 5)]
    monkeypatch.setattr("kdmini.data.loader.render_labelled", on_host)
    store = Store(pictures, 48, OTHER, storage="mapped")
    for _ in TrainLoader(store, 4, 20, Augment(), 3).epoch(1):
        pass
    for _ in ValLoader(store, 5):
        pass
    assert len(rendered) == len(expected) == 6 + 5
    for images, same in zip(rendered, expected, strict=True):
        assert torch.equal(images, same)
