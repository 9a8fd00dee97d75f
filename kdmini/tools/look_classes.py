"""Classes of images, counted and drawn, for kdmini.tools.look.

Legend: M images of a set, K classes.
"""

from collections.abc import Sequence

import numpy as np

from kdmini.tools import classifications
from kdmini.tools.draw import Figure
from kdmini.tools.sheet import Split, table


def labels_of(split: Split) -> np.ndarray:
    """(M,)"""
    return np.array([read.target["label"] for read in split.images], np.int64)


def tables(splits: Sequence[Split]) -> list[str]:
    """Lines: of each class its images and their share."""
    names = splits[0].names
    counts = [np.bincount(labels_of(split), minlength=len(names)) for split in splits]
    titles = ["class"]
    for split in splits:
        titles += [split.name, "share"]
    rows = []
    for label, name in enumerate(names):
        row = [name]
        for of_split in counts:
            share = of_split[label] / of_split.sum()
            row += [f"{of_split[label]:,}", f"{share:.1%}"]
        rows.append(row)
    return ["", *table(titles, rows)]


def sheet(split: Split, count: int) -> Figure:
    """A few images with their classes."""
    shown = split.shown(count, [*labels_of(split)[:, None]])
    names = [split.names[one.target["label"]] for one in shown]
    title = f"{len(shown)} of the {len(split.images):,} images of {split.name}"
    pictures = [one.image for one in shown]
    ids = [str(one.target["id"]) for one in shown]
    captions = [classifications.title_of(name) for name in names]
    return classifications.sheet(pictures, captions, title, ids)
