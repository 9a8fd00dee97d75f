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
from tests.conftest import CLASSIFICATION

FOLDERS = "build: kdmini.classification.folders:Folders"


@pytest.fixture
def command(config_file: Path) -> list[object]:
    """A network alone, on class folders; where they are is still to be said."""
    folders = [f"data.{split}={{{FOLDERS}, split: {split}}}" for split in ("train", "val")]
    return ["--config", config_file, *CLASSIFICATION, *folders, "teacher=null", "distill=null"]


def test_a_run_learns_labels_of_mixed_images(command: list[object], tmp_path: Path, capsys) -> None:
    root = tmp_path / "classes"
    write_set(root, train=24, val=12, size=48, folders=True)
    command = [*command, f"data.root={root}"]
    folder = tmp_path / "run"
    run(train_script, *command, f"run={folder}", "train.epochs=2")
    last = records(folder)[-1]
    assert math.isfinite(last["loss/ce"])
    assert 0 <= last["score/top1"] <= last["score/top5"] <= 1

    saved = tmp_path / "saved"
    run(eval_script, *command, "--weights", folder / "best.pt", "--save", saved)
    out = capsys.readouterr().out
    for word in ("top1", "top5", "all classes", *SHAPE_NAMES):
        assert word in out
    rows = (saved / "student" / "answers.csv").read_text().splitlines()
    assert len(rows) == 1 + 12


def test_a_run_learns_which_class_is_which(command: list[object], tmp_path: Path) -> None:
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
    places = (f"data.root={tmp_path / 'set'}", f"run={tmp_path / 'run'}", "data.imgsz=32")
    recipe = ("train.epochs=4", "train.batch=8", "train.nbs=8", "train.lr0=0.01")
    average = ("train.ema_decay=0.8", "train.ema_tau=1")
    run(train_script, *command, *places, *recipe, *average)
    assert records(tmp_path / "run")[-1]["score/top1"] > 0.9
