"""Mean IoU against torchmetrics."""

import json
from pathlib import Path

import numpy as np
import pytest
from oracle import oracle
from witness import witness

from kdmini.segmentation.mean_iou import MeanIoU
from tests.segmentation.written_out import VOID, random_scene

pytestmark = pytest.mark.parity

TORCHMETRICS = """
import json, sys
import numpy as np, torch
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

scenes = np.load(sys.argv[1])
scores = []
for seed in range(int(sys.argv[2])):
    count = int(scenes[f"{seed} count"])
    predicted, true = (torch.from_numpy(scenes[f"{seed} {side}"]) for side in ("found", "true"))
    row = []
    for kind, average in (
        (MulticlassJaccardIndex, "macro"),
        (MulticlassJaccardIndex, "none"),
        (MulticlassAccuracy, "micro"),
        (MulticlassAccuracy, "none"),
    ):
        metric = kind(count, average=average, ignore_index=255).set_dtype(torch.float64)
        half = len(true) // 2
        metric.update(predicted[:half], true[:half])
        metric.update(predicted[half:], true[half:])
        row.append(metric.compute().tolist())
    scores.append(row)
print(json.dumps(scores))
"""
SCENES = 12
DIGITS = 1e-6  # the bound: torchmetrics divides in float32


def test_torchmetrics(tmp_path: Path) -> None:
    arrays = {}
    metrics = []
    for seed in range(SCENES):
        count = 4 + 3 * seed
        predictions, targets = random_scene(seed, count)
        metric = MeanIoU(list(map(str, range(count))))
        metric.update(predictions, targets)
        metrics.append(metric)
        found = [prediction["mask"].long().flatten() for prediction in predictions]
        arrays[f"{seed} count"] = np.array(count)
        arrays[f"{seed} found"] = np.concatenate(found)
        true = np.concatenate([target["mask"].ravel() for target in targets])
        arrays[f"{seed} true"] = true.astype(np.int64)
        assert (true == VOID).any()
    np.savez(tmp_path / "scenes.npz", **arrays)
    theirs = json.loads(
        oracle(TORCHMETRICS, tmp_path / "scenes.npz", SCENES, version="torchmetrics")
    )

    for metric, (iou, ious, accuracy, accuracies) in zip(metrics, theirs, strict=True):
        scores = metric.compute()
        rows = metric.per_class().values()
        # what is nowhere is 0 to them, and left out of the mean
        own_ious = np.nan_to_num([row["mIoU"] for row in rows])
        own_accuracies = np.nan_to_num([row["mAcc"] for row in rows])
        differences = (
            scores["mIoU"] - iou,
            scores["accuracy"] - accuracy,
            *(own_ious - ious),
            *(own_accuracies - accuracies),
        )
        largest = max(map(abs, differences))
        witness("Metrics: mean IoU, overall and by class", "torchmetrics 1.9.0", largest, DIGITS)
