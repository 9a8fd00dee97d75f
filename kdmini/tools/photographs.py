"""The images that a user names: found, read as people look at them, and never overwritten.

Legend: H rows and W columns of an image.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from kdmini.contracts import Target, Truth, UserError
from kdmini.data.pictures import read
from kdmini.data.room import ROOM
from kdmini.tools.video import VIDEOS
from kdmini.typed import printable

Image.init()
OUTSIDE = "EPS"  # Pillow would hand such a file to another program
READABLE = tuple(name for name in Image.OPEN if name != OUTSIDE)
REGISTERED = Image.registered_extensions()
ENDINGS = {ending for ending, name in REGISTERED.items() if name in READABLE} - VIDEOS

LONGEST_STEM = 200  # bytes; a name of a file has 255 at most


class Photographs:
    """Image files without annotations, as a `kdmini.contracts.Dataset`.

    ids: of the images. truth: of the task.
    """

    def __init__(self, paths: Sequence[Path], ids: Sequence[str], truth: type[Truth]):
        self.names: list[str] = []
        self.paths = paths
        self.ids = ids
        self.truth = truth

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[np.ndarray, Target]:
        # all that is known of it
        return read_upright(self.paths[index]), {"id": self.ids[index]}


def read_upright(path: Path) -> np.ndarray:
    """An image file as (H, W, 3) uint8 RGB, turned as EXIF asks for it. Raises UserError."""
    if not os.path.isfile(path):  # a pipe would be waited for
        raise UserError(f"{printable(path)}: no such file")
    try:
        decoded = read(path, READABLE)
    except UserError as error:
        raise UserError(printable(error)) from None
    return turned(decoded.pixels, decoded.orientation)


def turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """(H, W, 3) as stored -> as people look at it.

    orientation: of EXIF, 1 to 8: which sides of the picture row 0 and column 0 are.
    """
    if orientation >= 5:  # row 0 is the left or the right side
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):  # from the bottom up
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):  # from the right
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


class Picture(NamedTuple):
    """An image file, read."""

    path: Path
    pixels: np.ndarray | None  # (H, W, 3) uint8 RGB; None where it cannot be used
    fault: str = ""  # why not


def read_together(paths: Sequence[Path], count: int) -> Iterator[list[Picture]]:
    """In order, `count` at a time, and so many are decoded at once."""
    with ThreadPoolExecutor(count) as pool:
        for start in range(0, len(paths), count):
            yield list(pool.map(picture_at, paths[start : start + count]))


def picture_at(path: Path) -> Picture:
    try:
        with ROOM.one_image():
            return Picture(path, read_upright(path))
    except UserError as error:
        return Picture(path, None, str(error))


def listed(inputs: Sequence[str]) -> list[str]:
    """The names, and in the place of `-` those that stand on the lines of the standard input."""
    names: list[str] = []
    for name in inputs:
        if name == "-":
            lines = sys.stdin.buffer.read().split(b"\n") if sys.stdin else []
            names += [os.fsdecode(line.rstrip(b"\r")) for line in lines if line.strip()]
        else:
            names.append(name)
    return names


def find_images(
    inputs: Sequence[str], recursive: bool = False, but: Path | None = None
) -> tuple[list[Path], int]:
    """Files as named, and of a folder those with the ending of a picture; each once.

    And how many folders have none, or cannot be looked into; each of these is named.
    recursive: in the folders of a folder, too, except in `but`.
    """
    paths: list[Path] = []
    faults: list[str] = []
    for path in map(Path, inputs):
        if os.path.isdir(path):
            inside, wrong = pictures_in(path, recursive, but)
            paths += inside
            faults += wrong
        else:
            paths.append(path)
    for fault in faults:
        print(fault, file=sys.stderr)
    unique = {os.path.realpath(path): path for path in paths}
    return list(unique.values()), len(faults)


def pictures_in(folder: Path, recursive: bool, but: Path | None) -> tuple[list[Path], list[str]]:
    """-> the files with the ending of a picture, and what is wrong: folders that cannot be
    looked into, or no picture at all.
    """
    pictures: list[Path] = []
    errors: list[OSError] = []
    for place, inner, names in os.walk(folder, onerror=errors.append):
        kept = sorted(inner) if recursive else []
        inner[:] = [name for name in kept if not same(Path(place, name), but)]
        files = [Path(place, name) for name in sorted(names)]
        pictures += [file for file in files if file.suffix.lower() in ENDINGS]
    faults = [
        f"{printable(error.filename)}: cannot be looked into ({error.strerror}); name another"
        for error in errors
    ]
    if not pictures and not faults:
        more = "" if recursive else ", or say --recursive"
        faults = [
            f"{printable(folder)}: no pictures in this folder; name one that holds them, or "
            f"files{more}"
        ]
    return pictures, faults


def same(path: Path, other: Path | None) -> bool:
    return other is not None and os.path.realpath(path) == os.path.realpath(other)


def stems(names: Sequence[str]) -> list[str]:
    """For each a name, without an ending, for what is made of it; all differ, though the
    images' own may not.
    """
    found: list[str] = []
    taken: set[str] = set()  # in small letters, for file systems that do not tell A from a
    for name in names:
        # so many bytes that an ending and a number still fit the file system
        stem = Path(name).stem
        while len(os.fsencode(stem)) > LONGEST_STEM:
            stem = stem[:-1]
        free = stem
        number = 1
        while free.lower() in taken:
            number += 1
            free = f"{stem}-{number}"
        taken.add(free.lower())
        found.append(free)
    return found


def prepare(out: Path, paths: Sequence[Path]) -> None:
    """Makes the folder.

    Raises UserError where an image lies in it, or would be overwritten through a link.
    """
    of_links = {os.path.realpath(path.parent) for path in paths}
    of_files = {os.path.dirname(os.path.realpath(path)) for path in paths}
    if os.path.realpath(out) in of_links | of_files:
        raise UserError(
            f"--out {out}: the images lie there, and are never overwritten; name another folder"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--out {out}: cannot be made ({error.strerror}); name another folder"
        ) from error


def check_results(file: Path, paths: Sequence[Path]) -> None:
    """Raises UserError where the file is a folder, or one of the images."""
    if file.is_dir():
        raise UserError(f"--jsonl {printable(file)}: is a folder; name a file")
    if any(same(path, file) for path in paths):
        raise UserError(
            f"--jsonl {printable(file)}: is an image, and never overwritten; name another file"
        )
