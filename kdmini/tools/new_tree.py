"""The files in a folder that a user names, walked once."""

import os
import re
from collections.abc import Iterable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kdmini import config
from kdmini.contracts import UserError
from kdmini.data.folders import APPLE_DOUBLE, folders_below, has_ending
from kdmini.data.pictures import IMAGES, opened

HERE = "."
SHARE = {"share": 0.2}  # of the images, where there is no split
WORDS = {  # in the name of a folder, a file or a list
    "train": {"train", "training"},
    "val": {"val", "valid", "validation"},
    "test": {"test", "testing"},
}
MASKS = re.compile(r"(^|/)segmentation(class|object)\w*$", re.IGNORECASE)  # pictures, no images
SAMPLE = 500  # images whose sizes are looked at


class Tree(NamedTuple):
    """Folder, from root, as "train/images" or "." -> the files in it, in their order."""

    root: Path
    files: dict[str, list[str]]

    def having(self, endings: tuple[str, ...]) -> dict[str, list[str]]:
        """The folders that have such files, and these."""
        found = {}
        for folder, names in self.files.items():
            fitting = [name for name in names if has_ending(name, endings)]
            if fitting:
                found[folder] = fitting
        return found

    def images(self) -> dict[str, list[str]]:
        found = self.having(IMAGES)
        return {folder: names for folder, names in found.items() if not MASKS.search(folder)}

    def paths(self, endings: tuple[str, ...]) -> list[Path]:
        """Those of all such files, the ones that lie highest first."""
        found = self.having(endings).items()
        paths = [self.root / folder / name for folder, names in found for name in names]
        return sorted(paths, key=lambda path: len(path.parts))

    def try_set(self, section: dict[str, Any]) -> None:
        """Makes the data set of a section of the config. Raises UserError."""
        with redirect_stdout(None):
            config.build(section, "data", root=str(self.root))

    def sizes(self) -> np.ndarray:
        """(n, 2) width and height of some of the images, evenly chosen, that can be opened."""
        paths = self.paths(IMAGES)
        paths = [path for path in paths if not MASKS.search(path.parent.as_posix())]
        step = max(len(paths) // SAMPLE, 1)
        sizes = []
        for path in paths[::step]:
            try:
                with opened(path) as image:
                    sizes.append(image.size)
            except UserError:  # train.py names it
                continue
        return np.array(sizes).reshape(-1, 2)


def tree_of(root: Path) -> Tree:
    """Raises UserError for what is no folder, or has no image."""
    if not root.is_dir():
        raise UserError(f"--data {root}: no such folder; name the one that holds the images")
    files = {}
    try:
        for folder in folders_below(root):
            names = [item.name for item in os.scandir(folder) if item.is_file()]
            kept = sorted(name for name in names if not name.startswith(APPLE_DOUBLE))
            files[folder.relative_to(root).as_posix()] = kept
    except OSError as error:
        raise UserError(
            f"--data {root}: cannot be looked into ({error.strerror}: {error.filename}); name "
            "another"
        ) from error
    tree = Tree(root, files)
    if not any(files.values()):
        raise UserError(f"--data {root}: the folder is empty; name the one that holds the images")
    if not tree.images():
        raise UserError(
            f"--data {root}: no image in it, nor in the folders below ({' '.join(IMAGES)}); name "
            "the folder that holds them"
        )
    return tree


def split_of(name: str) -> str:
    """The split that a name says: train, val, test or "", as of "images/train2017"."""
    words = set(re.split(r"[^a-z]+", name.lower()))
    return next((split for split, known in WORDS.items() if words & known), "")


def pair(names: Iterable[str]) -> tuple[str, str] | None:
    """The one to learn from and the one to validate on, where there is one of each. A test
    set stands in for one to validate on.
    """
    of: dict[str, list[str]] = {"train": [], "val": [], "test": [], "": []}
    for name in names:
        of[split_of(name)].append(name)
    validating = of["val"] or of["test"]
    if len(of["train"]) == len(validating) == 1:
        return of["train"][0], validating[0]
    return None
