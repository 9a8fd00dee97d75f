"""The store: what is kept of each picture, and what happens where that fails."""

import pickle
import re
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from kdmini.contracts import BadObjects, UserError
from kdmini.data import storage as storage_module
from kdmini.data import store as store_module
from kdmini.data.layout import letterbox
from kdmini.data.pictures import pack, shrink
from kdmini.data.render import render
from kdmini.data.store import Store, subset
from kdmini.detection.voc import VOC
from tests.data.arrays import Pictures, noise
from tests.data.voc_folder import add, write_split


def unpack(packed):
    """Packed pixels -> (..., 3) uint8, by arithmetic on the integers."""
    packed = packed.astype(np.int64)
    return np.stack([packed % 256, packed // 256 % 256, packed // 65536], -1)


def unpacked(store, index):
    """The stored picture as (H, W, 3) uint8."""
    height, width = store.sizes[index]
    start = store.offsets[index]
    packed = store.pixels[start : start + height * width].numpy()
    return unpack(packed.reshape(height, width))


def ids(store):
    return [target["id"] for target in store.targets]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The folder of scratch files; it is not there before one is needed."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("KDMINI_CACHE", str(folder))
    return folder


def nothing_in(folder):
    return not folder.exists() or list(folder.iterdir()) == []


# --- what is kept, and where


@pytest.mark.parametrize("storage", ["resident", "mapped"])
def test_every_picture_comes_back_as_it_was(cache, storage):
    sizes = [(5, 7), (1, 1), (32, 3), (2, 32)]
    images = noise(sizes)
    store = Store(Pictures(images), 32, storage=storage, workers=3)
    assert store.pixels.dtype == torch.int32
    assert len(store.pixels) == 35 + 1 + 96 + 64
    for index, image in enumerate(images):
        assert np.array_equal(unpacked(store, index), image)
    assert store.offsets.dtype == np.int64
    assert store.offsets.tolist() == [0, 35, 36, 132]
    assert store.sizes.tolist() == [list(size) for size in sizes]
    assert store.native.tolist() == store.sizes.tolist()
    assert ids(store) == [f"picture {i}" for i in range(4)]


def test_resident_and_mapped_hold_the_same_bytes(cache):
    images = noise([(40, 70), (64, 64), (9, 33), (100, 20)])
    resident = Store(Pictures(images), 64, storage="resident")
    mapped = Store(Pictures(images), 64, storage="mapped")
    assert resident.pixels.numpy().tobytes() == mapped.pixels.numpy().tobytes()
    assert (resident.sizes == mapped.sizes).all()
    assert (resident.offsets == mapped.offsets).all()


def test_pack_reads_what_is_not_contiguous_too():
    (image,) = noise([(6, 10)])
    for view in (image[:, ::-1], image[::2, 1:8], image.transpose(1, 0, 2)):
        assert np.array_equal(pack(view), pack(view.copy()))


# --- offsets beyond int32


def test_offsets_beyond_two_to_the_31_are_gathered_from(tmp_path):
    store = Store(Pictures(noise([(32, 32)] * 2)), 32, storage="resident")
    far = 2**31 + 7
    second = store.pixels[1024:].numpy()
    # holes take no room on the disk
    pixels = np.memmap(tmp_path / "sparse", np.int32, "w+", shape=far + 1024)
    pixels[far:] = second
    store.pixels = torch.from_numpy(pixels)
    store.offsets[1] = far

    picture = render(store, letterbox(store, np.array([1]), 32), 32)[0].permute(1, 2, 0)
    expected = unpack(second).reshape(32, 32, 3)
    assert np.array_equal((picture.numpy() * 255).round(), expected)


def test_offsets_do_not_wrap_at_two_to_the_31(monkeypatch):
    # of 1.6e9 pixels each by their own account, for no machine here could hold them
    pixel = np.zeros(1, np.int32)
    size = (40_000, 40_000)
    huge = [store_module.Picture(pixel, size, size, {"id": str(i)}, "", False) for i in range(4)]
    monkeypatch.setattr(store_module, "decode_all", lambda *args: iter(huge))
    store = Store(Pictures(noise([(1, 1)] * 4)), 32, storage="resident")
    assert store.offsets.tolist() == [0, 1_600_000_000, 3_200_000_000, 4_800_000_000]


# --- large pictures are reduced


@pytest.mark.parametrize(
    "size", [(300, 400), (400, 300), (333, 77), (3, 1000), (65, 64), (401, 399)]
)
def test_shrink_keeps_the_aspect(size):
    reduced = shrink(np.zeros((*size, 3), np.uint8), 64)
    assert max(reduced.shape[:2]) == 64
    for side, whole in zip(reduced.shape, size, strict=False):
        assert abs(side - whole * 64 / max(size)) <= 0.5 or side == 1


def test_shrink_leaves_small_pictures_alone():
    (image,) = noise([(64, 20)])
    assert np.array_equal(shrink(image, 64), image)


@pytest.fixture
def chequered():
    """(256, 256, 3): black and white by turns."""
    white = np.indices((256, 256)).sum(0) % 2
    return np.repeat(255 * white[..., None], 3, 2).astype(np.uint8)


def test_shrink_averages_and_does_not_pick(chequered):
    reduced = shrink(chequered, 64).astype(int)
    assert abs(reduced - 127.5).max() < 3  # picking single pixels would give 0 or 255 everywhere


def test_what_is_reduced_is_kept_with_both_sizes(chequered):
    store = Store(Pictures([chequered]), 64, storage="resident")
    assert store.sizes.tolist() == [[64, 64]]
    assert store.native.tolist() == [[256, 256]]
    assert np.array_equal(unpacked(store, 0), shrink(chequered, 64))


# --- a limit


def test_limit_is_the_same_random_subset_every_time():
    images = noise([(4, 4)] * 50)
    kept = ids(Store(Pictures(images), 32, limit=12, storage="resident"))
    assert kept == ids(Store(Pictures(images), 32, limit=12, storage="resident"))
    numbers = [int(text.removeprefix("picture ")) for text in kept]
    assert len(set(numbers)) == 12
    assert numbers == sorted(numbers)
    assert numbers != list(range(12))  # random, for a split may be sorted by class


def test_without_a_limit_that_matters_all_are_kept():
    for limit in (None, 50, 51):
        assert subset(50, limit) == list(range(50))


def test_an_empty_dataset_is_refused():
    with pytest.raises(UserError, match=r"val: .*no images"):
        Store(Pictures([]), 32, name="val")


# --- pictures that cannot be decoded


class Unpicklable(Exception):
    def __init__(self, path, reason):
        super().__init__(f"{path}: {reason}")
        self.lock = threading.Lock()


@pytest.mark.parametrize("storage", ["auto", "resident", "mapped"])
# the first one is decoded apart; 299 lies in a later portion
@pytest.mark.parametrize("index", [0, 3, 299])
def test_an_exception_while_decoding_arrives_as_it_was(cache, storage, index):
    images = noise([(4, 4)] * 300)
    error = Unpicklable("a", "b")
    images[index] = error
    caught = []

    def build():
        try:  # `skip` is for files, not for mistakes
            Store(Pictures(images), 32, workers=4, storage=storage, on_bad="skip")
        except Exception as raised:
            caught.append(raised)

    thread = threading.Thread(target=build, daemon=True)  # a hang must not hang the tests
    thread.start()
    thread.join(20)
    assert not thread.is_alive(), "decoding hangs"
    assert caught == [error]
    assert nothing_in(cache)


def spoilt(images, bad):
    """The same, but those of the numbers in `bad` cannot be decoded."""
    return [UserError(f"{i}.jpg: bad") if i in bad else image for i, image in enumerate(images)]


# 256 and 299 lie in a later portion
BAD = pytest.mark.parametrize("bad", [[0], [3, 299], [0, 1, 256, 299]])
STORAGE = pytest.mark.parametrize("storage", ["resident", "mapped"])
SIZES = [(4, 4 + i % 3) for i in range(300)]


@STORAGE
@BAD
def test_bad_images_are_reported_together(cache, capsys, storage, bad):
    faulty = Pictures(spoilt(noise(SIZES), bad))
    message = (
        rf"^train: {len(bad)} of 300 images are bad, as {bad[0]}\.jpg: bad\. "
        r".*data\.on_bad=skip$"
    )
    with pytest.raises(UserError, match=message):
        Store(faulty, 32, storage=storage, name="train")
    lines = [line for line in capsys.readouterr().err.splitlines() if "jpg" in line]
    assert lines == [f"{i}.jpg: bad" for i in bad]
    assert nothing_in(cache)


@STORAGE
@BAD
def test_bad_images_are_left_out_where_that_is_asked_for(cache, capsys, storage, bad):
    images = noise(SIZES)
    faulty = Pictures(spoilt(images, bad))
    store = Store(faulty, 32, storage=storage, on_bad="skip", name="train")
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line and "img/s" not in line] == [
        *[f"{i}.jpg: bad" for i in bad],
        f"train: {len(bad)} of 300 images are bad and left out",
    ]
    good = [i for i in range(300) if i not in bad]
    assert ids(store) == [f"picture {i}" for i in good]
    for position, i in enumerate(good):
        assert np.array_equal(unpacked(store, position), images[i])
    assert len(store.pixels) == store.sizes.prod(1).sum()


@STORAGE
def test_bad_objects_are_left_out_where_that_is_asked_for(cache, capsys, storage):
    images = noise([(4, 4)] * 3)
    rest = (images[1], {"id": "the rest"})
    faulty = Pictures([images[0], BadObjects(["1.xml: one", "1.xml: two"], rest), images[2]])
    with pytest.raises(UserError, match=r"^val: 2 objects are bad, as 1\.xml: one\. .*=skip$"):
        Store(faulty, 32, storage=storage, name="val")
    assert capsys.readouterr().err.count("1.xml: ") == 2
    store = Store(faulty, 32, storage=storage, on_bad="skip", name="val")
    assert ids(store) == ["picture 0", "the rest", "picture 2"]
    assert np.array_equal(unpacked(store, 1), images[1])
    assert "val: 2 objects are bad and left out" in capsys.readouterr().err


@pytest.mark.parametrize("on_bad", ["stop", "skip"])
def test_nothing_left_is_an_error(on_bad):
    with pytest.raises(UserError, match="2 of 2 images are bad, as first"):
        Store(Pictures([UserError("first"), UserError("second")]), 32, on_bad=on_bad)


# --- memory and disk


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_scratch_file_is_mapped_and_has_no_name(cache):
    store = Store(Pictures(noise([(32, 32)])), 32, storage="mapped")
    assert list(cache.iterdir()) == []
    lines = Path("/proc/self/maps").read_text().splitlines()
    (mapping,) = [line for line in lines if str(cache) in line]
    assert "deleted" in mapping
    assert len(store.pixels) == 1024


def test_auto_is_mapped_where_memory_is_short(cache, monkeypatch):
    dataset = Pictures(noise([(32, 32)] * 4))  # 16 KiB
    monkeypatch.setattr(storage_module, "free_bytes", lambda device: 2 * 16384 + 1)
    Store(dataset, 32, storage="auto")
    assert not cache.exists()
    monkeypatch.setattr(storage_module, "free_bytes", lambda device: 2 * 16384)
    Store(dataset, 32, storage="auto")
    assert cache.exists()


# --- several processes of a machine


def pickled(make):
    """As it arrives in another process."""
    return pickle.loads(pickle.dumps(make()))  # noqa: S301 - our own


@pytest.mark.skipif(sys.platform != "linux", reason="processes find files of others in /proc")
@pytest.mark.parametrize("storage", ["auto", "resident", "mapped"])
def test_what_one_process_decodes_another_has(cache, storage):
    dataset = Pictures(noise([(5, 7), (1, 1), (32, 3)]))
    alone = Store(dataset, 32, storage="resident")
    told = Store(dataset, 32, storage=storage, once=pickled)
    assert str(cache) in Path("/proc/self/maps").read_text()
    assert torch.equal(told.pixels, alone.pixels)
    assert (told.offsets == alone.offsets).all()
    assert (told.sizes == alone.sizes).all()
    assert (told.native == alone.native).all()
    assert told.targets == alone.targets
    assert told.digests == alone.digests
    assert list(cache.iterdir()) == []


def test_without_proc_each_process_decodes_for_itself(monkeypatch):
    monkeypatch.setattr(store_module, "OPEN_FILES", Path("/nowhere"))
    dataset = Pictures(noise([(5, 7)]))
    store = Store(dataset, 32, storage="resident", once=lambda make: pytest.fail("asked"))
    assert len(store.pixels) == 35


def test_free_memory_is_measured():
    assert 2**26 < storage_module.free_bytes(torch.device("cpu")) < 2**50


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("KDMINI_CACHE", str(file))
    with pytest.raises(UserError, match=rf"{re.escape(str(file))}.*KDMINI_CACHE") as caught:
        Store(Pictures(noise([(4, 4)])), 32, storage="mapped")
    assert "\n" not in str(caught.value)


@STORAGE
def test_the_dataset_folder_is_left_as_it_was(tmp_path, cache, storage):
    root = tmp_path / "set"
    add(root, "a", ending=".png", size=(90, 50))
    write_split(root, "train", "a")

    def snapshot():
        return {
            path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes())
            for path in root.rglob("*")
        }

    before = snapshot()
    store = Store(VOC(str(root), ["train"]), 32, storage=storage)
    assert snapshot() == before
    assert store.sizes.tolist() == [[18, 32]]
    assert store.native.tolist() == [[50, 90]]
