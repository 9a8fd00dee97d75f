"""A run on generated class folders, from the set to the table."""

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import eval as eval_script
import train as train_script
from examples.shapes import SHAPE_NAMES, write_set
from tests.commands import records, run
from tests.conftest import CLASSIFIER, ROOT

DEMO = ROOT / "configs/classification/demo.yaml"


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    root = tmp_path_factory.mktemp("classes") / "shapes"
    write_set(root, train=24, val=12, size=48, folders=True)
    small = (f"student={CLASSIFIER}", "data.imgsz=32", "train.batch=8", "train.nbs=8")
    taps = "distill.taps=[group1, group2, group3]"
    return ["--config", DEMO, f"data.root={root}", "device=cpu", taps, *small]


def test_a_run_learns_labels_of_mixed_images(command: list[object], tmp_path: Path, capsys) -> None:
    folder = tmp_path / "run"
    mixing = ("data.augment.cutmix=0.5", "data.augment.mixup=0.5")
    run(train_script, *command, *mixing, f"run={folder}", "train.epochs=2")
    last = records(folder)[-1]
    assert math.isfinite(last["loss/ce"])
    assert math.isfinite(last["loss/self_teacher"])
    assert 0 <= last["score/top1"] <= last["score/top5"] <= 1

    saved = tmp_path / "saved"
    run(eval_script, *command, "--weights", folder / "best.pt", "--save", saved)
    out = capsys.readouterr().out
    for word in ("top1", "top5", "all classes", *SHAPE_NAMES):
        assert word in out
    rows = (saved / "student" / "answers.csv").read_text().splitlines()
    assert len(rows) == 1 + 12


def test_a_run_learns_which_class_is_which(tmp_path: Path) -> None:
    """Of noise in three colours, mixed in most of the images."""
    rng = np.random.default_rng(0)
    for split, each in (("train", 16), ("val", 8)):
        for label, name in enumerate(("red", "green", "blue")):
            folder = tmp_path / "set" / split / name
            folder.mkdir(parents=True)
            for number in range(each):
                pixels = rng.integers(0, 120, (32, 32, 3), np.uint8)
                pixels[:, :, label] += 90
                Image.fromarray(pixels).save(folder / f"{number}.png")
    settings = (f"data.root={tmp_path / 'set'}", f"student={CLASSIFIER}", f"run={tmp_path / 'run'}")
    recipe = ("train.epochs=4", "train.batch=8", "train.nbs=8", "train.lr0=0.01")
    mixing = ("data.augment.cutmix=0.4", "data.augment.mixup=0.4")
    average = (
        "train.ema_decay=0.8",
        "train.ema_tau=1",
        "data.imgsz=32",
        "device=cpu",
        "distill=null",
    )
    run(train_script, "--config", DEMO, *settings, *recipe, *average, *mixing)
    assert records(tmp_path / "run")[-1]["score/top1"] > 0.9
