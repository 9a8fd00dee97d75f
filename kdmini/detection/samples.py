"""From what an annotation says of an image to a sample, whatever file it stood in: whether
the boxes belong to these pixels, what is clipped and dropped, and a count of it all.

Legend: G objects of an image.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from kdmini.contracts import BadObjects, UserError
from kdmini.data.pictures import (
    DEEP,
    QUARTER_TURNS,
    UPRIGHT,
    Decoded,
    read,
    remark_on_bits,
)
from kdmini.detection.truth import Target

Size = tuple[int, int]  # width, height

MIN_SIDE = 1  # pixels; a box with less inside the image is dropped
SLACK = 0.01  # of a side, and a pixel: what careless tools put outside
MOST = 0.5  # share of the boxes that may be lost for one reason


class Marked(NamedTuple):
    """What an annotation says of one image."""

    id: str
    boxes_xyxy: np.ndarray  # (G, 4) pixels, not yet clipped; or parts of the sides
    labels: np.ndarray  # (G,) int64
    difficult: np.ndarray  # (G,) bool
    size: Size | None = None  # None where it does not say
    in_parts: bool = False
    faults: Sequence[str] = ()  # of objects that cannot be used, a line for each


class Count(NamedTuple):
    """Of one image."""

    id: str
    boxes: int
    kept: int
    small: int  # dropped, as there is less than MIN_SIDE of them
    outside: int  # whose centre is not in the image; clipped or dropped
    reach: float  # how far out the boxes go, in sides
    used_bits: int | None
    other_size: bool  # than the annotation says
    turned: bool  # by EXIF, and the boxes are not


class Samples:
    """The samples of a data set, and what was set right in them.

    bits: used of images with 16 bits. as_stored: boxes belong to the pixels as they are
    stored, whatever EXIF and annotation say of the size.
    """

    def __init__(self, bits: int = DEEP, as_stored: bool = False):
        self.bits = bits
        self.as_stored = as_stored
        self.counts: dict[int, Count] = {}  # by index, so that threads need no lock

    def sample(self, index: int, path: str, marked: Marked) -> tuple[np.ndarray, Target]:
        """-> image (H, W, 3) uint8 RGB, and its objects, clipped to the image.

        Objects that have less than MIN_SIDE left are dropped. Raises UserError for an
        image that cannot be used, or whose boxes may belong to another; BadObjects for one
        that can be used in part.
        """
        if marked.faults and not len(marked.labels):
            raise UserError(marked.faults[0])
        picture = read(path, bits=self.bits)
        height, width = picture.pixels.shape[:2]
        sides = np.array([width, height], np.float32)
        boxes_xyxy = marked.boxes_xyxy.astype(np.float64)
        if marked.in_parts:
            boxes_xyxy = boxes_xyxy * np.tile(sides, 2)
        if len(boxes_xyxy) and not self.as_stored:
            far = None if marked.in_parts else boxes_xyxy[:, 2:].max(0)
            check_frame(path, picture, marked.size, far)

        clipped = boxes_xyxy.clip(0, np.tile(sides, 2)).astype(np.float32)
        keep = (clipped[:, 2:] - clipped[:, :2]).min(1) >= MIN_SIDE  # (G,)
        centres = (boxes_xyxy[:, :2] + boxes_xyxy[:, 2:]) / 2
        outside = ((centres < 0) | (centres > sides)).any(1)  # (G,)
        self.counts[index] = Count(
            id=marked.id,
            boxes=len(boxes_xyxy),
            kept=int(keep.sum()),
            small=int((~keep & ~outside).sum()),
            outside=int(outside.sum()),
            reach=float((boxes_xyxy[:, 2:] / sides).max(initial=0)),
            used_bits=picture.used_bits,
            other_size=marked.size not in (None, (width, height)),
            turned=picture.orientation != UPRIGHT and len(boxes_xyxy) > 0,
        )
        target = Target(
            boxes_xyxy=clipped[keep],
            labels=marked.labels[keep],
            difficult=marked.difficult[keep],
            id=marked.id,
        )
        if marked.faults:
            raise BadObjects(list(marked.faults), (picture.pixels, target))
        return picture.pixels, target

    def report(self) -> str:
        """What was set right in the images read so far, in one line; empty if nothing was.

        Raises UserError where most of the boxes are lost for one reason, or none is left.
        """
        counts = [self.counts[index] for index in sorted(self.counts)]
        check_enough(counts)
        remarks = []
        other_size = [count.id for count in counts if count.other_size]
        if other_size:
            remarks.append(
                f"{len(other_size):,} images of another size than stated, as {other_size[0]} "
                "(pixels count)"
            )
        turned = sum(count.turned for count in counts)
        if turned:
            remarks.append(f"{turned:,} images turned by EXIF, and their boxes are not")
        small = sum(count.small for count in counts)
        if small:
            images = sum(count.small > 0 for count in counts)
            remarks.append(f"{small:,} boxes under 1 px dropped in {images:,} images")
        outside = sum(count.outside for count in counts)
        if outside:
            images = sum(count.outside > 0 for count in counts)
            remarks.append(f"{outside:,} boxes mostly outside the picture in {images:,} images")
        dark = remark_on_bits([count.used_bits for count in counts], self.bits)
        return ", ".join([*remarks, dark] if dark else remarks)


def check_enough(counts: list[Count]) -> None:
    """Raises UserError where a set cannot be meant."""
    boxes = sum(count.boxes for count in counts)
    outside = [count for count in counts if count.outside]
    lost = sum(count.outside for count in outside)
    if lost > MOST * boxes:
        reach = float(np.median([count.reach for count in outside]))
        raise UserError(
            f"{lost:,} of {boxes:,} boxes lie outside their images, as in {outside[0].id}, as "
            f"if these were {reach:.1f} times larger; scale the boxes, or restore the images"
        )
    small = [count for count in counts if count.small]
    lost = sum(count.small for count in small)
    if lost > MOST * boxes:
        raise UserError(
            f"{lost:,} of {boxes:,} boxes have under 1 px in their images, as in "
            f"{small[0].id}; give their corners in pixels"
        )
    if counts and not any(count.kept for count in counts):
        raise UserError(f"none of the {len(counts):,} images has an object; correct their labels")


# --- whose boxes they are


def check_frame(path: str, picture: Decoded, stated: Size | None, far: np.ndarray | None) -> None:
    """Raises UserError where boxes may belong to the image that EXIF shows, or to one of the
    size that the annotation states, and not to the pixels as they are stored.

    far: x, y that the boxes reach, pixels; None where they would fit any size.
    """
    height, width = picture.pixels.shape[:2]
    stored = (width, height)
    for other, about, likely in other_frames(stored, picture.orientation, stated):
        fits_other = fits(far, other)
        if fits(far, stored):
            doubtful = likely and fits_other
            verdict = "may belong to either"
        else:
            doubtful = likely or fits_other
            verdict = f"fit only {other[0]}x{other[1]}" if fits_other else "fit neither"
        if doubtful:
            raise UserError(
                f"{path}: {width}x{height} pixels, {about}: boxes {verdict}; store it as it was "
                "annotated, without EXIF, or set `as_stored: true` if they belong to the pixels"
            )


def other_frames(
    stored: Size, orientation: int, stated: Size | None
) -> list[tuple[Size, str, bool]]:
    """The sizes of other images that boxes may belong to, why, and whether that is likely: a
    size of other proportions is more often just wrong.
    """
    turned = (stored[1], stored[0])
    shown = turned if orientation in QUARTER_TURNS else stored
    frames = []
    settled = stated == stored != shown
    if orientation != UPRIGHT and not settled:
        frames.append((shown, "turned by EXIF", True))
    if stated and stated != stored and min(stated) > 0:
        likely = stated == turned or is_multiple(stated, stored)
        frames.append((stated, f"but {stated[0]}x{stated[1]} in its annotation", likely))
    return frames


def is_multiple(size: Size, other: Size) -> bool:
    """Whether both are the same picture, larger or smaller, up to rounding."""
    if fits(np.array(size), other) and fits(np.array(other), size):
        return False  # a few pixels more or less are another crop
    ratio = max(size) / max(other)
    return all(abs(a - ratio * b) <= max(1, ratio) for a, b in zip(size, other, strict=True))


def fits(far: np.ndarray | None, size: Size) -> bool:
    """Whether boxes that reach so far lie in an image of this size."""
    return far is None or bool((far <= np.array(size) * (1 + SLACK) + 1).all())
