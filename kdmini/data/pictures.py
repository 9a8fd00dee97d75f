"""Image files, read with care: from a path to an array of packed pixels."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from kdmini.contracts import UserError

MAX_PIXELS = 100_000_000  # a PNG of 200 kB can claim 1.6e9 pixels


FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP")  # Pillow hands other formats to outside programs


EXIF_ORIENTATION, QUARTER_TURNS = 0x0112, range(5, 9)


@contextmanager
def opened(path: str | Path, formats: tuple[str, ...] = FORMATS) -> Iterator[Image.Image]:
    """The image of a file, known by its content and not by its ending; whatever goes wrong is a
    UserError.
    """
    try:
        with Image.open(path, formats=formats) as image:  # reads the header only
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError(
                    f"{image.width}x{image.height} pixels, at most {MAX_PIXELS:,}"
                )
            yield image
    except (
        Exception
    ) as error:  # Pillow's readers raise OSError, SyntaxError, ValueError, struct.error and others
        reason = str(error).replace("\n", " ")
        raise UserError(f"{path}: not a usable image ({reason}); replace the file") from None


def decode(path: str | Path, formats: tuple[str, ...] = FORMATS) -> np.ndarray:
    """An image file as (H, W, 3) uint8 RGB, as stored: EXIF turns nothing. formats: Pillow's names
    of what is read.

    Raises UserError for a file that is missing, cut short, no image, or of more than MAX_PIXELS.
    """
    with opened(path, formats) as image:
        if image.mode.startswith("I"):  # 16 bits, which Pillow's convert would saturate
            gray = (np.asarray(image) >> 8).astype(np.uint8)
            return np.repeat(gray[:, :, None], 3, axis=2)
        if "transparency" in image.info:  # a palette with alpha goes through RGBA, or Pillow warns
            return np.array(image.convert("RGBA").convert("RGB"))
        return np.array(image.convert("RGB"))


def turned(path: str | Path) -> bool:
    """Whether EXIF asks for the image to be shown with width and height swapped."""
    with opened(path) as image:
        return image.getexif().get(EXIF_ORIENTATION) in QUARTER_TURNS


def shrink(image: np.ndarray, imgsz: int) -> np.ndarray:
    """(H, W, 3) uint8, reduced with antialiasing so that the long side is at most imgsz."""
    height, width = image.shape[:2]
    ratio = imgsz / max(height, width)
    if ratio >= 1:
        return image
    size = max(round(width * ratio), 1), max(round(height * ratio), 1)
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))


def pack(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 -> (H * W,) int32."""
    height, width = image.shape[:2]
    padded = np.empty(image.size + 1, np.uint8)
    padded[:-1] = image.reshape(-1)
    # four bytes from every third on: the fourth belongs to the next pixel and is masked away
    overlapping = np.ndarray((height * width,), "<i4", padded, strides=(3,))
    return overlapping & 0xFFFFFF
