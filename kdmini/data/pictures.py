"""Pillow, with care: whatever an image file holds, it is decoded or refused by name.

Legend: H rows and W columns of an image.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
from PIL import Image

from kdmini.bounds import Range
from kdmini.contracts import UserError
from kdmini.data.room import ROOM
from kdmini.files import check_kind

FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP")  # Pillow hands others to outside programs
IMAGES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".webp", ".bmp")  # their endings
MAX_PIXELS = 100_000_000  # a PNG of 200 kB can claim 1.6e9 pixels
EXIF_ORIENTATION = 0x0112  # the tag
UPRIGHT = 1  # where nothing is turned
ORIENTATIONS = range(1, 9)  # its values
QUARTER_TURNS = range(5, 9)  # those that swap width and height
DEEP = 16  # bits of a value in a deep image
Bits = Annotated[int, Range(8, DEEP)]  # of those, the ones that are used

# Pillow asks for memory in pieces of this size. Those of its default, 16 MiB, stay with the
# thread that had them; larger ones go back to the system with the image.
Image.core.set_block_size(64 * 2**20)


class Decoded(NamedTuple):
    """What an image file holds."""

    pixels: np.ndarray  # (H, W, 3) uint8 RGB, as stored: EXIF turns nothing
    orientation: int  # as EXIF asks for it
    used_bits: int | None  # of DEEP, by the largest value; None where values have 8 bits


def decode(path: str | Path, formats: tuple[str, ...] = FORMATS) -> np.ndarray:
    """An image file as (H, W, 3) uint8 RGB, as stored. Raises UserError as read() does."""
    return read(path, formats).pixels


def read(path: str | Path, formats: tuple[str, ...] = FORMATS, bits: int = DEEP) -> Decoded:
    """An image file.

    formats: Pillow's names of what is read. bits: those that are used of values of 16 bits,
    as of a sensor of 12; they become 8. Raises UserError for a file that is missing, cut
    short, no image, or of more than MAX_PIXELS; and for values of more bits.
    """
    with opened(path, formats) as image:
        ROOM.take(image.width * image.height)
        deep = "16B" in str(getattr(image, "tile", ""))  # as Pillow's reader of PNG calls it
        grey = image.mode.startswith("I")
        used_bits = None
        if grey:  # which Pillow's convert would saturate
            values = np.asarray(image)
            if deep:
                used_bits = int(values.max()).bit_length()
            eight = (values >> (bits - 8)).clip(max=255).astype(np.uint8)
            pixels = np.repeat(eight[:, :, None], 3, axis=2)
        else:
            # a palette with alpha; of one that goes straight to RGB Pillow warns
            opaque = image.convert("RGBA") if "transparency" in image.info else image
            pixels = np.array(opaque.convert("RGB"))
            if deep:  # of which it gives the upper 8
                used_bits = int(pixels.max()).bit_length() + 8
        picture = Decoded(pixels, orientation_of(image), used_bits)

    if used_bits is not None and (used_bits > bits or (bits < DEEP and not grey)):
        raise UserError(
            f"{path}: its values take {used_bits} bits, which `bits: {bits}` does not scale; "
            "correct `bits`, or store 8 bits"
        )
    return picture


def remark_on_bits(used_bits: list[int | None], bits: int) -> str:
    """Of the images of a set: whether those of 16 bits use fewer; empty if not."""
    deep = [used for used in used_bits if used is not None]
    most_bits = max(deep, default=DEEP)
    if most_bits >= bits:
        return ""
    return (
        f"{len(deep):,} images of 16 bits use {most_bits} of them, so they are dark "
        f"(`bits: {max(most_bits, 8)}` scales grey ones)"
    )


def orientation_of(image: Image.Image) -> int:
    """As EXIF asks for it; UPRIGHT where it cannot be read, for then nobody turns the image."""
    try:
        orientation = image.getexif().get(EXIF_ORIENTATION)
    except Exception:  # as of Pillow's readers, below
        return UPRIGHT
    if isinstance(orientation, int) and orientation in ORIENTATIONS:
        return orientation
    return UPRIGHT


@contextmanager
def opened(path: str | Path, formats: tuple[str, ...] = FORMATS) -> Iterator[Image.Image]:
    """The image of a file, known by its content and not by its ending.

    Pixels are decoded when they are asked for, so what goes wrong within the `with` is
    a UserError too.
    """
    check_kind(path)
    try:
        with Image.open(path, formats=formats) as image:  # reads the header only
            if image.width * image.height > MAX_PIXELS:
                size = f"{image.width}x{image.height} pixels, at most {MAX_PIXELS:,}"
                raise Image.DecompressionBombError(size)
            yield image
    except UserError:  # of what is in the image
        raise
    # Pillow's readers raise OSError, SyntaxError, ValueError, struct.error and others
    except Exception as error:
        reason = str(error).replace("\n", " ")
        raise UserError(f"{path}: not a usable image ({reason}); replace the file") from None


def shrink(image: np.ndarray, imgsz: int) -> np.ndarray:
    """(H, W, 3) uint8, reduced with antialiasing so that the long side is at most imgsz."""
    height, width = image.shape[:2]
    ratio = imgsz / max(height, width)
    if ratio >= 1:
        return image
    size = (max(round(width * ratio), 1), max(round(height * ratio), 1))
    small = Image.fromarray(image).resize(size, Image.Resampling.BILINEAR)
    return np.asarray(small)


def pack(image: np.ndarray, labels: np.ndarray | None = None) -> np.ndarray:
    """(H, W, 3) uint8 -> (H * W,) int32, the bytes R, G, B and a label with the lowest first.

    labels: of pixels, of any size, uint8; a pixel gets that of the nearest. 0 without.
    """
    flat = image.reshape(-1)
    padded = np.empty(len(flat) + 1, np.uint8)
    padded[:-1] = flat
    # four bytes from every third on: the fourth belongs to the next pixel and is masked away
    overlapping = np.ndarray((len(flat) // 3,), "<i4", padded, strides=(3,))
    pixels = overlapping & 0xFFFFFF
    if labels is None:
        return pixels
    # bit 31 is the sign: `>> 24 & 255` undoes it
    return pixels | nearest(labels, image.shape[:2]).reshape(-1).astype("<i4") << 24


def nearest(labels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H', W') -> (H, W) of the size: of each pixel's centre."""
    places = []
    for length, given in zip(size, labels.shape, strict=True):
        places.append(((np.arange(length) + 0.5) * given / length).astype(np.int64))
    rows, columns = places
    return labels[rows[:, None], columns]
