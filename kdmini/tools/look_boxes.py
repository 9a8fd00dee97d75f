"""Boxes, counted and drawn, for kdmini.tools.look.

Legend: B objects of a set, K classes.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from kdmini.tools.draw import Figure
from kdmini.tools.draw_boxes import Box, BoxedImage, draw_boxes
from kdmini.tools.sheet import Shown, Split, table

COLUMNS = 4
STRIDES = (8, 16, 32)  # pixels of a cell of YOLO11's three maps
STEPS = (0, *STRIDES, 64, 128, np.inf)  # of the table of sizes, pixels
UNEVEN = 20  # times that one class is as frequent as another
MANY = 0.05  # share of the boxes


class Objects(NamedTuple):
    """Those of a set, in a row."""

    labels: np.ndarray  # (B,)
    image: np.ndarray  # (B,) place of its image
    difficult: np.ndarray  # (B,) bool
    shorter: np.ndarray  # (B,) shorter side in pixels of the letterboxed square


def objects_of(split: Split) -> Objects:
    labels = []
    image = []
    difficult = []
    shorter = []
    for place, read in enumerate(split.images):
        boxes_xyxy = np.asarray(read.target["boxes_xyxy"], float).reshape(-1, 4)
        sides = (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]).min(1)
        shorter.append(sides * split.imgsz / max(read.native))
        labels.append(np.asarray(read.target["labels"], np.int64))
        image.append(np.full(len(sides), place))
        hard = read.target.get("difficult")
        difficult.append(np.zeros(len(sides), bool) if hard is None else np.asarray(hard, bool))
    parts = (labels, image, difficult, shorter)
    return Objects(*(np.concatenate(part) for part in parts))


def tables(splits: Sequence[Split]) -> list[str]:
    """Lines: totals, classes, sizes, and what a user should think about."""
    objects = [objects_of(split) for split in splits]
    lines = [totals(split, of) for split, of in zip(splits, objects, strict=True)]
    lines += ["", *classes(splits, objects), "", *sizes(splits, objects)]
    advice = [*about_classes(splits, objects), *about_sizes(splits, objects)]
    return [*lines, "", *advice] if advice else lines


def totals(split: Split, objects: Objects) -> str:
    in_image = np.bincount(objects.image, minlength=len(split.images))
    text = (
        f"{split.name}: {len(objects.labels):,} objects, {in_image.max(initial=0):,} at most in an "
        f"image; {(in_image == 0).sum():,} images without any"
    )
    difficult = int(objects.difficult.sum())
    return text + (f"; difficult, which do not count: {difficult:,}" if difficult else "")


def classes(splits: Sequence[Split], objects: Sequence[Objects]) -> list[str]:
    """Objects, their share, and images, of each class and set."""
    titles = ["class"]
    for split in splits:
        titles += [split.name, "share", "images"]
    rows = []
    for label, name in enumerate(splits[0].names):
        row = [name]
        for of in objects:
            mine = of.labels == label
            share = mine.mean() if len(mine) else 0
            row += [f"{mine.sum():,}", f"{share:.1%}", f"{len(np.unique(of.image[mine])):,}"]
        rows.append(row)
    return table(titles, rows)


def sizes(splits: Sequence[Split], objects: Sequence[Objects]) -> list[str]:
    """How many boxes have a shorter side in each range."""
    titles = [f"shorter side at {splits[0].imgsz} px"]
    for split in splits:
        titles += [split.name, "share"]
    rows = []
    for low, high in pairwise(STEPS):
        row = [words_of_range(low, high)]
        for of in objects:
            inside = (of.shorter >= low) & (of.shorter < high)
            share = inside.mean() if len(inside) else 0
            row += [f"{inside.sum():,}", f"{share:.1%}"]
        rows.append(row)
    return table(titles, rows)


def words_of_range(low: float, high: float) -> str:
    if low == 0:
        return f"under {high:g} px, a cell of the finest map"
    if np.isinf(high):
        return f"{low:g} px and more"
    return f"{low:g} to {high:g} px"


def about_classes(splits: Sequence[Split], objects: Sequence[Objects]) -> list[str]:
    lines = []
    names = splits[0].names
    found = [np.bincount(of.labels[~of.difficult], minlength=len(names)) for of in objects]
    for split, counts in zip(splits, found, strict=True):
        absent = [name for name, count in zip(names, counts, strict=True) if not count]
        if absent:
            what = "cannot be learned" if split.name == "train" else "is not scored"
            lines.append(f"warning: no object in {split.name} of {', '.join(absent)}: that {what}")
    counts = found[0]
    if counts.all() and counts.max() > UNEVEN * counts.min():
        most = names[int(counts.argmax())]
        least = names[int(counts.argmin())]
        ratio = counts.max() / counts.min()
        lines.append(f"in train {most} is {ratio:.0f} times as frequent as {least}")
    return lines


def about_sizes(splits: Sequence[Split], objects: Sequence[Objects]) -> list[str]:
    lines = []
    for split, of in zip(splits, objects, strict=True):
        small = of.shorter < STRIDES[0]
        if len(small) and small.mean() > MANY:
            lines.append(
                f"warning: {small.mean():.0%} of the boxes of {split.name} are narrower than a "
                f"cell of the finest map, {STRIDES[0]} px, at data.imgsz={split.imgsz}: many "
                "will not be found; use larger images, or cut them into tiles"
            )
    return lines


# --- the sheet


def sheet(split: Split, count: int) -> Figure:
    """A few images with the boxes of their objects."""
    labels = [read.target["labels"] for read in split.images]
    shown = split.shown(count, labels)
    boxed = [boxed_image(one, split.names) for one in shown]
    title = f"{len(boxed)} of the {len(split.images):,} images of {split.name}"
    return draw_boxes(boxed, COLUMNS, title)


def boxed_image(shown: Shown, names: Sequence[str]) -> BoxedImage:
    height, width = shown.native
    target = shown.target
    hard = target.get("difficult", np.zeros(len(target["labels"]), bool))
    boxes = [
        Box(box, names[label], "difficult" if difficult else "object")
        for box, label, difficult in zip(
            np.asarray(target["boxes_xyxy"]).tolist(), target["labels"], hard, strict=True
        )
    ]
    return BoxedImage(
        shown.image / np.float32(255),
        extent=(0, width, height, 0),
        size=(width, height),
        boxes=boxes,
        title=str(target.get("id")),
    )
