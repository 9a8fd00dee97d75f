"""PASCAL VOC for segmentation, and every folder laid out like it: one palette PNG an image.

Legend: H, W size of an image; K classes, the background among them.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from kdmini.contracts import UserError
from kdmini.data.folders import find_file
from kdmini.data.pictures import DEEP, IMAGES, UPRIGHT, Bits, read, remark_on_bits
from kdmini.data.places import Places
from kdmini.data.voc import VOC_NAMES, Entry, class_names, list_images, photograph
from kdmini.segmentation.masks import MASKS, count_pixels, read_mask
from kdmini.segmentation.truth import VOID, Masks, Target

SEGMENTED_NAMES = ["background", *VOC_NAMES]
MOST_LISTED = 20  # classes in a remark


class Record(NamedTuple):
    """One image of the dataset; its pixels are still on the disk."""

    id: str
    image: str  # path
    mask: str  # path


class Count(NamedTuple):
    """Of one image that was read."""

    id: str
    pixels: np.ndarray  # (K + 1,) int64, of each class and last of void
    used_bits: int | None
    turned: bool  # by EXIF, and the mask is not


class VOC:
    """Splits of VOC-layout folders, as a `kdmini.contracts.Dataset`.

    root: the folder that holds VOC2012, or its parent with VOCdevkit/ inside.
    splits: "VOC2012/train" is ImageSets/Segmentation/train.txt of that folder; "train",
        without a folder, belongs to root itself; the name `all` stands for every mask,
        listed or not; "my/list.txt" is a list that lies anywhere, of images in root itself.
    names: the classes, in the order of the indices: the background is the first; by default
        that and the twenty of VOC.
    exclude: splits whose photographs are left out, under whatever id they appear.
    images: folder of the images in that of the split; `.` is the folder itself.
    masks: folder of the masks, likewise, or an absolute path, as of those of SBD: PNGs whose
        pixels are indices, in mode P or L, 255 void.
    bits: used of images of 16 bits, such as 12 of a thermal camera; they are scaled to 8.
    as_stored: masks belong to the pixels as they are stored, whatever EXIF says; else an
        image of which that is not clear is an error.

    A photograph that several splits name is taken once. Target ids are
    "VOC2012/2007_000032".

    Raises UserError at construction for a split that does not exist; for an image whose
    files are missing or wrong, when it is asked for: so whoever reads all of them can tell
    of all that is wrong at once.
    """

    truth = Masks

    def __init__(
        self,
        root: str,
        splits: list[str],
        names: list[str] | None = None,
        exclude: list[str] | None = None,
        images: str = "JPEGImages",
        masks: str = "SegmentationClass",
        bits: Bits = DEEP,
        as_stored: bool = False,
    ):
        self.names = class_names(names, SEGMENTED_NAMES)
        if len(self.names) > VOID:
            raise UserError(f"`names` has {len(self.names):,} classes; a mask holds {VOID} at most")
        self.bits = bits
        self.as_stored = as_stored

        # absolute, not resolved: a folder that is a link keeps its own name
        folder = Path(root).expanduser().absolute()
        place = Path(masks).expanduser()
        if place.is_absolute() and not place.is_dir():
            raise UserError(f"{place}: no such folder; correct `masks`")
        self.places = Places(images, str(place), lists="Segmentation", endings=MASKS)
        entries = list_images(folder, splits, exclude or [], self.places)
        self.ids = [f"{entry.folder.name}/{entry.name}" for entry in entries]
        self.photographs = {photograph(entry, self.places) for entry in entries}
        self.records = find_records(entries, self.places)
        self.counts: dict[int, Count] = {}  # by index: threads need no lock, and some read twice

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[np.ndarray, Target]:
        """-> image (H, W, 3) uint8 RGB, and its mask, as large. Raises UserError."""
        record = self.records[index]
        if isinstance(record, UserError):
            raise record
        picture = read(record.image, bits=self.bits)
        mask = read_mask(record.mask, picture, record.image, self.as_stored)
        pixels = count_pixels(record.mask, mask, len(self.names))
        is_turned = picture.orientation != UPRIGHT
        self.counts[index] = Count(record.id, pixels, picture.used_bits, is_turned)
        return picture.pixels, Target(mask=mask, id=record.id)

    def report(self) -> str:
        """What is worth knowing of the images read so far, in one line; empty if nothing is.

        Raises UserError where none of them has a pixel of a class.
        """
        counts = [self.counts[index] for index in sorted(self.counts)]
        if not counts:
            return ""
        void = [count.id for count in counts if not count.pixels[:-1].any()]
        if len(void) == len(counts):
            raise UserError(
                f"the masks of all {len(counts):,} images are void, index {VOID}, alone, as "
                f"{void[0]}; correct them"
            )
        remarks = []
        if void:
            remarks.append(f"{len(void):,} masks of void alone, as {void[0]}")
        total = np.sum([count.pixels for count in counts], axis=0)
        absent = [name for name, pixels in zip(self.names, total[:-1], strict=True) if not pixels]
        if absent:
            more = f" and {len(absent) - MOST_LISTED:,} more" if len(absent) > MOST_LISTED else ""
            remarks.append(f"no pixel of {', '.join(absent[:MOST_LISTED])}{more}")
        turned = sum(count.turned for count in counts)
        if turned:
            remarks.append(f"{turned:,} images turned by EXIF, and their masks are not")
        dark = remark_on_bits([count.used_bits for count in counts], self.bits)
        return ", ".join([*remarks, dark] if dark else remarks)


def find_records(entries: list[Entry], places: Places) -> list[Record | UserError]:
    """The files of each image. In the place of a record is what is wrong with them."""
    folders = {entry.folder for entry in entries}
    images = {folder: places.pictured(folder) for folder in folders}
    masks = {folder: places.annotated(folder) for folder in folders}

    records: list[Record | UserError] = []
    for folder, name in entries:
        try:
            wanted = folder / places.images / f"{name}.jpg"
            image = find_file(images[folder], name, wanted, IMAGES, folder)
            wanted = folder / places.annotations / f"{name}.png"
            mask = find_file(masks[folder], name, wanted, MASKS, folder)
            records.append(Record(f"{folder.name}/{name}", image, mask))
        except UserError as error:
            records.append(error)
    return records
