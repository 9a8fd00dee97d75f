"""A set of images as it is looked at: what is known of each, and a few of them to show.

Legend: H, W size of an image.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from kdmini.contracts import Dataset, Target
from kdmini.data.store import Picture, picture_of

SHOWN_SIDE = 640  # pixels of the long side of an image in a sheet, at most


class Read(NamedTuple):
    """One image that was read, without its pixels."""

    number: int  # in its set
    target: Target  # of a mask, what look_masks counts of it
    native: tuple[int, int]  # H, W of the file
    digest: str

    @property
    def id(self) -> str:
        return str(self.target.get("id"))

    @property
    def pixels(self) -> str:
        """The same for images that look the same."""
        return self.digest.rpartition(", truth")[0]


class Shown(NamedTuple):
    """One image of a sheet."""

    image: np.ndarray  # (h, w, 3) uint8 RGB, at most SHOWN_SIDE
    target: Target
    native: tuple[int, int]  # H, W, of which the target's pixels are


class Split(NamedTuple):
    """All images of a set that can be used."""

    name: str
    dataset: Dataset
    images: list[Read]
    imgsz: int

    @property
    def names(self) -> list[str]:
        return list(self.dataset.names)

    @property
    def keys(self) -> set[str]:
        """Of the targets."""
        return set(self.images[0].target)

    def line_of_images(self) -> str:
        sides = np.array([max(read.native) for read in self.images])
        return (
            f"{self.name}: {len(sides):,} images, long side {sides.min():,} to {sides.max():,} px, "
            f"{np.median(sides):,.0f} in the middle; trained at {self.imgsz:,}"
        )

    def shown(self, count: int, labels: Sequence[np.ndarray]) -> list[Shown]:
        """A few images, in order: each class on one of them where there is room, the rarest
        first, and the rest evenly spaced.

        labels: the classes on each image of the set.
        """
        few = [self.images[place].number for place in chosen(labels, count)]
        return [self.show(index) for index in few]

    def show(self, index: int) -> Shown:
        """An image, read again."""
        picture = picture_of(self.dataset, index, SHOWN_SIDE, training=False)
        assert isinstance(picture, Picture)  # it could be read a moment ago
        four_bytes = picture.pixels.astype("<i4").view(np.uint8)
        image = four_bytes.reshape(*picture.size, 4)[..., :3]
        return Shown(image, picture.target, picture.native)


def chosen(labels: Sequence[np.ndarray], count: int) -> list[int]:
    """Places in the row, at most `count`, in order."""
    count = min(count, len(labels))
    places: dict[int, list[int]] = {}  # of each class, those of its images
    for place, present in enumerate(labels):
        for label in np.unique(present).tolist():
            places.setdefault(label, []).append(place)
    few: set[int] = set()
    for having in sorted(places.values(), key=len):
        if len(few) < count and few.isdisjoint(having):
            few.add(having[0])
    rest = [place for place in range(len(labels)) if place not in few]
    more = count - len(few)
    few |= {rest[number * len(rest) // more] for number in range(more)}
    return sorted(few)


def table(titles: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """Lines with the first column to the left and numbers to the right."""
    cells = [list(titles), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(titles))]
    lines = []
    for first, *others in cells:
        numbers = [f"{cell:>{width}}" for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([f"{first:<{widths[0]}}", *numbers]).rstrip())
    return lines
