"""One folder in VOC's layout, read for boxes and for masks."""

import numpy as np
import pytest

from kdmini.detection.voc import VOC as Detection
from kdmini.segmentation.voc import VOC as Segmentation
from tests.conftest import ROOT
from tests.segmentation.masked import add, write_split

PHOTOGRAPHS = ROOT.parent / "shared" / "data" / "voc20-320"
VOID = 255


def test_a_photograph_is_the_same_to_both(tmp_path):
    """So that neither learns from what the other is evaluated on."""
    folder = tmp_path / "VOC2012"
    for name in ("2007_000032", "2008_000002"):
        add(folder, name)
    write_split(folder, "val", "2008_000002")
    (folder / "Annotations").mkdir()
    boxes = Detection(str(tmp_path), ["VOC2012/all"], background=True)
    masks = Segmentation(str(folder), ["val"])
    assert masks.photographs < boxes.photographs


@pytest.mark.skipif(
    not (PHOTOGRAPHS / "SegmentationClass").is_dir(), reason="no real masks beside the repository"
)
def test_what_a_mask_shows_has_boxes_too():
    """Indices read otherwise, as the grey of their colours, would be of other classes."""
    masks = Segmentation(str(PHOTOGRAPHS), ["train", "val"])
    boxes = Detection(str(PHOTOGRAPHS), ["all"])
    labels = {record.id: set(record.labels.tolist()) for record in boxes.records}
    without = 0
    for index in range(len(masks)):
        target = masks[index][1]
        shown = set(np.unique(target["mask"]).tolist()) - {0, VOID}
        without += not shown <= {label + 1 for label in labels[target["id"]]}
    assert without == 37  # sofas, tables and persons that no box was drawn around
