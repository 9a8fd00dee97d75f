"""Small folders in the layout of PASCAL VOC, written by a test: an image has one colour,
and its annotation is what the test says.
"""

from pathlib import Path

from PIL import Image

from kdmini.contracts import UserError
from kdmini.detection.voc import VOC

BOX = "<bndbox><xmin>11</xmin><ymin>6</ymin><xmax>30</xmax><ymax>25</ymax></bndbox>"
SIZE = "<size><width>40</width><height>30</height><depth>3</depth></size>"


def bndbox(xmin: object, ymin: object, xmax: object, ymax: object) -> str:
    low = f"<xmin>{xmin}</xmin><ymin>{ymin}</ymin>"
    high = f"<xmax>{xmax}</xmax><ymax>{ymax}</ymax>"
    return f"<bndbox>{low}{high}</bndbox>"


def thing(name: str = "dog", box: str = BOX, extra: str = "") -> str:
    return f"<object><name>{name}</name>{extra}{box}</object>"


def xml(objects: str, size: str = SIZE) -> str:
    return f"<annotation><filename>../../etc/passwd</filename>{size}{objects}</annotation>"


def add(
    folder: Path,
    name: str,
    text: str | None = None,
    ending: str = ".jpg",
    size: tuple[int, int] = (40, 30),
) -> None:
    """One image of `size`, width and height, and its annotation: one dog, if not said otherwise."""
    for part in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    annotation = xml(thing()) if text is None else text
    (folder / "Annotations" / f"{name}.xml").write_text(annotation)
    Image.new("RGB", size, (200, 30, 60)).save(folder / "JPEGImages" / f"{name}{ending}")


def write_split(folder: Path, split: str, *lines: str) -> None:
    text = "".join(f"{line}\n" for line in lines)
    (folder / "ImageSets" / "Main" / f"{split}.txt").write_text(text)


def one(tmp_path: Path, text: str, **settings) -> VOC:
    """The dataset of a single image with that annotation. Raises what its reading raises."""
    add(tmp_path / "set", "a", text, **settings)
    write_split(tmp_path / "set", "train", "a")
    dataset = VOC(str(tmp_path / "set"), ["train"])
    record = dataset.records[0]
    if isinstance(record, UserError) or record.annotation.faults:
        dataset[0]  # raises it
    return dataset


def ids(dataset: VOC) -> list[str]:
    return [dataset[index][1]["id"] for index in range(len(dataset))]
