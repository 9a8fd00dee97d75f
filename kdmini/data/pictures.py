"""Pillow, with care: whatever an image file holds, it is decoded or refused by name.

Legend: H rows and W columns of an image.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from kdmini.contracts import UserError

FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP")  # Pillow hands others to outside programs
MAX_PIXELS = 100_000_000  # a PNG of 200 kB can claim 1.6e9 pixels
EXIF_ORIENTATION = 0x0112  # the tag
QUARTER_TURNS = range(5, 9)  # its values that swap width and height


def decode(path: str | Path, formats: tuple[str, ...] = FORMATS) -> np.ndarray:
    """An image file as (H, W, 3) uint8 RGB, as stored: EXIF turns nothing.

    formats: Pillow's names of what is read. Raises UserError for a file that is
    missing, cut short, no image, or of more than MAX_PIXELS.
    """
    with opened(path, formats) as image:
        if image.mode.startswith("I"):  # 16 bits, which Pillow's convert would saturate
            grey = (np.asarray(image) >> 8).astype(np.uint8)
            return np.repeat(grey[:, :, None], 3, axis=2)
        if "transparency" in image.info:  # a palette with alpha; straight to RGB, Pillow warns
            image = image.convert("RGBA")
        return np.array(image.convert("RGB"))


def turned(path: str | Path) -> bool:
    """Whether EXIF asks for the image to be shown with width and height swapped."""
    with opened(path) as image:
        return image.getexif().get(EXIF_ORIENTATION) in QUARTER_TURNS


@contextmanager
def opened(path: str | Path, formats: tuple[str, ...] = FORMATS) -> Iterator[Image.Image]:
    """The image of a file, known by its content and not by its ending.

    Pixels are decoded when they are asked for, so what goes wrong within the `with` is
    a UserError too.
    """
    try:
        with Image.open(path, formats=formats) as image:  # reads the header only
            if image.width * image.height > MAX_PIXELS:
                size = f"{image.width}x{image.height} pixels, at most {MAX_PIXELS:,}"
                raise Image.DecompressionBombError(size)
            yield image
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


def pack(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 -> (H * W,) int32, the bytes R, G, B, 0 with the lowest first."""
    flat = image.reshape(-1)
    padded = np.empty(len(flat) + 1, np.uint8)
    padded[:-1] = flat
    # four bytes from every third on: the fourth belongs to the next pixel and is masked away
    overlapping = np.ndarray((len(flat) // 3,), "<i4", padded, strides=(3,))
    return overlapping & 0xFFFFFF
