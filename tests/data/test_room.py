"""The bound on what all threads decode at one time."""

import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image

from kdmini.data import pictures
from kdmini.data import store as store_module
from kdmini.data.pictures import decode
from kdmini.data.room import BYTES_PER_PIXEL, Room
from kdmini.data.store import Store, picture_of
from kdmini.detection.voc import VOC
from tests.data.voc_folder import add, write_split


def most_held(sizes, most, workers=4):
    """The largest sum of bytes that threads held at one time, each with an image of so many
    pixels for a moment.
    """
    room = Room(most)
    peaks = []

    def hold(pixels):
        with room.one_image():
            room.take(pixels)
            peaks.append(room.held)
            time.sleep(0.01)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(hold, sizes))
    assert room.held == 0
    return max(peaks) / BYTES_PER_PIXEL


def test_threads_together_hold_no_more_than_the_bound():
    bound = 100 * BYTES_PER_PIXEL
    assert most_held([50] * 12, bound) == 100
    assert most_held([50] * 12, 10 * bound) == 200  # of four threads
    assert most_held([30, 60, 10, 90, 100, 5] * 3, bound) <= 100


def test_an_image_above_the_bound_is_decoded_alone():
    assert most_held([500, 1, 500, 1, 1], 100 * BYTES_PER_PIXEL) == 500


def test_a_thread_that_holds_an_image_does_not_wait_for_itself():
    room = Room(10 * BYTES_PER_PIXEL)
    with room.one_image():
        room.take(8)
        room.take(8)
    assert room.held == 0


def test_room_is_given_back_after_an_error():
    room = Room()
    with pytest.raises(ValueError), room.one_image():
        room.take(8)
        raise ValueError
    assert room.held == 0


def test_what_nobody_would_give_back_is_not_counted(tmp_path, monkeypatch):
    room = Room()
    monkeypatch.setattr(pictures, "ROOM", room)
    Image.new("RGB", (4, 3)).save(tmp_path / "a.png")
    decode(tmp_path / "a.png")
    assert room.held == 0


@pytest.fixture
def photographs(tmp_path):
    rng = np.random.default_rng(0)
    names = [str(number) for number in range(12)]
    for number, name in enumerate(names):
        add(tmp_path / "set", name, ending=".png")
        size = (40 + 9 * number, 60, 3)
        noise = Image.fromarray(rng.integers(0, 256, size, np.uint8))
        noise.save(tmp_path / "set" / "JPEGImages" / f"{name}.png")
    write_split(tmp_path / "set", "train", *names)
    return tmp_path / "set"


@pytest.mark.parametrize("most", [1, 90 * 60 * BYTES_PER_PIXEL, 2**40])
@pytest.mark.parametrize("workers", [1, 4])
def test_a_store_is_the_same_to_the_bit_whatever_the_bound(photographs, monkeypatch, most, workers):
    def store():
        dataset = VOC(str(photographs), ["train"], as_stored=True)
        return Store(dataset, 64, workers=workers, storage="resident")

    expected = store()
    room = Watched(most)
    monkeypatch.setattr(pictures, "ROOM", room)
    monkeypatch.setattr(store_module, "ROOM", room)
    bounded = store()
    assert bounded.pixels.numpy().tobytes() == expected.pixels.numpy().tobytes()
    assert bounded.digests == expected.digests
    assert room.takes == 12 + 2  # two to see how large they are
    assert room.held == 0
    largest = 139 * 60 * BYTES_PER_PIXEL
    assert largest <= room.peak <= max(most, largest)


def test_room_is_given_back_when_nothing_of_full_size_is_left(monkeypatch):
    seen = []
    left = []

    class Noted(np.ndarray):
        """An array that can be referred to weakly."""

    class Images:
        def __getitem__(self, index):
            pixels = np.zeros((50, 40, 3), np.uint8).view(Noted)
            seen.append(weakref.ref(pixels))
            return pixels, {"cls": np.zeros(0, np.int64)}

    class GivingBack(Room):
        @contextmanager
        def one_image(self):
            with super().one_image():
                yield
                left.append(sum(pixels() is not None for pixels in seen))

    monkeypatch.setattr(store_module, "ROOM", GivingBack())
    picture = picture_of(Images(), 0, 20, training=False)
    assert picture.size == (20, 16)
    assert len(seen) == 1
    assert left == [0]


class Watched(Room):
    """Notes the most that was held, until the picture is reduced."""

    def __init__(self, most: int):
        super().__init__(most)
        self.takes = 0
        self.peak = 0
        self.lock = threading.Lock()

    def take(self, pixels: int) -> None:
        super().take(pixels)
        with self.lock:
            self.takes += 1
            self.peak = max(self.peak, self.held)
