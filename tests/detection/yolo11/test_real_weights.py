"""A detector trained on COCO, cut to other classes by rows: it works before any training."""

from pathlib import Path

import pytest
import torch

from kdmini import checkpoint, engine
from kdmini.data.loader import ValLoader
from kdmini.data.store import Store
from kdmini.detection.average_precision import DetectionMetric
from kdmini.detection.voc import VOC, VOC_NAMES
from kdmini.detection.yolo11.model import YOLO11
from kdmini.device import precision

SHARED = Path(__file__).resolve().parents[3] / ".." / "shared" / "data"
WEIGHTS = SHARED / "weights" / "yolo11n_coco_int8.pt"
PHOTOGRAPHS = SHARED / "voc20-320"
pytestmark = pytest.mark.skipif(
    not (WEIGHTS.is_file() and PHOTOGRAPHS.is_dir()),
    reason="no real weights and photographs beside the repository",
)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The first 60 of the validation set."""
    root = tmp_path_factory.mktemp("first60")
    for name in ("JPEGImages", "Annotations"):
        (root / name).symlink_to(PHOTOGRAPHS.resolve() / name)
    split = PHOTOGRAPHS / "ImageSets" / "Main" / "val.txt"
    main = root / "ImageSets" / "Main"
    main.mkdir(parents=True)
    (main / "val.txt").write_text("\n".join(split.read_text().split()[:60]))
    return Store(VOC(str(root), ["val"]), 320, workers=2, storage="resident")


def score(model: YOLO11, photographs: Store) -> float:
    """AP50-95."""
    autocast, _ = precision(False, torch.device("cpu"))
    metric = DetectionMetric(model.names)
    scores = engine.evaluate(model.eval(), ValLoader(photographs, 20), metric, autocast)
    return scores["AP50-95"]


def test_yolo11n_of_coco_cut_to_voc_by_rows_works_untrained(
    photographs: Store, tmp_path: Path
) -> None:
    by_name = {"path": str(WEIGHTS), "classes": "by_name"}
    model = YOLO11(VOC_NAMES, "n", weights=by_name)
    assert model.card["cls_width"] == 80  # as in the file
    before = score(model, photographs)
    assert before > 0.5

    checkpoint.save_best(tmp_path / "best.pt", model, 320, 0, before)
    again = YOLO11(VOC_NAMES, "n", weights=str(tmp_path / "best.pt"))
    assert again.card["cls_width"] == 80
    for key, tensor in again.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[key]), key
