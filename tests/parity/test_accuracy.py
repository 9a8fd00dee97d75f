"""Top-1 and top-5 against torchmetrics."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import oracle
from witness import witness

from kdmini.classification.accuracy import Accuracy

pytestmark = pytest.mark.parity

TORCHMETRICS = """
import json, sys
import numpy as np, torch
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

cases = np.load(sys.argv[1])
answers = []
for seed in range(int(sys.argv[2])):
    scores, true = (torch.from_numpy(cases[f"{seed} {part}"]) for part in ("scores", "true"))
    count = scores.shape[1]
    row = []
    for top_k in (1, 5):
        for average in ("micro", "none"):
            metric = MulticlassAccuracy(count, top_k=top_k, average=average)
            metric.set_dtype(torch.float64)
            row.append(metric(scores, true).tolist())
    row.append(MulticlassConfusionMatrix(count)(scores, true).tolist())
    answers.append(row)
print(json.dumps(answers))
"""
CASES = 10
DIGITS = 1e-6  # the bound: torchmetrics divides in float32


def test_torchmetrics(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {}
    metrics = []
    for seed in range(CASES):
        count = 6 + 5 * seed
        true = rng.integers(0, count, 300)
        scores = rng.random((300, count))
        scores[np.arange(300), true] += 0.3  # better than chance
        metric = Accuracy(list(map(str, range(count))))
        for start in range(0, 300, 64):
            part = slice(start, start + 64)
            metric.update(
                [{"scores": row} for row in torch.from_numpy(scores[part])],
                [{"label": int(label), "id": "any"} for label in true[part]],
            )
        metrics.append(metric)
        arrays[f"{seed} scores"] = scores
        arrays[f"{seed} true"] = true
    np.savez(tmp_path / "cases.npz", **arrays)
    answers = json.loads(
        oracle(TORCHMETRICS, tmp_path / "cases.npz", CASES, version="torchmetrics")
    )

    for metric, (top1, top1s, top5, top5s, confusion) in zip(metrics, answers, strict=True):
        assert metric.confusion().tolist() == confusion
        scores = metric.compute()
        rows = metric.per_class().values()
        differences = (
            scores["top1"] - top1,
            scores["top5"] - top5,
            # what is nowhere is 0 to them
            *(np.nan_to_num([row["top1"] for row in rows]) - top1s),
            *(np.nan_to_num([row["top5"] for row in rows]) - top5s),
        )
        largest = max(map(abs, differences))
        what = "Metrics: top-1 and top-5, overall and by class"
        witness(what, "torchmetrics 1.9.0", largest, DIGITS)
