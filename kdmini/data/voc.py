"""The folder layout of PASCAL VOC: what a split lists, and where its files lie.

    VOC2012/JPEGImages/2007_000027.jpg
    VOC2012/Annotations/2007_000027.xml
    VOC2012/ImageSets/Main/trainval.txt     a name a line: 2007_000027

Any folder laid out like this will do. Nothing is ever written to it.
"""

import difflib
import os
import re
from functools import cache
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

from kdmini.contracts import UserError

VOC_NAMES = [
    "aeroplane", "bicycle", "bird", "boat", "bottle",
    "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person",
    "pottedplant", "sheep", "sofa", "train", "tvmonitor",
]  # fmt: skip
IMAGES = (".jpg", ".jpeg", ".png")  # endings, whatever their case
ANNOTATIONS = (".xml",)


class Entry(NamedTuple):
    """One image that a split lists."""

    folder: Path  # the VOC-layout folder, like VOCdevkit/VOC2012
    name: str  # of the image, without folder and ending


# --- split lists


def list_images(root: Path, splits: list[str], exclude: list[str]) -> list[Entry]:
    """The images of the splits, each photograph once, less those of the excluded splits.

    Prints how many were repeated, and how many left out. Raises UserError where a split
    does not exist or no image is left.
    """
    listed = list_splits(root, splits)
    excluded = {photograph(entry) for entry in list_splits(root, exclude)}
    unique: dict[tuple[str, str], Entry] = {}
    for entry in listed:
        unique.setdefault(photograph(entry), entry)
    kept = [entry for identity, entry in unique.items() if identity not in excluded]

    title = " + ".join(splits)
    if len(unique) < len(listed):
        print(f"{title}: {len(listed) - len(unique):,} repeated images taken once")
    if exclude:
        count = f"{len(unique) - len(kept):,} of {len(unique):,} images"
        print(f"{title}: {count} left out, as in {', '.join(exclude)}")
    if not kept:
        raise UserError(
            f"{root}: no image is left of splits {splits} without {exclude}; "
            "check `splits`, `exclude`"
        )
    return kept


def list_splits(root: Path, splits: list[str]) -> list[Entry]:
    """The images of several splits, one split after the other."""
    entries: list[Entry] = []
    for split in splits:
        entries += list_split(root, split)
    return entries


def list_split(root: Path, split: str) -> list[Entry]:
    """The images of a split, in its order. `all` is every annotated image, listed or not.

    Raises UserError, with the remedy, for a folder or a split that does not exist or
    lists nothing.
    """
    if ".." in split or "\0" in split:
        raise UserError(
            f"split {split!r} is not a folder and a name, like VOC2012/trainval; correct `splits`"
        )
    folder_name, _, name = split.rpartition("/")
    remedy = "correct `root` or `splits`"
    if folder_name in ("VOC2007", "VOC2012"):
        remedy = f"fetch it with `python -m kdmini.tools.download --root {root}`"

    candidates = (root / folder_name, root / "VOCdevkit" / folder_name)
    folder = next((path for path in candidates if (path / "Annotations").is_dir()), None)
    if folder is None:
        raise UserError(f"{root / folder_name}: no such folder, or no Annotations in it; {remedy}")

    lists = folder / "ImageSets" / "Main"
    if name == "all":
        names = sorted(files(folder / "Annotations", ANNOTATIONS))
        print(f"{split}: {len(names):,} annotated images{listed_in(lists / 'trainval.txt')}")
    elif (lists / f"{name}.txt").is_file():
        names = read_ids(lists / f"{name}.txt")
    else:
        # with a `_` in their names are VOC's lists per class
        known = sorted(path.stem for path in lists.glob("*.txt") if "_" not in path.stem)
        choice = ", ".join(known) or "no list"
        raise UserError(f"{lists / name}.txt: no such split ({choice}, and `all`); {remedy}")
    if not names:
        raise UserError(f"{folder}: split {name!r} lists no image; {remedy}")
    return [Entry(folder, image) for image in names]


def listed_in(trainval: Path) -> str:
    """How many images the usual list has, as the end of a line; empty without the list."""
    if not trainval.is_file():
        return ""
    return f", of which ImageSets/Main/trainval lists {len(read_ids(trainval)):,}"


def read_ids(path: Path) -> list[str]:
    """The names in a split file, in order. Raises UserError for one that leads elsewhere.

    A second column is passed over: VOC's lists per class have -1, 0 or 1 there.
    """
    names = []
    for line in path.read_text("utf-8-sig", "replace").split("\n"):
        name = re.sub(r"\s+(-1|0|1)$", "", line.strip())
        if ".." in name or re.search(r"[/\\\0]", name):
            raise UserError(
                f"{path}: {name!r} is not the name of an image; names have no folder and no ending"
            )
        if name:
            names.append(name)
    return names


real_path = cache(os.path.realpath)  # asked for every photograph


def photograph(entry: Entry) -> tuple[str, str]:
    """What a photograph is known by in every set: the folder of a year, and a name in it.

    VOC2012 holds photographs of VOC2007 too, and calls NNNNNN 2007_NNNNNN.
    """
    root = entry.folder.parent
    if root.name == "VOCdevkit":  # a user may name this folder or the one above as root
        root = root.parent
    year = entry.folder.name
    name = entry.name
    if year == "VOC2012" and name.startswith("2007_"):
        year = "VOC2007"
        name = name.removeprefix("2007_")
    return os.path.join(real_path(root), year), name


# --- files


def files(folder: Path, endings: tuple[str, ...]) -> dict[str, str]:
    """Name -> path of every file with one of the endings, in the order of the names.

    The path is "" for a link that leads out of the VOC-layout folder.
    """
    if not folder.is_dir():
        return {}
    inside = tuple(os.path.join(os.path.realpath(path), "") for path in (folder, folder.parent))
    paths = {}
    for item in sorted(os.scandir(folder), key=attrgetter("name")):
        name, ending = os.path.splitext(item.name)
        if ending.lower() not in endings or not item.is_file():  # a pipe would be waited for
            continue
        leads_out = item.is_symlink() and not os.path.realpath(item.path).startswith(inside)
        paths[name] = "" if leads_out else item.path
    return paths


def find_file(paths: dict[str, str], wanted: Path) -> str:
    """The path, among those of `files`, that is `wanted` but for the ending.

    Raises UserError where there is none, and for a link that leads out of the set.
    """
    path = paths.get(wanted.stem)
    if path:
        return path
    if path is None:
        fault = "no such file; restore it"
    else:
        fault = "a link that leads out of the set; put a copy in its place"
    raise UserError(f"{wanted}: {fault} or take {wanted.stem!r} out of the split")


# --- class names


def nearest(name: str, known: list[str]) -> str:
    """The one of the known names that is spelt most like `name`, whatever the case."""

    def likeness(other: str) -> float:
        return difflib.SequenceMatcher(None, name.lower(), other.lower()).ratio()

    return max(known, key=likeness)
