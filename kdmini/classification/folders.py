"""A folder for each class: `ROOT/train/CLASS/*.jpg`, `ROOT/val/CLASS/*.jpg`.

Legend: H, W size of an image.
"""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kdmini.classification.truth import Labels, Target
from kdmini.contracts import UserError
from kdmini.data.folders import composed, files, has_ending, leads_out
from kdmini.data.pictures import DEEP, IMAGES, UPRIGHT, Bits, read, remark_on_bits
from kdmini.data.voc import class_names, nearest
from kdmini.typed import short


class Record(NamedTuple):
    """One image of the data set; its pixels are still on the disk."""

    path: str
    label: int


class Seen(NamedTuple):
    """Of one image that was read."""

    turned: bool  # by EXIF
    used_bits: int | None


class Folders:
    """One split, as a `kdmini.contracts.Dataset`.

    root: the folder that holds the splits.
    split: the folder of one of them, such as train; `.` is root itself.
    names: the classes, in the order of their indices; by default the folders in the split, in
        the order of their names.
    bits: used of images of 16 bits; they are scaled to 8.

    Files that are no images, and folders within that of a class, are passed over and counted;
    what begins with a dot is not looked at. Target ids are "CLASS/NAME.jpg".

    Raises UserError at construction for a split or a class without images, and for a folder
    that `names` lacks; for an image that cannot be read, when it is asked for.
    """

    truth = Labels

    def __init__(self, root: str, split: str, names: list[str] | None = None, bits: Bits = DEEP):
        self.bits = bits
        # absolute, not resolved: a folder that is a link keeps its own name
        self.root = Path(root).expanduser().absolute()
        folder = self.root / split
        if "\0" in split or ".." in Path(split).parts or not folder.is_dir():
            raise UserError(f"{folder}: no such folder; correct `root` or `split`")
        folders = class_folders(folder)
        if not folders:
            raise UserError(f"{folder}: has no folder of a class; correct `root` or `split`")
        self.names = class_names(names, list(folders))
        refuse_unknown(folders, self.names)

        self.records: list[Record] = []
        self.passed_over: list[str] = []  # paths
        for label, name in enumerate(self.names):
            self._take(folders.get(composed(name), folder / name), label)
        self.ids = [self._id(record) for record in self.records]
        self.photographs = {identity(record.path) for record in self.records}
        self.seen: dict[int, Seen] = {}  # by index: threads need no lock, and some read twice

    def _take(self, folder: Path, label: int) -> None:
        """Adds the images of a class. Raises UserError where there is none."""
        paths = [path for same in files(folder).values() for path in same]
        images = [path for path in paths if has_ending(path, IMAGES)]
        if not images:
            raise UserError(
                f"{folder}: no image of class {self.names[label]!r} ({' '.join(IMAGES)}); add "
                "some, or take the class out of the set"
            )
        self.records += [Record(path, label) for path in images]
        below = [item.path for item in os.scandir(folder) if item.is_dir()]
        others = {*paths, *below} - {*images}
        self.passed_over += sorted(p for p in others if not os.path.basename(p).startswith("."))

    def _id(self, record: Record) -> str:
        return f"{self.names[record.label]}/{os.path.basename(record.path)}"

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[np.ndarray, Target]:
        """-> image (H, W, 3) uint8 RGB, as stored, and its class. Raises UserError."""
        path, label = self.records[index]
        if leads_out(path, self.root):
            raise UserError(f"{path}: a link that leads out of the set; put a copy in its place")
        picture = read(path, bits=self.bits)
        self.seen[index] = Seen(picture.orientation != UPRIGHT, picture.used_bits)
        return picture.pixels, Target(label=label, id=self.ids[index])

    def report(self) -> str:
        """What is worth knowing of the set, in one line; empty if nothing is."""
        remarks = []
        if self.passed_over:
            first = self.passed_over[0]
            remarks.append(f"{len(self.passed_over):,} of no image passed over, as {first}")
        seen = [self.seen[index] for index in sorted(self.seen)]
        turned = sum(each.turned for each in seen)
        if turned:
            remarks.append(f"{turned:,} images that EXIF turns, taken as stored")
        dark = remark_on_bits([each.used_bits for each in seen], self.bits)
        return ", ".join([*remarks, dark] if dark else remarks)


def class_folders(folder: Path) -> dict[str, Path]:
    """Name, composed -> folder of each class, in the order of the names."""
    below = [path for path in folder.iterdir() if path.is_dir() and path.name[0] != "."]
    return {composed(path.name): path for path in sorted(below, key=lambda path: path.name)}


def refuse_unknown(folders: dict[str, Path], names: list[str]) -> None:
    """Raises UserError for folders of classes that `names` lacks."""
    known = {composed(name) for name in names}
    unknown = [name for name in folders if name not in known]
    if unknown:
        more = f" ({len(unknown):,} such folders)" if len(unknown) > 1 else ""
        raise UserError(
            f"{folders[unknown[0]]}: unknown class {short(unknown[0])}, the nearest known is "
            f"{nearest(unknown[0], names)!r}; list it in `names`, or move the folder{more}"
        )


def identity(path: str) -> tuple[str, str]:
    """What an image is known by in every set: the folder that it lies in, and its name."""
    real = os.path.realpath(path)
    return os.path.dirname(real), os.path.basename(real)
