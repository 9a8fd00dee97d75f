"""Mistakes of the user: one line that names the thing, and nothing left behind."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import train as train_script
from tests.commands import run
from tests.conftest import ROOT

BAD = {  # overrides, what is said
    "typo in a key": (["train.epoch=3"], r"train: epoch: unknown key; did you mean `epochs`"),
    "typo in a section": (["trian.epochs=3"], r"no `trian`; did you mean `train`"),
    "wrong type": (["train.epochs=ten"], r"train: epochs: expected int, got 'ten'"),
    "missing data set": (["data.root=/nowhere"], r"/nowhere.*(root|download)"),
    "unmatched tap": (["distill.taps=[model.99]"], r"no submodule 'model.99'"),
    "not a term": (["distill.algin=all"], r"distill.algin: neither"),
    "wrong scale": (["student.weights={best}", "student.scale=n"], r"config says YOLO11n"),
    "no such weights": (["teacher.weights=nothing.pt"], r"nothing.pt"),
    "hostile weights": (["teacher.weights={hostile}"], r"hostile.pt.*posix.system"),
    "no teacher": (["teacher=null"], r"distill.attention: needs a teacher"),
    "bad schedule": (["distill.attention.schedule=[[5, 1, 2, 0]]"], r"schedule"),
    "batch too large": (["train.batch=400"], r"train.batch: 400 is more than the 24"),
    "image size": (["data.imgsz=100"], r"data: imgsz: 100 is out of range; .* multiple of 32$"),
    "never validated": (["train.val_every=0"], r"train: val_every: 0 is out of range; use 1 to"),
    "nothing learned": (["train.clip=0"], r"train: clip: 0 is out of range; use 1e-06 to .inf$"),
    "uphill": (["train.clip=-1"], r"train: clip: -1 is out of range"),
    "no images": (["train.batch=0"], r"train: batch: 0 is out of range"),
    "seed": ([f"seed={2**70}"], r"config.yaml: seed: 1180591620717411303424 is out of range"),
    "in a list": (
        ["distill.attention.schedule=[[0, -1, 3, 1]]"],
        r"distill.attention: schedule.0.1: -1 is out of range",
    ),
    "number or text": (["distill.kd_scale=-1"], r"distill: kd_scale: -1 is out of range; use 0"),
    "a time": (["timeout=12:30:45"], r"timeout: expected float, got '12:30:45'"),
    "no name": (['run=""'], r"run: '' cannot be a folder"),
    "long name": (["run=runs/" + "a" * 300], r"run: 'runs/aa.* cannot be a folder; .* 255 bytes"),
    "NUL": ([r'run="a\0b"'], r"run: 'a\\x00b' cannot be a folder"),
    "one value a channel": (
        ["train.batch=1", "data.imgsz=32"],
        r"train.batch: one image of 32 px a process leaves a BatchNorm one value a channel",
    ),
    "the head tapped": (["distill.taps=[model.23]"], r"'model.23' gives no map .* but a list"),
    "tap overwritten": (
        ["distill.taps=[[model.6.cv1, model.6.cv1.bn]]"],
        r"the map of 'model.6.cv1.bn' is overwritten",
    ),
    "mixed boxes": (
        ["data.augment={{mixup: 0.5}}"],
        r"data.augment.mixup: the ground truth of this task, Boxes, does not follow it",
    ),
    "unknown device": (["device=gpu"], r"device: 'gpu'"),
}


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch CANARY",)


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(
    case: str, config_file: Path, finished: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(Hostile(), tmp_path / "hostile.pt")
    overrides, message = BAD[case]
    files = {"best": finished / "run" / "best.pt", "hostile": tmp_path / "hostile.pt"}
    changes = [override.format(**files) for override in overrides]
    with pytest.raises(SystemExit) as stop:
        run(train_script, "--config", config_file, *changes)
    line = str(stop.value.code)
    assert re.search(message, line), line
    assert "\n" not in line
    assert not (tmp_path / "CANARY").exists()
    assert not (tmp_path / "run").exists()  # nothing to clean up before the next try


def test_xml_with_an_unknown_class_is_named(
    config_file: Path, shapes: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(shapes, copy)
    first = sorted((copy / "Annotations").iterdir())[0]
    first.write_text(first.read_text().replace("<name>", "<name>x", 1))
    with pytest.raises(SystemExit, match=rf"{first.name}.*unknown class"):
        run(train_script, "--config", config_file, f"data.train.root={copy}")


def test_the_exit_code_and_the_last_line_of_a_mistake(config_file: Path) -> None:
    command = [sys.executable, "train.py", "--config", str(config_file), "train.epoch=3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: ")
