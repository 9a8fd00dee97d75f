"""The store: what is kept of each picture, where it lies, and what happens when decoding or the
disk fails.
"""

import re
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kdmini.contracts import UserError
from kdmini.data import store as store_module
from kdmini.data.pictures import pack, shrink
from kdmini.data.render import letterbox, render
from kdmini.data.store import Store, subset
from kdmini.detection.voc import VOC


class Pictures:
    """Arrays as a dataset; an exception in the place of an array is raised."""

    names = ("thing",)

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image = self.images[index]
        if isinstance(image, BaseException):
            raise image
        height, width = image.shape[:2]
        return image, {
            "boxes_xyxy": np.array([[0, 0, width, height]], np.float32),
            "labels": np.zeros(1, np.int64),
            "difficult": np.zeros(1, bool),
            "id": f"picture {index}",
        }


def noise(*sizes, seed=0):
    """Random pictures of these (height, width)."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (height, width, 3), np.uint8) for height, width in sizes]


def unpacked(store, index):
    """The stored picture as (H, W, 3) uint8, by arithmetic on the integers."""
    height, width = store.sizes[index]
    start = store.offsets[index]
    packed = (
        store.pixels[start : start + height * width].numpy().astype(np.int64).reshape(height, width)
    )
    return np.stack([packed % 256, packed // 256 % 256, packed // 65536], -1)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("KDMINI_CACHE", str(folder))
    return folder


@pytest.mark.parametrize("storage", ["resident", "mapped"])
def test_every_picture_comes_back_as_it_was(cache, storage):
    images = noise((5, 7), (1, 1), (32, 3), (2, 32))
    store = Store(Pictures(images), 32, storage=storage, workers=3)
    assert store.pixels.dtype == torch.int32 and len(store.pixels) == 35 + 1 + 96 + 64
    for index, image in enumerate(images):
        assert np.array_equal(unpacked(store, index), image)
    assert store.offsets.dtype == np.int64
    assert store.offsets.tolist() == [0, 35, 36, 132]
    assert store.sizes.tolist() == store.native.tolist() == [[5, 7], [1, 1], [32, 3], [2, 32]]
    assert [target["id"] for target in store.targets] == [f"picture {i}" for i in range(4)]


def test_resident_and_mapped_hold_the_same_bytes(cache):
    images = noise((40, 70), (64, 64), (9, 33), (100, 20))
    resident, mapped = (
        Store(Pictures(images), 64, storage=storage) for storage in ("resident", "mapped")
    )
    assert resident.pixels.numpy().tobytes() == mapped.pixels.numpy().tobytes()
    assert (resident.sizes == mapped.sizes).all() and (resident.offsets == mapped.offsets).all()


def test_pack_reads_what_is_not_contiguous_too():
    (image,) = noise((6, 10))
    for view in (image[:, ::-1], image[::2, 1:8], image.transpose(1, 0, 2)):
        assert np.array_equal(pack(view), pack(view.copy()))


def test_offsets_beyond_two_to_the_31_are_gathered_from(tmp_path):
    store = Store(Pictures(noise((32, 32), (32, 32))), 32, storage="resident")
    far = 2**31 + 7
    second = store.pixels[1024:].numpy()
    pixels = np.memmap(
        tmp_path / "sparse", np.int32, "w+", shape=far + 1024
    )  # holes take no room on the disk
    pixels[far:] = second
    store.pixels, store.offsets[1] = torch.from_numpy(pixels), far
    picture = render(store, letterbox(store, np.array([1]), 32), 32)[0].permute(1, 2, 0)
    expected = np.stack([second % 256, second // 256 % 256, second // 65536], -1).reshape(32, 32, 3)
    assert np.array_equal((picture.numpy() * 255).round(), expected)


def test_offsets_do_not_wrap_at_two_to_the_31(monkeypatch):
    # pictures of 1.6e9 pixels each by their own account, for no machine here could hold them
    huge = [
        store_module.Picture(np.zeros(1, np.int32), (40000, 40000), (40000, 40000), {"id": str(i)})
        for i in range(4)
    ]
    monkeypatch.setattr(store_module, "decode_all", lambda *args: iter(huge))
    store = Store(Pictures(huge), 32, storage="resident")
    assert store.offsets.tolist() == [0, 1_600_000_000, 3_200_000_000, 4_800_000_000]


@pytest.mark.parametrize(
    "size", [(300, 400), (400, 300), (333, 77), (3, 1000), (65, 64), (401, 399)]
)
def test_shrink_keeps_the_aspect(size):
    height, width = size
    reduced = shrink(np.zeros((*size, 3), np.uint8), 64)
    ratio = 64 / max(size)
    assert max(reduced.shape[:2]) == 64
    assert abs(reduced.shape[0] - height * ratio) <= 0.5 or reduced.shape[0] == 1
    assert abs(reduced.shape[1] - width * ratio) <= 0.5 or reduced.shape[1] == 1


def test_shrink_leaves_small_pictures_alone():
    (image,) = noise((64, 20))
    assert np.array_equal(shrink(image, 64), image)


def test_shrink_averages_and_does_not_pick():
    chequered = np.repeat(255 * (np.indices((256, 256)).sum(0) % 2)[..., None], 3, 2).astype(
        np.uint8
    )
    reduced = shrink(chequered, 64).astype(int)
    assert abs(reduced - 127.5).max() < 3  # picking single pixels would give 0 or 255 everywhere
    store = Store(Pictures([chequered]), 64, storage="resident")
    assert store.sizes.tolist() == [[64, 64]] and store.native.tolist() == [[256, 256]]
    assert np.array_equal(unpacked(store, 0), reduced)


def test_limit_is_the_same_random_subset_every_time():
    images = noise(*[(4, 4)] * 50)
    kept = [
        [t["id"] for t in Store(Pictures(images), 32, limit=12, storage="resident").targets]
        for _ in range(2)
    ]
    assert kept[0] == kept[1] and len(set(kept[0])) == 12
    assert kept[0] == sorted(kept[0], key=lambda text: int(text.split()[1]))
    assert kept[0] != [
        f"picture {i}" for i in range(12)
    ]  # random, for a split may be sorted by class
    assert subset(50, None) == subset(50, 50) == subset(50, 51) == list(range(50))


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_under_one_is_refused_by_name(limit):
    with pytest.raises(UserError, match=f"limit: {limit} ") as caught:
        Store(Pictures(noise((4, 4))), 32, limit=limit)
    assert "\n" not in str(caught.value)


def test_an_empty_dataset_is_refused():
    with pytest.raises(UserError, match=r"val: .*no images"):
        Store(Pictures([]), 32, name="val")


class Unpicklable(Exception):
    def __init__(self, path, reason):
        super().__init__(f"{path}: {reason}")
        self.lock = threading.Lock()


@pytest.mark.parametrize("storage", ["auto", "resident", "mapped"])
@pytest.mark.parametrize(
    "place", [0, 3, 299]
)  # the first one is decoded apart; 299 lies in a later portion
def test_an_exception_while_decoding_arrives_as_it_was(cache, storage, place):
    images, error = noise(*[(4, 4)] * 300), Unpicklable("a", "b")
    images[place] = error
    caught = []

    def build():
        try:
            Store(
                Pictures(images), 32, workers=4, storage=storage, on_bad="skip"
            )  # for files, not for mistakes
        except Exception as raised:
            caught.append(raised)

    thread = threading.Thread(target=build, daemon=True)  # a hang must not hang the tests
    thread.start()
    thread.join(20)
    assert not thread.is_alive(), "decoding hangs"
    assert caught == [error]
    assert not cache.exists() or list(cache.iterdir()) == []


@pytest.mark.parametrize("storage", ["resident", "mapped"])
@pytest.mark.parametrize(
    "bad", [[0], [3, 299], [0, 1, 256, 299]]
)  # 256 and 299 lie in a later portion
def test_bad_images_are_told_together_or_left_out(cache, capsys, storage, bad):
    images = noise(*[(4, 4 + i % 3) for i in range(300)])
    whole = Store(Pictures(images), 32, storage=storage)
    faulty = [UserError(f"{i}.jpg: bad") if i in bad else image for i, image in enumerate(images)]
    said = f"train: {len(bad)} of 300 images are bad"
    with pytest.raises(UserError, match=rf"^{said}, as {bad[0]}\.jpg: bad\. .*data\.on_bad=skip$"):
        Store(Pictures(faulty), 32, storage=storage, name="train")
    lines = [f"{i}.jpg: bad" for i in bad]
    assert [line for line in capsys.readouterr().err.splitlines() if "jpg" in line] == lines
    assert not cache.exists() or list(cache.iterdir()) == []

    store = Store(Pictures(faulty), 32, storage=storage, on_bad="skip", name="train")
    told = [line for line in capsys.readouterr().err.splitlines() if line and "img/s" not in line]
    assert told == [*lines, f"{said} and left out"]
    good = [i for i in range(300) if i not in bad]
    assert [target["id"] for target in store.targets] == [f"picture {i}" for i in good]
    assert all(
        np.array_equal(unpacked(store, new), unpacked(whole, old)) for new, old in enumerate(good)
    )
    assert len(store.pixels) == store.sizes.prod(1).sum()


@pytest.mark.parametrize("on_bad", ["stop", "skip"])
def test_nothing_left_is_an_error(on_bad):
    with pytest.raises(UserError, match="2 of 2 images are bad, as first"):
        Store(Pictures([UserError("first"), UserError("second")]), 32, on_bad=on_bad)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_scratch_file_is_mapped_and_has_no_name(cache):
    store = Store(Pictures(noise((32, 32))), 32, storage="mapped")
    assert list(cache.iterdir()) == []
    mappings = [
        line for line in Path("/proc/self/maps").read_text().splitlines() if str(cache) in line
    ]
    assert len(mappings) == 1 and "deleted" in mappings[0]
    assert len(store.pixels) == 1024


def test_auto_is_mapped_where_memory_is_short(cache, monkeypatch):
    dataset = Pictures(noise(*[(32, 32)] * 4))  # 16 KiB
    monkeypatch.setattr(store_module, "free_bytes", lambda device: 2 * 16384 + 1)
    Store(dataset, 32, storage="auto")
    assert not cache.exists()
    monkeypatch.setattr(store_module, "free_bytes", lambda device: 2 * 16384)
    Store(dataset, 32, storage="auto")
    assert cache.exists()


def test_free_memory_is_measured():
    assert 2**26 < store_module.free_bytes(torch.device("cpu")) < 2**50


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KDMINI_CACHE", str(tmp_path / "file"))
    with pytest.raises(
        UserError, match=rf"{re.escape(str(tmp_path / 'file'))}.*KDMINI_CACHE"
    ) as caught:
        Store(Pictures(noise((4, 4))), 32, storage="mapped")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("storage", ["resident", "mapped"])
def test_the_dataset_folder_is_left_as_it_was(tmp_path, cache, storage):
    root = tmp_path / "set"
    for part in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / part).mkdir(parents=True)
    Image.fromarray(noise((50, 90))[0]).save(root / "JPEGImages" / "a.png")
    (root / "Annotations" / "a.xml").write_text(
        "<annotation><object><name>dog</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax>"
        "</bndbox></object></annotation>"
    )
    (root / "ImageSets" / "Main" / "train.txt").write_text("a\n")

    def snapshot():
        return {
            path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes())
            for path in root.rglob("*")
        }

    before = snapshot()
    store = Store(VOC(str(root), ["train"]), 32, storage=storage)
    assert snapshot() == before
    assert store.sizes.tolist() == [[18, 32]] and store.native.tolist() == [[50, 90]]
