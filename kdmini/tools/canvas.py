"""Photographs to draw on with Pillow: large enough for what is written, saved whole."""

import io
import math
from pathlib import Path

from PIL import Image, ImageFont

from kdmini.files import write_whole

# pixels of a drawn picture's long side
LEAST_SIDE = 640
MOST_SIDE = 8192

LEAST_TEXT = 14  # pixels
JPEG_QUALITY = 92


def enlarged(image: Image.Image) -> Image.Image:
    """A copy; a small image is enlarged, and one beyond MOST_SIDE made smaller."""
    long_side = max(image.size)
    factor = min(max(long_side, LEAST_SIDE), MOST_SIDE) / long_side
    width, height = (max(round(side * factor), 1) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def text_size(picture: Image.Image) -> int:
    """Pixels of a line that is legible where all of the picture is seen."""
    return max(round(math.sqrt(picture.width * picture.height) / 36), LEAST_TEXT)


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def save_jpeg(picture: Image.Image, path: Path) -> None:
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=JPEG_QUALITY)
    write_whole(path, content.getvalue())
