"""A validation set drawn from the images of another set: the same ones every time.

What is drawn depends on the names of the images and a seed alone, so that it is the same on
every machine and at every resume. Images that belong together stay together: the copies that
Roboflow makes of one photograph, `a_jpg.rf.HASH`, and by `prefix` the pictures of one film.
"""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np

from kdmini.bounds import Range, Seed
from kdmini.contracts import Dataset, Target, UserError
from kdmini.data.pictures import IMAGES
from kdmini.files import check_kind

COPY = re.compile(r"\.rf\.\w+$")  # what Roboflow appends
ENDING_IN_NAME = re.compile(rf"_({'|'.join(ending[1:] for ending in IMAGES)})$", re.IGNORECASE)
NUMBER = re.compile(r"[\W_]*\d+$")
LISTED = "val.txt"  # in the run folder


@dataclass(frozen=True)
class Share:
    """The section `data.val` where the images of `data.train` are divided.

    share: of the images, that are taken out of `data.train` for validation; about, by prefix.
    by: what is drawn: each image by itself, or all together that have the same name before
        its number, or lie in the same folder, as the pictures of a film do.
    seed: another one draws others.
    listed: a file with the names of the images to take, such as the val.txt of another run;
        that of the run itself, once it has begun.
    """

    share: Annotated[float, Range(0, 1, above=True, below=True)]
    by: Literal["image", "prefix"] = "image"
    seed: Seed = 0
    listed: str | None = None

    def draw(self, names: list[str]) -> list[str]:
        """Those of the images that validate, in their order. Raises UserError where they
        cannot be divided.
        """
        group_of = {name: self._group(name) for name in names}
        sizes = Counter(group_of.values())
        if len(sizes) < 2:
            raise UserError(
                f"data.val: all {len(names):,} images are one of {list(sizes)} and cannot be "
                "divided; set `by: image`, or give `val` a data set of its own"
            )

        wanted = self.share * len(names)
        drawn = sorted(sizes, key=self._lot)
        chosen: set[str] = set()
        count = 0
        for group in drawn[:-1]:  # one at least stays to learn from
            if abs(count + sizes[group] - wanted) < abs(count - wanted):
                chosen.add(group)
                count += sizes[group]
        if not chosen:
            chosen.add(min(drawn, key=sizes.__getitem__))
        return [name for name in names if group_of[name] in chosen]

    def _group(self, name: str) -> str:
        stem, ending = os.path.splitext(name)
        stem = COPY.sub("", stem if ending.lower() in IMAGES else name)
        if self.by == "image":
            return stem
        return NUMBER.sub("", ENDING_IN_NAME.sub("", stem))

    def _lot(self, group: str) -> bytes:
        return hashlib.sha256(f"{self.seed} {group}".encode("utf-8", "surrogatepass")).digest()


class Part:
    """Some images of a data set, as a `kdmini.contracts.Dataset`."""

    def __init__(self, whole: Dataset, indices: list[int]):
        self.names = list(whole.names)
        self.truth = whole.truth
        self.whole = whole
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[np.ndarray, Target]:
        return self.whole[self.indices[index]]

    def report(self) -> str:
        report = getattr(self.whole, "report", None)
        return report() if report else ""


class Divided(NamedTuple):
    """A set in two."""

    train: Part
    val: Part
    listed: list[str]  # the names of the images of val


def divide(make: Callable[[], Dataset], share: Share) -> Divided:
    """Two parts of what `make` returns, which is made twice, as each counts what it reads.

    A run that has begun takes the images again that it has listed, so that none that it has
    learned from is ever used to validate. Raises UserError.
    """
    whole = make()
    ids = getattr(whole, "ids", None)
    if not ids:
        raise UserError(
            "data.val: a share is drawn by the names of the images, and data.train has no "
            "`ids`, a list of these; give `val` a data set of its own"
        )
    names = relative(ids)
    listed = read_list(Path(share.listed), names) if share.listed else share.draw(names)
    chosen = set(listed)
    val = [index for index, name in enumerate(names) if name in chosen]
    train = [index for index, name in enumerate(names) if name not in chosen]
    how = f"as listed in {share.listed}" if share.listed else f"drawn by {share.by}"
    print(f"data.val: {len(val):,} of the {len(names):,} images of data.train, {how}")
    with redirect_stdout(None):  # it has said all
        again = make()
    return Divided(Part(whole, train), Part(again, val), listed)


def relative(ids: Sequence[str]) -> list[str]:
    """Without the folder that all of them lie in, for it may be moved."""
    parts = [id.split("/") for id in ids]
    columns = zip(*(folders for *folders, _ in parts), strict=False)
    depth = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
    return ["/".join(path[depth:]) for path in parts]


def read_list(path: Path, names: Collection[str]) -> list[str]:
    """The lines of a list, each of which must be one of the names. Raises UserError."""
    check_kind(path)
    try:
        lines = path.read_text("utf-8", "surrogateescape").split("\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); repair or delete it") from None
    listed = [line for line in lines if line]
    known = set(names)
    lost = [name for name in listed if name not in known]
    if lost:
        raise UserError(
            f"{path}: {lost[0]!r} is no image of data.train; restore it, or name another `run:`"
        )
    if not 0 < len(set(listed)) < len(known):
        raise UserError(
            f"{path}: lists {len(listed):,} of the {len(known):,} images of data.train; "
            "leave some for both, or name another `run:`"
        )
    return listed


def text_of(listed: Sequence[str]) -> bytes:
    """What read_list reads."""
    return "".join(f"{name}\n" for name in listed).encode("utf-8", "surrogateescape")
