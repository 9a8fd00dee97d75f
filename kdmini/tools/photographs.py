"""The images that a user names: found, read, and never overwritten."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from kdmini.contracts import Target, Truth, UserError
from kdmini.data.pictures import FORMATS, decode
from kdmini.data.store import Store
from kdmini.typed import printable

Image.init()
OUTSIDE = "EPS"  # Pillow would hand such a file to another program
READABLE = tuple(name for name in Image.OPEN if name != OUTSIDE)
ENDINGS = {ending for ending, name in Image.registered_extensions().items() if name in READABLE}

LONGEST_STEM = 200  # bytes; a name of a file has 255 at most


class Photographs:
    """Image files without annotations, as a `kdmini.contracts.Dataset`.

    ids: of the images. truth: of the task. formats: Pillow's names of what is read.
    `refused` has the files that could not be read.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        ids: Sequence[str],
        truth: type[Truth],
        formats: tuple[str, ...] = FORMATS,
    ):
        self.names: list[str] = []
        self.paths = paths
        self.ids = ids
        self.truth = truth
        self.formats = formats
        self.refused: dict[int, Path] = {}  # by index: some are read twice

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[np.ndarray, Target]:
        path = self.paths[index]
        try:
            image = self.read(path)
        except UserError:
            self.refused[index] = path
            raise
        return image, {"id": self.ids[index]}  # all that is known of it

    def read(self, path: Path) -> np.ndarray:
        """An image file as (H, W, 3) uint8 RGB. Raises UserError."""
        if not os.path.isfile(path):  # a pipe would be waited for
            raise UserError(f"{printable(path)}: no such file")
        try:
            return decode(path, self.formats)
        except UserError as error:
            raise UserError(printable(error)) from None


def find_images(inputs: Sequence[str]) -> tuple[list[Path], int]:
    """Files as named, and of a folder those with the ending of a picture; each once.

    And how many folders have none, or cannot be looked into; each of these is named.
    Raises UserError where no file is left.
    """
    paths: list[Path] = []
    refused = 0
    for path in map(Path, inputs):
        try:
            inside = pictures_in(path) if os.path.isdir(path) else [path]
        except UserError as error:
            refused += 1
            print(error, file=sys.stderr)
            continue
        paths += inside
    if not paths:
        raise UserError("no image to look at; each folder is named above")
    unique = {os.path.realpath(path): path for path in paths}
    return list(unique.values()), refused


def pictures_in(folder: Path) -> list[Path]:
    """Raises UserError where there are none."""
    try:
        files = sorted(file for file in folder.iterdir() if file.suffix.lower() in ENDINGS)
    except OSError as error:
        raise UserError(
            f"{printable(folder)}: cannot be looked into ({error.strerror}); name another"
        ) from error
    if not files:
        raise UserError(
            f"{printable(folder)}: no pictures in this folder; name one that holds them, or files"
        )
    return files


def stems(paths: Sequence[Path]) -> dict[Path, str]:
    """A name, without an ending, for what is made of each; all differ, though the images' own
    may not.
    """
    names: dict[Path, str] = {}
    taken: set[str] = set()  # in small letters, for file systems that do not tell A from a
    for path in paths:
        # so many bytes that an ending and a number still fit the file system
        stem = path.stem
        while len(os.fsencode(stem)) > LONGEST_STEM:
            stem = stem[:-1]
        name = stem
        number = 1
        while name.lower() in taken:
            number += 1
            name = f"{stem}-{number}"
        taken.add(name.lower())
        names[path] = name
    return names


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


def stored(photographs: Photographs, imgsz: int, device: torch.device) -> Store:
    """Those that can be read; the others are named. Raises UserError where none can."""
    try:
        return Store(photographs, imgsz, device, on_bad="skip")
    except UserError:
        if len(photographs.refused) < len(photographs):
            raise
        raise UserError("no image could be read; each is named above") from None
