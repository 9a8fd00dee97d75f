"""FRSKD in whole runs: built by its config, trained, saved, resumed."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import eval as eval_script
import train as train_script
from kdmini.contracts import View
from kdmini.detection.yolo11.model import YOLO11
from kdmini.optim import Recipe, make_optimizer
from tests.commands import assert_equal, newest, run
from tests.conftest import ROOT, TINY
from tests.terms.self_teacher_equation import NAMES, make_targets, random_view
from tests.terms.teaching import build, records_of

CONFIG = ROOT / "configs/terms/self_teacher.yaml"
OVERRIDES = [
    f"student.scale={TINY}",
    "distill.self_teacher.width=8",
    "data.imgsz=64",
    "device=cpu",
    "data.workers=2",
]


def parameters_in(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_without_a_teacher_the_channels_are_the_students_and_nothing_is_aligned() -> None:
    pieces = build(CONFIG, OVERRIDES, imgsz=64)
    assert pieces.teacher is None
    term = pieces.distillation.terms["self_teacher"]
    assert term.channels == {"model.16": 16, "model.19": 32, "model.22": 64}
    assert not list(pieces.distillation.align.parameters())
    assert 0 < parameters_in(pieces.distillation) < parameters_in(pieces.student) / 2


def test_the_student_comes_to_look_as_the_self_teacher_does() -> None:
    """The imitation alone, of a self-teacher that stays as it is."""
    student, _, distillation, images = build(CONFIG, OVERRIDES, 64, NAMES)
    images = images[:2]
    fixed = random_view(1, torch.float32)
    feats = dict(zip(distillation.taps, fixed.feats.values(), strict=True))
    own = View(feats, fixed.preds, images, fixed.classes)  # of as many channels as the student
    recipe = Recipe(epochs=1, batch=2, nbs=2, lr0=0.02, weight_decay=0)
    optimizer = make_optimizer([student], recipe)
    losses = []
    for _ in range(15):
        preds = student(images)
        view = View(distillation.student_taps.take(), preds, images, student.class_maps(preds))
        loss = distillation.terms["self_teacher"].imitation(view, own, make_targets())
        loss.backward()
        losses.append(loss.item())
        nn.utils.clip_grad_norm_(student.parameters(), 10.0)
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.9 * losses[0]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, shapes: Path) -> Path:
    folder = tmp_path_factory.mktemp("self_teacher") / "run"
    short = ["train.epochs=2", "train.val_every=1", "train.batch=8"]
    data = f"data.root={shapes}"
    run(train_script, "--config", CONFIG, *OVERRIDES, f"run={folder}", data, *short)
    return folder


def test_its_config_trains_and_best_pt_is_the_student_alone(
    finished: Path, capsys: pytest.CaptureFixture
) -> None:
    records = records_of(finished)
    assert len(records) == 2
    for record in records:
        assert record["skipped"] == 0
        assert 0 < record["loss/self_teacher"] < math.inf
    best = torch.load(finished / "best.pt", weights_only=True)
    student = YOLO11(best["names"], json.loads(TINY))
    assert best["model"].keys() == student.state_dict().keys()
    run(eval_script, "--config", finished / "config.yaml", "--weights", finished / "best.pt")
    assert "all classes" in capsys.readouterr().out


def checkpoints(folder: Path) -> list[Path]:
    return sorted((folder / "ckpt").glob("*.pt"))


def without_config(checkpoint: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in checkpoint.items() if key != "config"}


def test_its_parameters_are_saved_moved_and_come_back_bit_for_bit(
    finished: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    before_last, last = checkpoints(folder)
    earlier = torch.load(before_last, weights_only=True)["distillation"]
    later = torch.load(last, weights_only=True)["distillation"]
    weights = {name for name in later if name.endswith("weight")}
    assert len(weights) > 50
    assert all(name.startswith("terms.self_teacher.") for name in weights)
    moved = {name for name in weights if not torch.equal(earlier[name], later[name])}
    assert "terms.self_teacher.head.dfl.conv.weight" not in moved
    # the head normalises each channel anew, so a gain before it need not move
    refining = {name for name in weights if ".refine." in name and ".conv.6." not in name}
    assert moved >= refining

    last.unlink()
    run(train_script, "--resume", folder)
    assert_equal(without_config(newest(finished)), without_config(newest(folder)))


def test_check_finds_distillation_on(
    shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    places = [f"data.root={shapes}", f"run={tmp_path / 'run'}"]
    run(train_script, "--check", "--config", CONFIG, *OVERRIDES, *places)
    assert "--check: distillation is on" in capsys.readouterr().out
