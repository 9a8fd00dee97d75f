"""Damaged, hostile and odd image files, from the folder to the batch and through train.py."""

import ctypes
import io
import re
import resource
import shutil
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kdmini.contracts import UserError
from kdmini.data.loader import Augment, TrainLoader
from kdmini.data.pictures import decode
from kdmini.data.room import BYTES_PER_PIXEL
from tests.conftest import ROOT
from tests.data.test_pictures import chunk
from tests.faults.children import one_line, run
from tests.faults.own import SHAPES, pixels
from tests.faults.record import survived

DAMAGED_FILES = "Data: damaged image files"
ODD = "Data: odd formats, modes, EXIF turns, wrong sizes"
M_MMAP_THRESHOLD = -3  # of glibc's malloc.h


def jpeg(**settings) -> bytes:
    """Noise of 64 by 64 pixels."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "JPEG", **settings)
    return file.getvalue()


PLAIN = jpeg()
PROGRESSIVE = jpeg(progressive=True)

# --- damaged

DAMAGED = {
    "half": PLAIN[: len(PLAIN) // 2],
    "nine tenths": PROGRESSIVE[: len(PROGRESSIVE) * 9 // 10],
    "zero bytes": b"",
    "header": PLAIN[:20],
    "page": b"<!DOCTYPE html><html><head><title>404</title></head></html>",
    "zeroes": bytes(5000),
    "text": b"not a picture\n" * 100,
}


@pytest.fixture
def damaged(own) -> list[str]:
    """The names of the images that are damaged, each in another way."""
    names = own.names()[: len(DAMAGED)]
    for name, content in zip(names, DAMAGED.values(), strict=True):
        own.new_image(name).write_bytes(content)
    return names


def test_damaged_images_are_listed_together(own, train, damaged):
    done = train()
    one_line(done, f"train: {len(damaged)} of 24 images are bad", "data.on_bad=skip")
    line = r"^\S*/(\w+)\.jpg: not a usable image \(.+\); replace the file$"
    assert re.findall(line, done.text, re.MULTILINE) == damaged
    assert not (own.folder.parent / "run" / "ckpt").exists()


def test_damaged_images_are_skipped_where_that_is_asked_for(own, train, damaged):
    done = train("data.on_bad=skip")
    assert done.code == 0, done.text
    assert f"train: {len(damaged)} of 24 images are bad and left out" in done.text
    assert f"data: {24 - len(damaged)} images" in done.text

    trained_on = {target["id"].split("/")[1] for target in own.store("skip").targets}
    assert trained_on == set(own.names()) - set(damaged)
    lost = trained_on & set(damaged)
    survived(DAMAGED_FILES, len(lost), of="trained on", tried=len(damaged))


def test_a_jpeg_that_was_cut_off_anywhere_is_never_trained_on(own):
    rng = np.random.default_rng(0)
    name = own.names()[0]
    own.split(name)
    path = own.new_image(name)
    tried = 0
    trained_on = 0
    for whole in (PLAIN, PROGRESSIVE):
        path.write_bytes(whole)
        expected = decode(path)
        for cut in [*rng.integers(0, len(whole), 40), len(whole) - 3]:
            path.write_bytes(whole[:cut])
            tried += 1
            try:
                trained_on += not np.array_equal(pixels(own.store(), 0), expected)
            except UserError as error:
                assert f"{name}.jpg: not a usable image" in str(error)
    assert tried == 82
    survived(DAMAGED_FILES, trained_on, of="trained on", tried=tried)


# --- bombs


def png(side: int) -> bytes:
    """A whole, black PNG of side * side pixels of one bit."""
    packer = zlib.compressobj(9)
    row = bytes(1 + side // 8)
    body = b"".join(packer.compress(row * (side // 100)) for _ in range(100))
    body += packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def jpeg_that_claims(side: int) -> bytes:
    """A small JPEG with another size in its frame header."""
    at = PLAIN.index(b"\xff\xc0") + 5
    return PLAIN[:at] + struct.pack(">HH", side, side) + PLAIN[at + 4 :]


def gif_that_claims(side: int) -> bytes:
    screen = struct.pack("<HHBBB", side, side, 0, 0, 0)
    frame = struct.pack("<HHHHB", 0, 0, side, side, 0)
    return b"GIF89a" + screen + b"," + frame + b"\x08\x01\x00\x00;"


def bmp_that_claims(side: int) -> bytes:
    """The two headers, of 14 and 40 bytes, and no pixel of 24 bits."""
    file_header = struct.pack("<IHHI", 54, 0, 0, 54)
    size = struct.pack("<Iii", 40, side, side)
    colours = struct.pack("<HHIIiiII", 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + file_header + size + colours


BOMBS = {  # small files of at least 1.6e9 pixels, and one that Pillow itself would open
    "png": png(40_000),
    "png of 169 million pixels": png(13_000),
    "jpeg": jpeg_that_claims(65_500),
    "gif": gif_that_claims(65_535),
    "bmp": bmp_that_claims(40_000),
}


def test_a_decompression_bomb_is_refused_by_its_header(own, tmp_path):
    assert max(map(len, BOMBS.values())) < 300_000
    names = own.names()[: len(BOMBS)]
    own.split(*names)
    for name, content in zip(names, BOMBS.values(), strict=True):
        own.new_image(name).write_bytes(content)

    def measured() -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + 600 * 2**20  # of addresses: threads reserve some
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.process_time()
        with pytest.raises(UserError, match=f"{len(BOMBS)} of {len(BOMBS)} images are bad"):
            own.store("skip")
        print(f"took {time.process_time() - start} s")
        print(f"grew {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before} KiB")

    done = run(measured, tmp_path / "out")
    assert done.code == 0, done.text
    # the reason is the size that the header gives, not that memory ran out
    reason = r"^/\S+: not a usable image \([^\n]*pixels"
    assert len(re.findall(reason, done.text, re.MULTILINE)) == len(BOMBS), done.text
    grown_kib = int(re.search(r"grew (\d+) KiB", done.text)[1])
    seconds = float(re.search(r"took (\S+) s", done.text)[1])
    assert grown_kib < 300 * 1024
    assert seconds < 5
    survived("Data: decompression bombs", tried=len(BOMBS))


# What glibc's malloc took from the system by large pieces at one time: what was asked for, to
# the byte. Resident memory would also count the pages of libraries as they are touched, and
# what malloc keeps for threads.
HELD = f"""
import ctypes, sys
from kdmini.data.room import ROOM
from kdmini.data.store import Store
from kdmini.detection.voc import VOC

libc = ctypes.CDLL(None)
libc.mallopt({M_MMAP_THRESHOLD}, 2**17)
folder, most, workers = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
ROOM.most = most
Store(VOC(folder, ["train"], names={SHAPES}, as_stored=True), 64, workers=workers)
libc.malloc_stats()
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_stats"), reason="needs glibc's malloc")
def test_threads_together_hold_no_more_than_the_bound(own):
    """Six small files of 13 million pixels: there is room for one of them at a time."""
    side = 3600
    room_bytes = side * side * BYTES_PER_PIXEL
    names = own.names()[:6]
    own.split(*names)
    for name in names:
        own.new_image(name).write_bytes(png(side))

    def held_bytes(workers: int) -> int:
        command = [sys.executable, "-c", HELD, own.folder, room_bytes, workers]
        done = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return int(re.search(r"max mmap bytes += +(\d+)", done.stderr)[1])

    alone = held_bytes(workers=1)
    together = held_bytes(workers=6)
    assert 0.5 < alone / room_bytes < 1
    assert together < 1.01 * alone  # 4 without the bound
    survived("Data: memory of images decoded at one time")


# --- odd


def test_odd_formats_and_modes_arrive_as_pillow_has_them(own):
    ramp = np.linspace(0, 255, 48 * 64 * 3).reshape(48, 64, 3).astype(np.uint8)
    rgb = Image.fromarray(ramp)
    kinds = [(rgb, kind) for kind in ("PNG", "GIF", "WEBP", "BMP")]
    kinds += [(rgb.convert(mode), "PNG") for mode in ("L", "LA", "P", "RGBA", "1")]
    kinds += [(rgb.convert(mode), "JPEG") for mode in ("L", "CMYK")]
    names = own.names()[: len(kinds)]
    own.split(*names)
    for name, (image, kind) in zip(names, kinds, strict=True):
        image.save(own.new_image(name), format=kind)

    store = own.store(as_stored=True)  # the annotations are of others
    for index, name in enumerate(names):
        with Image.open(own.image(name)) as image:
            np.testing.assert_array_equal(pixels(store, index), np.asarray(image.convert("RGB")))
    survived(ODD, tried=len(kinds))


def test_sixteen_bits_arrive_as_eight(own):
    deep = np.linspace(0, 65_535, 64 * 64).astype(np.uint16).reshape(64, 64)
    name = own.names()[0]
    Image.fromarray(deep).save(own.new_image(name), format="PNG")
    off = pixels(own.store(), 0) - deep[..., None] / 257
    assert np.abs(off).max() <= 1
    survived(ODD)


def test_an_exif_turn_is_an_error_only_where_boxes_would_lie_wrong(own, train):
    name = own.names()[0]
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (64, 40)).save(own.new_image(name), exif=exif)
    in_xml = {"64x40": False, "40x64": True, "99x99": True, "0x0": True}  # size -> refused
    for size, refused in in_xml.items():
        width, height = size.split("x")
        text = re.sub(r"<width>\d+", f"<width>{width}", own.xml(name).read_text())
        own.xml(name).write_text(re.sub(r"<height>\d+", f"<height>{height}", text))
        if refused:
            one_line(train(), f"{name}.jpg: 64x40 pixels, turned by EXIF: boxes may belong")
        else:
            assert own.store().native[0].tolist() == [40, 64]
    survived(ODD, tried=len(in_xml))


def test_files_may_go_away_once_the_images_are_decoded(own):
    loader = TrainLoader(own.store(), 8, 1, Augment())
    expected = [images for images, _ in loader.epoch(0)]
    shutil.rmtree(own.folder)
    again = [images for images, _ in loader.epoch(0)]
    assert all(map(torch.equal, expected, again))
    survived("Data: the folder deleted while training")
