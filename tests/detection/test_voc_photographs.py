"""VOC for detection on real photographs, read where they lie beside the repository."""

import shutil
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import VOCDetection

from kdmini.detection.voc import VOC, VOC_NAMES

PHOTOS = Path(__file__).resolve().parents[2] / ".." / "shared" / "data"
pytestmark = pytest.mark.skipif(
    not PHOTOS.is_dir(), reason="no real photographs beside the repository"
)


@pytest.mark.parametrize(
    ("folder", "split", "count"),
    [
        ("voc20-320", "train", 3000),
        ("voc20-320", "val", 800),
        ("voc-original", "train", 32),
        ("voc-original", "val", 8),
    ],
)
def test_real_sets_agree_with_torchvision(folder, split, count):
    dataset = VOC(str(PHOTOS / folder), [split])
    assert len(dataset) == count
    for index in range(0, count, max(count // 20, 1)):
        image, target = dataset[index]
        name = target["id"].removeprefix(f"{folder}/")
        root = ET.parse(PHOTOS / folder / "Annotations" / f"{name}.xml").getroot()
        objects = VOCDetection.parse_voc_xml(root)["annotation"]["object"]
        boxes = []
        for theirs in objects:
            box = theirs["bndbox"]
            boxes.append([float(box[side]) for side in ("xmin", "ymin", "xmax", "ymax")])
        np.testing.assert_array_equal(target["boxes_xyxy"] + [1, 1, 0, 0], boxes)
        classes = [dataset.names[label] for label in target["labels"]]
        assert classes == [theirs["name"] for theirs in objects]
        with Image.open(PHOTOS / folder / "JPEGImages" / f"{name}.jpg") as photo:
            np.testing.assert_array_equal(image, np.asarray(photo.convert("RGB")))
    assert dataset.report() == ""


class Messy(NamedTuple):
    """What a real file comes to."""

    names: list[str]
    count: int  # of the boxes that are kept
    box: list[int]  # one of them
    report: str = ""


OTHER_SIZE = "1 images of another size than stated, as ID (pixels count)"
MESSY = {
    # a point is one pixel
    "bccd/BloodImage_00343": Messy(["RBC", "WBC", "Platelets"], 12, [180, 328, 181, 329]),
    # floats from 0, no <difficult>, .jpeg
    "cctv/000000": Messy(["vehicle"], 10, [0, 89, 8, 110]),
    # grey
    "coco256/000000000086": Messy(["person", "motorbike", "handbag"], 3, [152, 183, 281, 559]),
    "helmet/000102": Messy(["head", "helmet"], 6, [793, 354, 839, 409], OTHER_SIZE),
    "helmet/000574": Messy(["helmet"], 2, [499, 340, 500, 341]),
    # grey
    "raccoon/raccoon-150": Messy(["raccoon"], 1, [79, 61, 187, 169]),
    "voc_part/2007_000027": Messy(VOC_NAMES, 1, [173, 100, 349, 351]),
}


@pytest.mark.parametrize("file", MESSY)
def test_real_messy_files(tmp_path, file):
    expected = MESSY[file]
    source = PHOTOS / "messy" / file
    for part in ("Annotations", "JPEGImages"):
        (tmp_path / part).mkdir()
    for path in source.parent.glob(f"{source.name}.*"):
        part = "Annotations" if path.suffix == ".xml" else "JPEGImages"
        shutil.copyfile(path, tmp_path / part / path.name)

    dataset = VOC(str(tmp_path), ["all"], names=expected.names)
    image, target = dataset[0]
    height, width, channels = image.shape
    boxes = target["boxes_xyxy"]
    assert channels == 3
    assert len(boxes) == expected.count
    assert expected.box in boxes.tolist()
    assert (boxes >= 0).all()
    assert (boxes[:, 2:] <= [width, height]).all()
    assert dataset.report() == expected.report.replace("ID", target["id"])
