"""True masks of VOC, read where they lie beside the repository, and scored."""

from pathlib import Path

import numpy as np
import pytest
import torch

from kdmini.segmentation.mean_iou import MeanIoU
from kdmini.segmentation.voc import VOC

SET = Path(__file__).resolve().parents[2] / ".." / "shared" / "data" / "voc20-320"
pytestmark = pytest.mark.skipif(
    not (SET / "SegmentationClass").is_dir(), reason="no real masks beside the repository"
)
PERSON = 15
VOID = 255


@pytest.fixture(scope="module")
def everything():
    """The data set of all masks, and the target of each."""
    dataset = VOC(str(SET), ["train", "val"])
    return dataset, [dataset[index][1] for index in range(len(dataset))]


def test_every_mask_is_read_and_every_class_is_there(everything):
    dataset, targets = everything
    assert [len(VOC(str(SET), [split])) for split in ("train", "val")] == [1868, 286]
    assert len(targets) == len({target["id"] for target in targets}) == 2154
    assert dataset.report() == ""
    pixels = sum(count.pixels for count in dataset.counts.values())
    assert pixels.sum() == sum(target["mask"].size for target in targets)
    assert pixels[[0, PERSON, -1]].tolist() == [104_718_258, 4_958_858, 2_423_906]


def test_masks_score_1_against_themselves_and_less_if_shifted_by_a_pixel(everything):
    dataset, targets = everything
    itself = MeanIoU(dataset.names)
    shifted = MeanIoU(dataset.names)
    for start in range(0, len(targets), 64):
        batch = targets[start : start + 64]
        masks = [np.where(target["mask"] == VOID, 0, target["mask"]) for target in batch]
        itself.update([{"mask": torch.from_numpy(mask)} for mask in masks], batch)
        moved = [np.roll(mask, 1, axis=1) for mask in masks]
        shifted.update([{"mask": torch.from_numpy(mask)} for mask in moved], batch)
    assert itself.compute() == {"mIoU": 1, "accuracy": 1, "mAcc": 1, "absent": 0}
    assert 0.9 < shifted.compute()["mIoU"] < 0.98
    assert itself.chance() == pytest.approx(0.0314, abs=1e-4)
