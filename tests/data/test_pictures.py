"""Decoding: every mode of Pillow, and files that are no whole image."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kdmini.contracts import UserError
from kdmini.data.pictures import decode, read

PIXELS = Path(__file__).resolve().parents[2] / ".." / "shared" / "data" / "messy" / "pixels"


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "RGBA", "CMYK", "RGB"])
def test_every_mode_becomes_rgb_as_pillow_has_it(tmp_path, mode):
    ramp = np.linspace(0, 255, 20 * 30 * 3).reshape(20, 30, 3)
    image = Image.fromarray(ramp.astype(np.uint8)).convert(mode)
    path = tmp_path / "a.jpg"
    kind = "JPEG" if mode in ("L", "CMYK") else "PNG"
    image.save(path, format=kind)

    decoded = decode(path)
    assert decoded.shape == (20, 30, 3)
    assert decoded.dtype == np.uint8
    with Image.open(path) as stored:
        assert stored.mode == mode
        np.testing.assert_array_equal(decoded, np.asarray(stored.convert("RGB")))


@pytest.mark.filterwarnings("error")
def test_a_transparent_palette_is_read_without_a_warning(tmp_path):
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = Image.fromarray(ramp).convert("P")
    image.save(tmp_path / "a.png", transparency=bytes(range(256)))
    assert decode(tmp_path / "a.png").shape == (16, 16, 3)


def test_sixteen_bits_are_scaled_and_not_saturated(tmp_path):
    ramp = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    decoded = decode(tmp_path / "a.png")
    assert decoded.shape == (64, 64, 3)
    exact = ramp[:, :, None] / 65535 * 255
    assert np.abs(decoded.astype(float) - exact).max() <= 1


def deep_png(path: Path, values: np.ndarray) -> None:
    """A PNG of 16 bits a value: (H, W, C), where C is 2 of grey and 3 of colour with alpha or
    without.
    """
    height, width, channels = values.shape
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("largest", [65535, 4012, 255])
def test_the_bits_that_a_deep_image_uses_are_told(tmp_path, channels, largest):
    values = np.full((3, 4, channels), largest)
    deep_png(tmp_path / "a.png", values)
    picture = read(tmp_path / "a.png")
    used = {65535: 16, 4012: 12, 255: 8}[largest]
    assert picture.used_bits == used
    assert (picture.pixels == largest >> 8).all()


def test_an_image_of_eight_bits_is_not_deep(tmp_path):
    Image.new("L", (4, 3), 5).save(tmp_path / "a.png")
    assert read(tmp_path / "a.png").used_bits is None
    assert read(tmp_path / "a.png", bits=12).pixels.max() == 5


@pytest.mark.parametrize("bits", [8, 9, 12, 15, 16])
def test_stated_bits_become_eight(tmp_path, bits):
    values = np.linspace(0, 2**bits - 1, 16 * 16).astype(np.uint16).reshape(16, 16, 1)
    deep_png(tmp_path / "a.png", values)
    pixels = read(tmp_path / "a.png", bits=bits).pixels
    assert np.array_equal(pixels[..., :1], values >> (bits - 8))
    assert pixels.max() == 255


def test_stated_bits_that_cannot_be_honoured_are_refused(tmp_path):
    deep_png(tmp_path / "grey.png", np.full((3, 4, 1), 4012))
    deep_png(tmp_path / "colour.png", np.full((3, 4, 3), 4012))
    with pytest.raises(UserError, match=r"grey\.png: its values take 12 bits, which `bits: 11`"):
        read(tmp_path / "grey.png", bits=11)
    with pytest.raises(UserError, match=r"colour\.png: .* or store 8 bits"):
        read(tmp_path / "colour.png", bits=12)  # Pillow reads the upper 8 alone


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation, expected", [(1, 1), (3, 3), (8, 8), (0, 1), (9, 1)])
def test_the_orientation_is_read_and_turns_nothing(tmp_path, kind, orientation, expected):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (40, 30)).save(tmp_path / "a", kind, exif=exif)
    picture = read(tmp_path / "a")
    assert picture.orientation == expected
    assert picture.pixels.shape == (30, 40, 3)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("exif", [b"Exif\0\0", b"MM", b"MM\0*\0\0\0\xff", b"Exif\0\0junk" * 9])
def test_broken_exif_is_no_exif(tmp_path, kind, exif):
    Image.new("RGB", (40, 30)).save(tmp_path / "a", kind, exif=exif)
    assert read(tmp_path / "a").orientation == 1


@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP", "BMP"])
def test_content_decides_and_not_the_ending(tmp_path, kind):
    Image.new("RGB", (30, 20), (255, 0, 0)).save(tmp_path / "a.jpg", format=kind)
    assert decode(tmp_path / "a.jpg").shape == (20, 30, 3)


@pytest.mark.skipif(not PIXELS.is_dir(), reason="no real photographs beside the repository")
@pytest.mark.parametrize("file", ["grayscale.jpg", "rgba_png_named.jpg"])
def test_real_messy_pixels(file):
    decoded = decode(PIXELS / file)
    with Image.open(PIXELS / file) as image:
        np.testing.assert_array_equal(decoded, np.asarray(image.convert("RGB")))


# --- refused


def chunk(kind: bytes, content: bytes) -> bytes:
    """One chunk of a PNG."""
    length = struct.pack(">I", len(content))
    checksum = struct.pack(">I", zlib.crc32(kind + content))
    return length + kind + content + checksum


def huge_png() -> bytes:
    """The header and a little of a picture of 1.6e9 pixels."""
    signature = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(10**6))
    return signature + chunk(b"IHDR", header) + chunk(b"IDAT", body)


def saved(image: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


RNG = np.random.default_rng(0)
NOISE = Image.fromarray(RNG.integers(0, 256, (60, 80, 3), dtype=np.uint8))
WHOLE = saved(NOISE, "JPEG")
NO_WHOLE_IMAGE = {  # None: there is no file
    "half": WHOLE[: len(WHOLE) // 2],
    "empty": b"",
    "header": WHOLE[:20],
    "page": b"<!DOCTYPE html><html>not found</html>",
    "postscript": saved(NOISE, "EPS"),
    "huge": huge_png(),
    "missing": None,
}


@pytest.mark.parametrize("kind", NO_WHOLE_IMAGE)
def test_files_that_are_no_whole_image_are_refused_by_name(tmp_path, kind):
    path = tmp_path / "a.jpg"
    content = NO_WHOLE_IMAGE[kind]
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.jpg: not a usable image") as error:
        decode(path)

    message = str(error.value)
    assert "\n" not in message
    if kind == "huge":
        assert "pixels" in message
    if kind == "postscript":  # Pillow would start Ghostscript on it
        assert "cannot identify" in message


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_the_limit_of_pixels_is_our_own(tmp_path):
    Image.new("1", (10_001, 10_000)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="10001x10000 pixels"):
        decode(tmp_path / "a.png")
