"""Small folders in the layout of PASCAL VOC with masks, written by a test."""

from pathlib import Path

import numpy as np
from PIL import Image

from kdmini.data.palette import with_palette

WIDTH = 40
HEIGHT = 30


def mask_of(*indices: int) -> np.ndarray:
    """(30, 40) uint8, upright stripes of these indices, all as wide."""
    columns = np.arange(WIDTH) * len(indices) // WIDTH
    return np.tile(np.array(indices, np.uint8)[columns], (HEIGHT, 1))


def add(
    folder: Path,
    name: str,
    mask: np.ndarray | Image.Image | None = None,
    orientation: int | None = None,
    size: tuple[int, int] = (WIDTH, HEIGHT),
    masks: str = "SegmentationClass",
) -> Path:
    """One image and its mask, of which the path is returned; background and index 15, if not
    said otherwise. orientation: of the image, in EXIF.
    """
    for part in (masks, "JPEGImages", "ImageSets/Segmentation"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    Image.new("RGB", size, (200, 30, 60)).save(folder / f"JPEGImages/{name}.jpg", exif=exif)

    content = mask_of(0, 15) if mask is None else mask
    image = with_palette(content) if isinstance(content, np.ndarray) else content
    path = folder / masks / f"{name}.png"
    image.save(path)
    return path


def write_split(folder: Path, split: str, *lines: str) -> None:
    text = "".join(f"{line}\n" for line in lines)
    (folder / "ImageSets" / "Segmentation" / f"{split}.txt").write_text(text)
