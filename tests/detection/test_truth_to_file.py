"""The way of boxes back from the letterboxed images to the files."""

import numpy as np
import pytest
import torch

from kdmini.data.loader import ValLoader
from kdmini.data.store import Store
from tests.data.arrays import Size
from tests.detection.boxed import Boxed, noise_with_boxes


def val_loader_of(dataset: Boxed, batch: int) -> ValLoader:
    return ValLoader(Store(dataset, 64, workers=1, storage="resident"), batch)


def detections_of(boxes_xyxy: torch.Tensor) -> dict[str, torch.Tensor]:
    count = len(boxes_xyxy)
    return {
        "boxes_xyxy": boxes_xyxy,
        "scores": torch.rand(count),
        "labels": torch.arange(count),
    }


FILES = [  # height, width
    (64, 64),
    (37, 61),
    (61, 37),
    (1, 50),
    (999, 333),
    (375, 500),
    (501, 77),
    (3001, 2003),
    (97, 4097),
]


def in_letterbox(boxes: np.ndarray, size: Size) -> np.ndarray:
    """From pixels of the file to a letterbox of 64.

    The whole picture is in the middle, as large as fits, at whole pixels.
    """
    height, width = size
    placed = [max(round(side * 64 / max(size)), 1) for side in (width, height)]
    if max(size) > 64:  # reduced first, to whole pixels
        reduced = [max(round(side * (64 / max(size))), 1) for side in (width, height)]
        assert reduced == placed
    scale = np.array(placed) / [width, height]
    corner = [(64 - side) // 2 for side in placed]
    return boxes * np.tile(scale, 2) + np.tile(corner, 2)


def test_boxes_come_back_to_the_pixels_of_the_file():
    loader = val_loader_of(noise_with_boxes(FILES, further=10), 4)
    sizes = iter(FILES)
    for _, targets, to_file in loader:
        detections = []
        for target in targets:
            boxes = in_letterbox(target["boxes_xyxy"], next(sizes))
            detections.append(detections_of(torch.from_numpy(boxes).float()))
        for native, detected, target in zip(to_file(detections), detections, targets, strict=True):
            assert native["boxes_xyxy"].dtype == torch.float32
            assert abs(native["boxes_xyxy"].numpy() - target["boxes_xyxy"]).max() < 1e-3
            assert torch.equal(native["scores"], detected["scores"])
            assert torch.equal(native["labels"], detected["labels"])
    assert next(sizes, None) is None


@pytest.fixture
def to_file():
    """The way back from a letterbox to a file of 100 x 200 pixels."""
    ((_, _, to_file),) = val_loader_of(noise_with_boxes([(100, 200)]), 1)
    return to_file


@pytest.mark.parametrize(
    ("box", "native"),
    [
        ([-5.0, -3.0, 80.0, 70.0], [0, 0, 200, 100]),
        ([10.0, 0.0, 20.0, 5.0], [31.25, 0, 62.5, 0]),
    ],
)
def test_what_lies_in_the_padding_is_clipped_to_the_picture(to_file, box, native):
    (moved,) = to_file([detections_of(torch.tensor([box]))])
    assert moved["boxes_xyxy"].tolist() == [native]


def test_nothing_comes_back_as_nothing(to_file):
    (moved,) = to_file([detections_of(torch.empty(0, 4))])
    assert moved["boxes_xyxy"].shape == (0, 4)


def test_there_is_one_entry_for_each_image(to_file):
    with pytest.raises(ValueError):
        to_file([])
