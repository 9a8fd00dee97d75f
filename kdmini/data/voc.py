"""The folder layout of PASCAL VOC: what a split lists, and where its files lie.

    VOC2012/JPEGImages/2007_000027.jpg
    VOC2012/Annotations/2007_000027.xml
    VOC2012/ImageSets/Main/trainval.txt     a name a line: 2007_000027

    VOC2012/SegmentationClass/2007_000032.png
    VOC2012/ImageSets/Segmentation/trainval.txt

Any folder laid out like this will do. Nothing is ever written to it.
"""

import difflib
import os
import re
from collections.abc import Collection
from functools import cache
from pathlib import Path
from typing import NamedTuple

from kdmini.contracts import UserError
from kdmini.data.folders import (
    ANNOTATIONS,
    APPLE_DOUBLE,
    composed,
    files,
    names_with,
    one_of,
)
from kdmini.data.pictures import IMAGES
from kdmini.data.places import LIST, VOC_PLACES, Places, candidates, has_places
from kdmini.files import check_kind

VOC_NAMES = [
    "aeroplane", "bicycle", "bird", "boat", "bottle",
    "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person",
    "pottedplant", "sheep", "sofa", "train", "tvmonitor",
]  # fmt: skip


class Entry(NamedTuple):
    """One image that a split lists."""

    folder: Path  # the VOC-layout folder, like VOCdevkit/VOC2012
    name: str  # of the image, without folder and ending


# --- split lists


def list_images(
    root: Path, splits: list[str], exclude: list[str], places: Places = VOC_PLACES
) -> list[Entry]:
    """The images of the splits, each photograph once, less those of the excluded splits.

    Prints how many were repeated, and how many left out. Raises UserError where a split
    does not exist or no image is left.
    """
    listed = list_splits(root, splits, places)
    excluded = {photograph(entry, places) for entry in list_splits(root, exclude, places)}
    unique: dict[tuple[str, str], Entry] = {}
    for entry in listed:
        unique.setdefault(photograph(entry, places), entry)
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


def list_splits(root: Path, splits: list[str], places: Places) -> list[Entry]:
    """The images of several splits, one split after the other."""
    entries: list[Entry] = []
    for split in splits:
        entries += list_split(root, split, places)
    return entries


def list_split(root: Path, split: str, places: Places) -> list[Entry]:
    """The images of a split, in its order. `all` is every annotated image, listed or not; and
    every other image where those are background. What ends with .txt is the path of a list
    that lies anywhere.

    Raises UserError, with the remedy, for a folder or a split that does not exist or
    lists nothing.
    """
    if split.endswith(LIST) and "\0" not in split:
        return list_own(root, Path(split).expanduser(), places)
    if ".." in split or "\0" in split:
        raise UserError(
            f"split {split!r} is not a folder and a name, like VOC2012/trainval; correct `splits`"
        )
    folder_name, name = folder_and_list(root, split, places)
    remedy = "correct `root` or `splits`"
    if places.found():
        remedy += "; without lists leave `splits` out, and write `val: {share: 0.2}`"
    if folder_name in ("VOC2007", "VOC2012"):
        remedy = f"fetch it with `python -m kdmini.tools.download --root {root}`"

    above = candidates(root, folder_name)
    folder = next((path for path in above if has_places(path, places)), None)
    if folder is None:
        raise UserError(
            f"{root / folder_name}: no such folder, or no {places.annotations} in it; {remedy}"
        )

    known = known_names(folder, places)
    lists = lists_in(folder, places)
    path = Path(one_of(lists.get(composed(name), []), (LIST,)))
    if name == "all":
        names = sorted(known.all)
        listed = listed_in(place_of_lists(folder, places), known.some)
        print(f"{split}: {len(names):,} {known.title}{listed}")
    elif path.name:
        names = read_ids(path, known.some)
    else:
        # with a `_` in their names are VOC's lists per class
        usual = sorted(list_name for list_name in lists if "_" not in list_name)
        choice = ", ".join(usual) or "no list"
        place = place_of_lists(folder, places)
        raise UserError(f"{place / name}.txt: no such split ({choice}, and `all`); {remedy}")
    if not names:
        raise UserError(f"{folder}: split {name!r} lists no image; {remedy}")
    return [Entry(folder, image) for image in names]


def folder_and_list(root: Path, split: str, places: Places) -> tuple[str, str]:
    """The two parts of a split: "VOC2012" and "trainval"; of "train", where that is a folder
    and no list, "train" and "all".
    """
    folder_name, _, name = split.rpartition("/")
    above = candidates(root, folder_name)
    is_listed = any(composed(name) in lists_in(path, places) for path in above)
    if name != "all" and not is_listed and has_places(root / split, places):
        return split, "all"
    return folder_name, name


def place_of_lists(folder: Path, places: Places) -> Path:
    return folder / "ImageSets" / places.lists


def lists_in(folder: Path, places: Places) -> dict[str, list[str]]:
    """Name -> files, of the lists of a folder."""
    return files(place_of_lists(folder, places))


def list_own(root: Path, path: Path, places: Places) -> list[Entry]:
    """The images in root itself that a list from anywhere names, in its order.

    A line may name them as the usual lists of the masks of SBD do,
    `/JPEGImages/2007_000032.jpg /SegmentationClassAug/2007_000032.png`. Raises UserError.
    """
    if not os.path.isfile(path):
        raise UserError(
            f"{path}: no such file; correct `splits`, where what ends with {LIST} is the path "
            "of a list"
        )
    if not has_places(root, places):
        raise UserError(
            f"{root}: no such folder, or no {places.annotations} in it; for a list of your own "
            f"`root` is the folder of {places.images} itself"
        )
    names = read_ids(path, known_names(root, places).some, f"{places.images}/")
    if not names:
        raise UserError(f"{path}: lists no image; correct it or `splits`")
    return [Entry(root, image) for image in names]


class Known(NamedTuple):
    """The names in a folder."""

    all: set[str]  # of the split `all`
    some: set[str]  # of any image or annotation
    title: str  # what `all` is, and what it leaves out


def known_names(folder: Path, places: Places) -> Known:
    annotated = names_with(places.annotated(folder), places.endings)
    pictured = names_with(places.pictured(folder), IMAGES)
    alone = pictured - annotated
    known = annotated | pictured
    where = places.words()
    if alone and places.background:
        return Known(known, known, f"images{where}, {len(alone):,} of them without an annotation")

    remarks = [f"annotated images{where}"]
    if alone:
        way_out = " (or set background=true)" if places.endings == ANNOTATIONS else ""
        remarks.append(f"{len(alone):,} without an annotation left out{way_out}")
    others = list(os.scandir(folder / places.annotations))
    left_by_macos = sum(item.name.startswith(APPLE_DOUBLE) for item in others)
    if left_by_macos:
        remarks.append(f"{left_by_macos:,} files `._*` of macOS passed over")
    folders = 0 if places.recursive else sum(is_folder_of(item, places) for item in others)
    if folders:
        remarks.append(
            f"{folders:,} folders in {places.annotations} not read (or set recursive=true)"
        )
    return Known(annotated, known, ", ".join(remarks))


def is_folder_of(item: os.DirEntry[str], places: Places) -> bool:
    """Of annotations that are not read: any in a folder that holds nothing else."""
    if places.endings != ANNOTATIONS or not item.is_dir():
        return False
    return places.annotations != "." or bool(names_with(files(Path(item.path)), ANNOTATIONS))


def listed_in(place: Path, known: Collection[str]) -> str:
    """How many images the usual list has, as the end of a line; empty without the list."""
    trainval = place / f"trainval{LIST}"
    if not trainval.is_file():
        return ""
    count = len(read_ids(trainval, known))
    return f", of which ImageSets/{place.name}/trainval lists {count:,}"


def read_ids(path: Path, known: Collection[str], images: str = "") -> list[str]:
    """The names in a split file, in order. Raises UserError for one that leads elsewhere.

    known: the names of files. A line is the name that it begins with, whatever ending or
    columns come after it: VOC's lists per class have -1, 0 or 1 there, VoTT's endings too.
    images: the folder, as "JPEGImages/", that may stand before a name.
    """
    check_kind(path)
    names = []
    more = 0
    for text in path.read_text("utf-8-sig", "replace").split("\n"):
        line = composed(text.strip())
        if not line:
            continue
        name = name_in(without_folder(line, images), known)
        if name not in known and (".." in name or re.search(r"[/\\\0]", name)):
            raise UserError(f"{path}: {name!r} is not the name of an image; names have no folder")
        names.append(name)
        more += name != line
    if more:
        print(f"{path}: endings or further columns of {more:,} lines passed over")
    return names


def name_in(line: str, known: Collection[str]) -> str:
    """The known name of a line, as long as may be; of none that is known, the likely one."""
    rest = line
    while rest:
        for name in (rest, without_ending(rest)):
            if name in known:
                return name
        rest = re.sub(r"\s*\S+$", "", rest)
    return without_ending(re.sub(r"\s+(-1|0|1)$", "", line))


def without_folder(line: str, images: str) -> str:
    """ "a.jpg" of "/JPEGImages/a.jpg /SegmentationClassAug/a.png"; else the line."""
    path = re.match(rf"/?{re.escape(images)}(\S+)", line) if images else None
    return path[1] if path else line


def without_ending(name: str) -> str:
    stem, ending = os.path.splitext(name)
    return stem if ending.lower() in IMAGES + ANNOTATIONS else name


# --- photographs

real_path = cache(os.path.realpath)  # asked for every photograph


def photograph(entry: Entry, places: Places = VOC_PLACES) -> tuple[str, str]:
    """What a photograph is known by in every set: the folder that it is in, and its name there.

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
    return os.path.split(os.path.normpath(os.path.join(real_path(root), year, places.images, name)))


# --- class names


def class_names(names: list[str] | None, usual: list[str]) -> list[str]:
    """Those given, or else the usual ones. Raises UserError where one of them comes twice."""
    known = list(usual if names is None else names)
    if not known or len(set(known)) < len(known):
        raise UserError(f"`names` is empty or names a class twice: {known}")
    return known


def nearest(name: str, known: list[str]) -> str:
    """The one of the known names that is spelt most like `name`, whatever the case."""

    def likeness(other: str) -> float:
        return difflib.SequenceMatcher(None, name.lower(), other.lower()).ratio()

    return max(known, key=likeness)
