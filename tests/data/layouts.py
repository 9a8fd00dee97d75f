"""A VOC-layout folder written anew as labelling tools lay out their folders."""

import json
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from kdmini.contracts import Dataset


def names_of(root: Path, split: str) -> list[str]:
    return (root / "ImageSets/Main" / f"{split}.txt").read_text().split()


def copy(root: Path, name: str, images: Path, annotations: Path) -> None:
    """The photograph of that name, and its XML file."""
    for source, folder in (("JPEGImages", images), ("Annotations", annotations)):
        folder.mkdir(parents=True, exist_ok=True)
        [path] = (root / source).glob(f"{name}.*")
        shutil.copy(path, folder)


def beside(root: Path, name: str, split: str, out: Path) -> None:
    """All in one folder, as labelImg leaves them."""
    copy(root, name, out, out)


def in_two(root: Path, name: str, split: str, out: Path) -> None:
    copy(root, name, out / "images", out / "annotations")


def in_one_below(root: Path, name: str, split: str, out: Path) -> None:
    """An archive that holds a folder."""
    copy(root, name, out / "export", out / "export")


def images_and_below(root: Path, name: str, split: str, out: Path) -> None:
    """An XML folder within that of the images."""
    copy(root, name, out, out / "xml")


def roboflow(root: Path, name: str, split: str, out: Path) -> None:
    """A folder for each split, with both side by side."""
    folder = out / {"val": "valid"}.get(split, split)
    copy(root, name, folder, folder)


def splits_in_two(root: Path, name: str, split: str, out: Path) -> None:
    """A folder for each split, with a folder for each kind of file."""
    copy(root, name, out / split / "images", out / split / "labels")


def nested(root: Path, name: str, split: str, out: Path) -> None:
    """Side by side, in folders by the last figure of the name."""
    folder = out / "some day" / f"camera {name[-1]}"
    copy(root, name, folder, folder)


def mirrored(root: Path, name: str, split: str, out: Path) -> None:
    """Two trees of the same folders."""
    day = f"day {name[-1]}"
    copy(root, name, out / "photos" / day, out / "labels" / day)


WRITERS: dict[str, Callable[[Path, str, str, Path], None]] = {
    writer.__name__: writer
    for writer in (
        *(beside, in_two, in_one_below, images_and_below),
        *(roboflow, splits_in_two, nested, mirrored),
    )
}


def write(layout: str, root: Path, out: Path, splits: tuple[str, ...] = ("train", "val")) -> None:
    """root: a VOC-layout folder."""
    for split in splits:
        for name in names_of(root, split):
            WRITERS[layout](root, name, split, out)


# --- other forms


def boxes_of(path: Path) -> list[tuple[str, list[float]]]:
    """Class and corners, from 0, of the objects of an XML file: written anew, not kdmini's."""
    rows = []
    for thing in ET.parse(path).getroot().findall("object"):
        corners = [float(thing.findtext(f"bndbox/{side}") or "") for side in ("xmin", "ymin")]
        far = [float(thing.findtext(f"bndbox/{side}") or "") for side in ("xmax", "ymax")]
        rows.append((thing.findtext("name") or "", [corner - 1 for corner in corners] + far))
    return rows


def write_yolo(root: Path, out: Path, names: list[str], splits: tuple[str, ...]) -> None:
    (out / "labels").mkdir(parents=True)
    (out / "data.yaml").write_text(f"names: {json.dumps(names)}")
    for split in splits:
        labels = out / "labels" / split
        labels.mkdir()
        for name in names_of(root, split):
            copy(root, name, out / "images" / split, out / "unused")
            with Image.open(root / "JPEGImages" / f"{name}.jpg") as image:
                sides = np.tile(image.size, 2)
            lines = []
            for class_name, box in boxes_of(root / "Annotations" / f"{name}.xml"):
                low, high = np.reshape(box / sides, (2, 2))
                numbers = " ".join(f"{part:.9f}" for part in (*(low + high) / 2, *high - low))
                lines.append(f"{names.index(class_name)} {numbers}")
            (labels / f"{name}.txt").write_text("\n".join(lines))


def write_coco(root: Path, out: Path, names: list[str], splits: tuple[str, ...]) -> None:
    """One folder for each split with its JSON in it, as Roboflow has it."""
    categories = [{"id": label + 1, "name": name} for label, name in enumerate(names)]
    for split in splits:
        images = []
        objects: list[dict] = []
        for number, name in enumerate(names_of(root, split)):
            copy(root, name, out / split, out / "unused")
            images.append({"id": number, "file_name": f"{name}.jpg"})
            for class_name, (x0, y0, x1, y1) in boxes_of(root / "Annotations" / f"{name}.xml"):
                thing = {"id": len(objects) + 1, "image_id": number}
                thing["category_id"] = names.index(class_name) + 1
                objects.append({**thing, "bbox": [x0, y0, x1 - x0, y1 - y0]})
        content = {"images": images, "categories": categories, "annotations": objects}
        (out / split / "_annotations.coco.json").write_text(json.dumps(content))


# --- comparison


def by_name(dataset: Dataset) -> dict[str, tuple[np.ndarray, dict]]:
    """Name of a photograph, without folder and ending -> its pixels and target."""
    samples = [dataset[index] for index in range(len(dataset))]
    return {Path(target["id"]).stem: (image, dict(target)) for image, target in samples}


def assert_same(one: Dataset, other: Dataset, atol: float = 0) -> None:
    """The same photographs with the same objects, whatever folders they lie in."""
    ours = by_name(one)
    theirs = by_name(other)
    assert len(ours) == len(one)
    assert ours.keys() == theirs.keys()
    for name, (image, target) in theirs.items():
        assert np.array_equal(ours[name][0], image), name
        assert np.array_equal(ours[name][1]["labels"], target["labels"]), name
        np.testing.assert_allclose(ours[name][1]["boxes_xyxy"], target["boxes_xyxy"], atol=atol)
        if not atol:
            assert np.array_equal(ours[name][1]["difficult"], target["difficult"]), name
