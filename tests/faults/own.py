"""A copy of the generated set that a test may spoil."""

from pathlib import Path
from typing import Any

import numpy as np

from kdmini.data.store import Store
from kdmini.detection.voc import VOC

SHAPES = ["circle", "square", "triangle", "star", "ring", "cross"]


class Own:
    """A VOC-layout folder of 24 training and 8 validation images of 64 pixels.

    lists: of which task, a folder in ImageSets.
    """

    def __init__(self, folder: Path, lists: str = "Main"):
        self.folder = folder
        self.lists = self.folder / "ImageSets" / lists

    def names(self, split: str = "train") -> list[str]:
        return self.split_file(split).read_text().split()

    def split_file(self, split: str = "train") -> Path:
        return self.lists / f"{split}.txt"

    def image(self, name: str) -> Path:
        (path,) = (self.folder / "JPEGImages").glob(f"{name}.*")
        return path

    def xml(self, name: str) -> Path:
        return self.folder / "Annotations" / f"{name}.xml"

    def mask(self, name: str) -> Path:
        return self.folder / "SegmentationClass" / f"{name}.png"

    def split(self, *lines: str) -> None:
        """Writes the list of the training images."""
        self.split_file().write_text("".join(f"{line}\n" for line in lines))

    def new_image(self, name: str) -> Path:
        """Takes an image away -> where another may be put, as a .jpg whatever is in it."""
        self.image(name).unlink()
        return self.folder / "JPEGImages" / f"{name}.jpg"

    def read(self, **settings: Any) -> VOC:
        return VOC(str(self.folder), ["train"], names=SHAPES, **settings)

    def store(self, on_bad: str = "stop", size: int = 64, **settings: Any) -> Store:
        dataset = self.read(**settings)
        return Store(dataset, size, workers=2, storage="resident", on_bad=on_bad, name="train")


def pixels(store: Store, index: int) -> np.ndarray:
    """(H, W, 3) as the store keeps it."""
    height, width = store.sizes[index]
    first = store.offsets[index]
    packed = store.pixels[first : first + height * width].numpy()
    four_bytes = packed.astype("<i4").view(np.uint8)
    return four_bytes.reshape(height, width, 4)[..., :3]
