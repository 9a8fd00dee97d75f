"""A detector that learns anything at all can learn sixteen photographs by heart."""

import csv
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import train as train_script
from tests.commands import run
from tests.conftest import ROOT

PHOTOGRAPHS = ROOT.parent / "shared/data/voc20-320"
CHANGES = [
    "teacher=null",
    "distill=null",
    "student.scale=n",
    f"data.root={PHOTOGRAPHS}",
    "data.val.splits=[train]",
    "data.allow_overlap=true",
    "data.limit=16",
    "data.imgsz=160",
    # nothing moves and nothing changes its colour
    "data.augment={mosaic: 0, translate: 0, scale: 0, fliplr: 0, hsv_h: 0, hsv_s: 0, hsv_v: 0}",
    "train.epochs=200",
    "train.batch=16",
    "train.nbs=16",
    "train.lr0=0.02",
    "train.warmup_epochs=10",
    "train.warmup_steps=10",
    "train.ema_decay=0.99",
    "train.ema_tau=50",
    "train.val_every=50",
]


@pytest.fixture
def two_threads() -> Iterator[None]:
    """For one test: with two, sums have another last bit, which the next might compare."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.long
@pytest.mark.skipif(not PHOTOGRAPHS.is_dir(), reason=f"needs the photographs in {PHOTOGRAPHS}")
def test_yolo11n_overfits_sixteen_photographs(tmp_path: Path, two_threads: None) -> None:
    config = ROOT / "configs/voc320.yaml"
    run(train_script, "--config", config, f"run={tmp_path / 'run'}", *CHANGES)
    best = torch.load(tmp_path / "run/best.pt", weights_only=True)
    print(f"AP50-95 {best['fitness']:.3f} in epoch {best['epoch']}")
    with (tmp_path / "run/results.csv").open() as file:
        *_, last = csv.DictReader(file)
    assert float(last["score/AP50"]) > 0.9
