"""PASCAL VOC for detection, and every folder of images with an XML file each.

Legend: G objects of an image.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from kdmini.contracts import UserError
from kdmini.data.folders import ANNOTATIONS, composed, find_file, one_of
from kdmini.data.pictures import DEEP, IMAGES, Bits
from kdmini.data.places import Places, located
from kdmini.data.voc import (
    VOC_NAMES,
    Entry,
    class_names,
    list_images,
    nearest,
    photograph,
)
from kdmini.detection.samples import Marked, Samples
from kdmini.detection.truth import Boxes, BoxesAndRegions, Difficult, Target
from kdmini.detection.voc_xml import NOTHING, Annotation, read_annotation
from kdmini.typed import short

MOST_LISTED = 20  # unknown classes in a message
QUICK = 2000  # so many annotations are read before a progress bar would be of use


class Record(NamedTuple):
    """One image of the dataset; its pixels are still on the disk."""

    id: str
    image: str  # path
    annotation: Annotation
    labels: np.ndarray  # (G,) int64
    has_file: bool  # an XML file; else it is background


class VOC:
    """Folders with an XML file for each image, as a `kdmini.contracts.Dataset`.

    root: the folder of the images; or the one that holds VOC2007 and VOC2012, or its parent
        with VOCdevkit/ inside.
    splits: "VOC2012/trainval" is ImageSets/Main/trainval.txt of that folder; "train",
        without a folder, belongs to root itself, or is a folder in it with images and XML
        files, all of which are meant; the name `all` stands for every annotation file, listed
        or not; "my/list.txt" is a list that lies anywhere, of images in root itself.
    names: the classes, in the order of the labels; the twenty of VOC by default.
    exclude: splits whose photographs are left out, under whatever id they appear.
    images: folder of the images in that of the split; `.` is the folder itself. Without a
        folder JPEGImages, images and XML files are sought there and in the folders in it.
    annotations: folder of the XML files, likewise.
    background: an image without an XML file is one without objects, also in `all`.
    recursive: the folders below are read too, each XML file beside its image or in the folder
        of the same name among the annotations.
    enclose: take the upright box around a <robndbox> of roLabelImg; else it is an error.
    bits: used of images of 16 bits, such as 12 of a thermal camera; they are scaled to 8.
    as_stored: boxes belong to the pixels as they are stored, whatever <size> and EXIF say;
        else an image of which that is not clear is an error.
    difficult: what becomes of difficult objects in training: `background`, as if they were
        not there; `ignore`, a detector does not learn that there is nothing where they lie.

    All XML files are read at construction. A photograph that several splits name is
    taken once. Target ids are "VOC2012/2007_000027".

    Raises UserError at construction for a split or a class that does not exist; for an
    image whose files are missing or wrong, when it is asked for: so whoever reads all
    of them can tell of all that is wrong at once.
    """

    truth: type[Boxes] = Boxes

    def __init__(  # noqa: PLR0913 - the schema of a section
        self,
        root: str,
        splits: Sequence[str] = ("all",),
        names: list[str] | None = None,
        exclude: list[str] | None = None,
        images: str = "JPEGImages",
        annotations: str = "Annotations",
        background: bool = False,
        recursive: bool = False,
        enclose: bool = False,
        bits: Bits = DEEP,
        as_stored: bool = False,
        difficult: Difficult = "background",
    ):
        if difficult == "ignore":  # else that of the class, which a subclass may have replaced
            self.truth = BoxesAndRegions
        self.names = class_names(names, VOC_NAMES)
        # absolute, not resolved: a folder that is a link keeps its own name
        folder = Path(root).expanduser().absolute()
        chosen = list(splits)
        self.places = located(folder, chosen, Places(images, annotations, background, recursive))
        entries = self._choose(folder, chosen, exclude or [])
        self.ids = [id_of(entry) for entry in entries]
        self.photographs = {photograph(entry, self.places) for entry in entries}
        self.records = read_records(entries, self.names, self.places, enclose)
        self.samples = Samples(bits, as_stored)

    def _choose(self, root: Path, splits: list[str], exclude: list[str]) -> list[Entry]:
        """The images to read. A subclass may take fewer."""
        return list_images(root, splits, exclude, self.places)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[np.ndarray, Target]:
        """-> image (H, W, 3) uint8 RGB, and its objects, clipped to the image."""
        record = self.records[index]
        if isinstance(record, UserError):
            raise record
        annotation = record.annotation
        marked = Marked(
            id=record.id,
            boxes_xyxy=annotation.boxes_xyxy,
            labels=record.labels,
            difficult=annotation.difficult,
            size=annotation.size,
            faults=annotation.faults,
        )
        return self.samples.sample(index, record.image, marked)

    def report(self) -> str:
        """What was set right in the images read so far, in one line; empty if nothing was."""
        remarks = []
        seen = [self.records[index] for index in self.samples.counts]
        records = [record for record in seen if isinstance(record, Record)]
        unsaid = sum(record.annotation.unsaid for record in records)
        if unsaid:
            remarks.append(f"{unsaid:,} objects that do not say if difficult, taken as not")
        without = sum(not record.has_file for record in records)
        if without:
            remarks.append(f"{without:,} images without an XML file taken as background")
        rest = self.samples.report()
        return ", ".join([*remarks, rest] if rest else remarks)


def id_of(entry: Entry) -> str:
    return f"{entry.folder.name}/{entry.name}"


def read_records(
    entries: list[Entry], names: list[str], places: Places, enclose: bool
) -> list[Record | UserError]:
    """Parse all annotations. In the place of a record is what is wrong with its files.

    Raises UserError when all are read, if objects are of classes that are not in names.
    """
    folders = {entry.folder for entry in entries}
    images = {folder: places.pictured(folder) for folder in folders}
    annotations = {folder: places.annotated(folder) for folder in folders}
    label_of = {composed(name): label for label, name in enumerate(names)}

    records: list[Record | UserError] = []
    unknown: list[tuple[str, str]] = []  # file and class of each object
    hidden = len(entries) <= QUICK or None  # None: a bar on a terminal alone
    for entry in tqdm(entries, "annotations", unit="file", leave=False, disable=hidden):
        folder, name = entry
        try:
            wanted = folder / places.images / f"{name}.jpg"
            image = find_file(images[folder], name, wanted, IMAGES, folder)
            path = find_annotation(annotations[folder], folder, name, places)
            annotation = read_annotation(Path(path), enclose) if path else NOTHING
        except UserError as error:
            records.append(error)
            continue
        labels = np.array([label_of.get(known, -1) for known in annotation.classes], np.int64)
        unknown += [(path, other) for other in annotation.classes if other not in label_of]
        records.append(Record(id_of(entry), image, annotation, labels, bool(path)))

    if unknown:
        path, first = unknown[0]
        counts = Counter(class_name for _, class_name in unknown)
        common = counts.most_common(MOST_LISTED)
        listed = ", ".join(f"{short(class_name)} {count:,}x" for class_name, count in common)
        if len(counts) > MOST_LISTED:
            listed += f" and {len(counts) - MOST_LISTED:,} more"
        near = nearest(first, names)
        raise UserError(
            f"{path}: unknown class {short(first)}, the nearest known is {near!r}; "
            f"list the classes in `names:` (unknown: {listed})"
        )
    return records


def find_annotation(paths: dict[str, list[str]], folder: Path, name: str, places: Places) -> str:
    """The path of the XML file; "" of an image that is background. Raises UserError."""
    wanted = folder / places.annotations / f"{name}.xml"
    if one_of(paths.get(name, []), ANNOTATIONS):
        return find_file(paths, name, wanted, ANNOTATIONS, folder)
    if places.background:
        return ""
    raise UserError(
        f"{wanted}: no such file; restore it or take {name!r} out of the split, or set "
        "`background: true` if its image has no objects"
    )
