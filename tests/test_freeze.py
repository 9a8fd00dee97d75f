"""Parts of the student that stay as they are."""

import re
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

import train as train_script
from kdmini.contracts import UserError
from kdmini.detection.yolo11.model import YOLO11
from kdmini.optim import Recipe, freeze_parts, hold_frozen
from tests.commands import assert_equal, newest, run
from tests.conftest import SHAPE_NAMES

FROZEN = ["model.0", "model.1", "model.2"]
SHORT = ["train.epochs=2", f"train.freeze=[{', '.join(FROZEN)}]"]


def parts_of(keys: Iterable[str]) -> set[str]:
    """ "model.0" of "model.0.conv.weight"."""
    return {".".join(key.split(".")[:2]) for key in keys}


def test_what_is_frozen_stays_to_the_bit_and_the_rest_learns(
    config_file: Path, teacher_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(train_script, "--config", config_file, *SHORT, f"student.weights={teacher_file}")
    before = torch.load(teacher_file, weights_only=True)["model"]
    averaged = torch.load(tmp_path / "run" / "best.pt", weights_only=True)["model"]
    for after in (newest(tmp_path / "run")["student"], averaged):
        moved = {key for key, value in before.items() if not torch.equal(value, after[key])}
        assert parts_of(moved) == parts_of(before) - set(FROZEN)
    assert re.search(r"frozen: [1-9],\d{3} of the student's \d{3},\d{3} p", capsys.readouterr().out)


def test_statistics_stay_to_the_bit_and_what_they_normalise_learns(
    config_file: Path, teacher_file: Path, tmp_path: Path
) -> None:
    still = ["train.freeze=[]", "train.freeze_statistics=true"]
    settings = [*SHORT, *still, f"student.weights={teacher_file}"]
    run(train_script, "--config", config_file, *settings)
    before = torch.load(teacher_file, weights_only=True)["model"]
    averaged = torch.load(tmp_path / "run" / "best.pt", weights_only=True)["model"]
    statistics = {key for key in before if key.endswith(("running_mean", "running_var", "tracked"))}
    assert len(statistics) > 200
    for after in (newest(tmp_path / "run")["student"], averaged):
        moved = {key for key, value in before.items() if not torch.equal(value, after[key])}
        assert not moved & statistics
        assert parts_of(moved) == parts_of(before)


def test_statistics_that_are_frozen_are_those_that_normalise() -> None:
    """Else they would stay, and the batch's would be used."""
    student = YOLO11(SHAPE_NAMES, [0.5, 0.0625, 1024])
    images = torch.rand(2, 3, 64, 64)
    expected = student.eval()(images)
    hold_frozen(student.train(), Recipe(epochs=1, batch=2, freeze_statistics=True))
    assert student.training
    for ours, theirs in zip(student(images), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_a_run_with_frozen_parts_is_resumed_to_the_bit(
    config_file: Path, teacher_file: Path, tmp_path: Path
) -> None:
    settings = [*SHORT, f"student.weights={teacher_file}"]
    run(train_script, "--config", config_file, *settings)
    whole = newest(tmp_path / "run")
    other = tmp_path / "other"
    run(train_script, "--config", config_file, *settings, f"run={other}")
    last = sorted((other / "ckpt").glob("*.pt"))[-1]
    last.unlink()
    run(train_script, "--resume", other)
    again = newest(other)
    for part in ("student", "ema", "optimizer", "distillation"):
        assert_equal(again[part], whole[part], part)


def test_names_are_checked() -> None:
    student = YOLO11(SHAPE_NAMES, [0.5, 0.0625, 1024])
    with pytest.raises(UserError, match=r"no submodule 'modl\.0'; did you mean 'model\.\d+'\?"):
        freeze_parts(student, ["modl.0"])
    with pytest.raises(UserError, match="no submodule ''"):
        freeze_parts(student, [""])
    with pytest.raises(UserError, match="nothing of the student is left to learn"):
        freeze_parts(student, ["model"])


def test_nothing_that_has_learned_nothing_is_frozen(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["train.epochs=2", "allow_void=false", "teacher=null", "distill=null"]
    for key, value in (("freeze", "[model.0]"), ("freeze_statistics", "true")):
        with pytest.raises(SystemExit, match=rf"train\.{key}: the student has no weights"):
            run(train_script, "--config", config_file, *settings, f"train.{key}={value}")
    assert not (tmp_path / "run").exists()


def behind_backbone(names: list[str], backbone_weights: str) -> YOLO11:
    return YOLO11(names, [0.5, 0.0625, 1024], backbone_weights)


def test_a_backbone_that_has_learned_is_frozen(
    config_file: Path, teacher_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It came with other weights than the whole network's."""
    student = f"{{build: tests.test_freeze:behind_backbone, backbone_weights: '{teacher_file}'}}"
    settings = ["train.epochs=1", "allow_void=false", "teacher=null", "distill=null"]
    changes = [f"student={student}", "train.freeze=[model.0]"]
    run(train_script, "--config", config_file, *settings, *changes)
    assert "frozen: " in capsys.readouterr().out
