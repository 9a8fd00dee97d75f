"""A file of class indices: whatever it holds, it is decoded as it is or refused by name.

Legend: H rows and W columns of a mask, K classes.
"""

import numpy as np
from PIL import Image

from kdmini.contracts import UserError
from kdmini.data.pictures import QUARTER_TURNS, UPRIGHT, Decoded, opened
from kdmini.segmentation.truth import VOID

MASKS = (".png",)  # endings
FORMATS = ("PNG",)  # Pillow's names; others lose pixels
INDICES = ("P", "L")  # modes whose numbers are indices
SHALLOW = ("1", "L;2", "L;4")  # grey of fewer bits, which Pillow stretches to 255


def read_mask(path: str, picture: Decoded, photograph: str, as_stored: bool) -> np.ndarray:
    """-> (H, W) uint8, the indices in the file: a palette's colours say nothing.

    picture: the photograph, as it is stored. as_stored: the mask belongs to that, whatever
    EXIF says. Raises UserError for a file that holds something else, or belongs to another
    picture.
    """
    with opened(path, FORMATS) as image:
        image.verify()  # the check sums of its parts, which decoding does not look at
    with opened(path, FORMATS) as image:
        check_holds_indices(path, image)
        check_frame(path, image.size, picture, photograph, as_stored)
        return np.array(image)


def check_holds_indices(path: str, image: Image.Image) -> None:
    """Raises UserError. Nothing is decoded yet."""
    remedy = "save it with a palette (Pillow's mode P), the index of its class in each pixel"
    tiles = getattr(image, "tile", [])
    raw = tiles[0][3] if tiles else ""  # how the file holds a pixel
    if "16B" in str(raw) or image.mode.startswith("I"):
        raise UserError(f"{path}: a mask of 16 bits a pixel, where an index takes 8; {remedy}")
    if raw in SHALLOW:
        raise UserError(f"{path}: a grey mask of fewer than 8 bits a pixel; {remedy}")
    if image.mode not in INDICES:
        what = f"a mask of {image.mode} colours, which are no class indices"
        raise UserError(f"{path}: {what}; map each colour to its index and {remedy}")


def check_frame(
    path: str, size: tuple[int, int], picture: Decoded, photograph: str, as_stored: bool
) -> None:
    """Raises UserError for a mask that does not lie over the photograph, or of which that is
    not clear, as EXIF turns one of the two.
    """
    height, width = picture.pixels.shape[:2]
    stored = (width, height)
    quarter = picture.orientation in QUARTER_TURNS
    is_turned = picture.orientation != UPRIGHT
    remedy = "store the photograph as it was annotated, without EXIF"
    if size != stored:
        exif = ""
        if quarter and size == stored[::-1]:
            exif = " and turned by EXIF"
        else:
            remedy = "restore the one that is of another size"
        raise UserError(
            f"{path}: a mask of {size[0]}x{size[1]} pixels, but {photograph} is "
            f"{width}x{height}{exif}; {remedy}"
        )
    settled = quarter and width != height  # else it would have the other size
    if is_turned and not settled and not as_stored:
        raise UserError(
            f"{path}: EXIF turns {photograph}, so the mask may belong to it as it is stored or as "
            f"it is shown; {remedy}, or set `as_stored: true` if it belongs to the pixels"
        )


def count_pixels(path: str, mask: np.ndarray, count: int) -> np.ndarray:
    """-> (K + 1,) int64, the pixels of each of `count` classes, and last those that are void.

    Raises UserError for an index of neither.
    """
    pixels = np.bincount(mask.reshape(-1), minlength=VOID + 1)
    unknown = [int(index) for index in np.flatnonzero(pixels[count:VOID]) + count]
    if unknown:
        more = f" (and {len(unknown) - 1:,} more such indices)" if len(unknown) > 1 else ""
        raise UserError(
            f"{path}: index {unknown[0]} in {pixels[unknown[0]]:,} pixels{more}, but `names` has "
            f"{count} classes, 0 to {count - 1}, and {VOID} is void; correct `names` or the mask"
        )
    return np.append(pixels[:count], pixels[VOID])
