"""Where pixels stay: the buffer that grows, the file, and which of the two `auto` is."""

import weakref

import numpy as np
import pytest
import torch

from kdmini.contracts import BadObjects, UserError
from kdmini.data import storage, store
from kdmini.data.storage import address, choose, mapped, resident, scratch_file
from kdmini.data.store import Store, expected_bytes
from tests.data.arrays import Pictures, noise

CPU = torch.device("cpu")
CARD = torch.device("cuda", 0)
GB = 10**9


def parts_of(*lengths):
    """Consecutive numbers."""
    ends = np.cumsum(lengths)
    return [np.arange(end - n, end, dtype=np.int32) for n, end in zip(lengths, ends, strict=True)]


# --- a buffer that is filled as pictures come


@pytest.mark.parametrize("expected", [0, 4, 399, 400, 4000])
def test_whatever_was_expected_the_pixels_are_the_same(expected):
    parts = parts_of(1, 0, 30, 60, 9)
    pixels = resident(iter(parts), expected, CPU)
    assert pixels.dtype == torch.int32
    assert pixels.tolist() == list(range(100))


def rooms(monkeypatch, parts, expected):
    """The sizes of the buffers that are made on the way."""
    made = []
    empty = torch.empty
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch, "empty", lambda n, **how: made.append(n) or empty(n, **how))
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda self, n: made.append(n) or new_empty(self, n)
    )
    resident(iter(parts), expected, CPU)
    return made


def test_a_buffer_that_is_large_enough_is_made_once(monkeypatch):
    assert rooms(monkeypatch, parts_of(*[10] * 100), 4 * 1000) == [1050]
    assert rooms(monkeypatch, parts_of(*[10] * 105), 4 * 1000) == [1050]


def test_one_that_is_too_small_grows_by_a_tenth_or_what_is_needed(monkeypatch):
    assert rooms(monkeypatch, parts_of(*[10] * 106), 4 * 1000) == [1050, 1155]
    assert rooms(monkeypatch, parts_of(1000, 1000), 4 * 1000) == [1050, 2000]


def test_the_set_is_not_held_beside_its_buffer(monkeypatch):
    """Of 64 pictures only those that threads are ahead."""
    alive = weakref.WeakSet()
    most = 0

    class Watched(np.ndarray):
        pass

    def pack(image, labels):
        nonlocal most
        pixels = np.zeros(image.shape[0] * image.shape[1], np.int32).view(Watched)
        alive.add(pixels)
        most = max(most, len(alive))
        return pixels

    Watched.__hash__ = lambda self: id(self)
    Watched.__eq__ = lambda self, other: self is other
    monkeypatch.setattr(store, "pack", pack)
    monkeypatch.setattr(store, "digest", lambda *parts: "")
    monkeypatch.setattr(store, "PORTION", 4)
    monkeypatch.setattr(store, "expected_bytes", lambda *settings: 64 * 64)
    held = Store(Pictures(noise([(4, 4)] * 64)), 32, workers=1, storage="resident")
    assert len(held.pixels) == 64 * 16
    assert most <= 6


# --- a scratch file


def test_the_file_is_found_by_its_address_as_long_as_it_is_open(tmp_path, monkeypatch):
    monkeypatch.setenv("KDMINI_CACHE", str(tmp_path))
    with scratch_file(iter(parts_of(3, 4))) as file:
        one = mapped(file)
        other = mapped(address(file))
    assert list(tmp_path.iterdir()) == []
    assert one.tolist() == other.tolist() == list(range(7))
    other[2] = 99  # it is one memory
    assert one[2] == 99


# --- an estimate


class Asked(Pictures):
    """Notes which images are asked for."""

    def __init__(self, images):
        super().__init__(images)
        self.asked = []

    def __getitem__(self, index):
        self.asked.append(index)
        return super().__getitem__(index)


@pytest.mark.parametrize(
    ("images", "asked"), [(1, 1), (8, 1), (9, 2), (40, 5), (128, 16), (400, 16)]
)
def test_bytes_are_estimated_from_a_few_images_evenly_spread(images, asked):
    # sorted by size, as a set may be: the first ones would mislead
    dataset = Asked(noise([(4, 9 + 40 * n // images) for n in range(images)]))
    true = sum(4 * image[..., 0].size for image in dataset.images)
    expected = expected_bytes(dataset, range(images), 64, workers=1)
    assert len(dataset.asked) == len(set(dataset.asked)) == asked
    if asked > 1:
        assert expected == pytest.approx(true, rel=0.05)


def test_the_estimate_is_of_the_images_that_are_kept_reduced_as_they_are():
    dataset = Asked(noise([(40, 80)] * 60))
    kept = list(range(10, 50))
    assert expected_bytes(dataset, kept, 20, workers=1) == 40 * 10 * 20 * 4
    assert dataset.asked == [10, 19, 29, 39, 49]


def test_images_that_cannot_be_used_are_not_in_the_estimate():
    images = noise([(4, 8)] * 40)
    images[0] = UserError("bad")
    images[39] = BadObjects(["one"], (images[39], {"id": "the rest"}))
    assert expected_bytes(Pictures(images), range(40), 20, workers=1) == 40 * 4 * 8 * 4
    assert expected_bytes(Pictures([UserError("bad")]), [0], 20, workers=1) == 0
    assert expected_bytes(Pictures([]), [], 20, workers=1) == 0


# --- auto


@pytest.mark.parametrize(
    ("device", "step", "gigabytes", "expected"),
    [
        (CPU, None, 9.9, "resident"),  # half of 20
        (CPU, None, 10.1, "mapped"),
        (CARD, None, 9.9, "resident"),  # nothing is trained
        (CARD, None, 10.1, "mapped"),
        (CARD, 0, 17.9, "resident"),
        (CARD, 0, 18.1, "mapped"),
        (CARD, 15 * GB, 2.9, "resident"),  # beside a step
        (CARD, 15 * GB, 3.1, "mapped"),
        (CARD, 30 * GB, 0.1, "mapped"),
    ],
)
def test_auto_is_resident_where_all_fits(monkeypatch, device, step, gigabytes, expected):
    monkeypatch.setattr(storage, "free_bytes", lambda device: 20 * GB)
    assert choose(int(gigabytes * GB), device, step) == expected
