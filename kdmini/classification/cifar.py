"""CIFAR-10 and CIFAR-100 in their binary form, as their authors publish it: no pickle is
read.

    cifar-10-batches-bin/data_batch_1.bin ... data_batch_5.bin, test_batch.bin, batches.meta.txt
    cifar-100-binary/train.bin, test.bin, fine_label_names.txt

A record is the label, in CIFAR-100 the coarse and then the fine one, and 3072 bytes: a plane
of red, one of green, one of blue, 32 rows of 32 pixels each.
Source: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
"""

from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from kdmini.classification.truth import Labels, Target
from kdmini.contracts import UserError
from kdmini.data.voc import class_names
from kdmini.files import check_kind

SIDE = 32  # pixels
PIXELS = 3 * SIDE * SIDE  # bytes


class Kind(NamedTuple):
    """One of the two."""

    folder: str  # in which it is unpacked
    classes: int
    labels: int  # bytes before the pixels, of which the last is the class
    names: str  # file
    files: dict[str, list[str]]  # of each split
    records: int  # of a file of the split `train`; of `test`, 10,000


KINDS = [
    Kind(
        folder="cifar-10-batches-bin",
        classes=10,
        labels=1,
        names="batches.meta.txt",
        files={
            "train": [f"data_batch_{number}.bin" for number in range(1, 6)],
            "test": ["test_batch.bin"],
        },
        records=10_000,
    ),
    Kind(
        folder="cifar-100-binary",
        classes=100,
        labels=2,
        names="fine_label_names.txt",
        files={"train": ["train.bin"], "test": ["test.bin"]},
        records=50_000,
    ),
]


class CIFAR:
    """One split, as a `kdmini.contracts.Dataset`.

    root: the folder of the binary files, or the one above it.
    split: train, or test, the 10,000 to evaluate on.

    Which of the two it is, is told by the file of the names. Target ids are "train.bin 0".
    Raises UserError at construction for files that are missing, or of a size that records do not
    fill; for a label that is none, when it is asked for.
    """

    truth = Labels

    def __init__(self, root: str, split: Literal["train", "test"]):
        self.folder, self.kind = find(Path(root).expanduser().absolute())
        self.names = read_names(self.folder / self.kind.names, self.kind.classes)
        paths = [self.folder / name for name in self.kind.files[split]]
        self.files = [records_of(path, self.kind.labels) for path in paths]
        self.places = [
            (number, row) for number, file in enumerate(self.files) for row in range(len(file))
        ]
        self.paths = paths
        self.published = self.kind.records * len(paths) if split == "train" else 10_000
        self.photographs = {(str(paths[number]), str(row)) for number, row in self.places}

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> tuple[np.ndarray, Target]:
        """-> image (32, 32, 3) uint8 RGB, and its class. Raises UserError."""
        number, row = self.places[index]
        path = self.paths[number]
        record = self.files[number][row]
        label = int(record[self.kind.labels - 1])
        if label >= self.kind.classes:
            raise UserError(
                f"{path}: label {label} in record {row}, of {self.kind.classes} classes; the "
                "file is damaged, unpack it anew"
            )
        planes = record[self.kind.labels :].reshape(3, SIDE, SIDE)
        image = np.ascontiguousarray(planes.transpose(1, 2, 0))
        return image, Target(label=label, id=f"{path.name} {row}")

    def report(self) -> str:
        """Whether the set is smaller or larger than the published one; else empty."""
        if len(self) == self.published:
            return ""
        return f"{len(self):,} images in {self.folder}, where {self.published:,} are published"


def find(root: Path) -> tuple[Path, Kind]:
    """The folder of the binary files, and which they are. Raises UserError."""
    found = []
    for kind in KINDS:
        for folder in (root, root / kind.folder):
            if (folder / kind.names).is_file():
                found.append((folder, kind))
    if len(found) != 1:
        names = " or ".join(kind.names for kind in KINDS)
        what = f"both {found[0][0]} and {found[1][0]} lie here" if found else f"has no {names}"
        raise UserError(
            f"{root}: {what}; name the folder of one binary version, such as "
            f"{KINDS[0].folder}, as `root`"
        )
    return found[0]


def read_names(path: Path, count: int) -> list[str]:
    """A name a line. Raises UserError unless there are so many, all different."""
    names = path.read_text("utf-8", "replace").split()
    if len(names) != count:
        raise UserError(f"{path}: {len(names)} names, not {count}; unpack the file anew")
    return class_names(names, [])


def records_of(path: Path, labels: int) -> np.ndarray:
    """(M, labels + 3072) uint8, still on the disk. Raises UserError."""
    check_kind(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; unpack the binary version whole")
    length = labels + PIXELS
    size = path.stat().st_size
    if not size or size % length:
        raise UserError(
            f"{path}: {size:,} bytes, no multiple of a record's {length:,}; it is cut short or "
            "another file, fetch it anew"
        )
    return np.memmap(path, np.uint8, mode="r").reshape(-1, length)
