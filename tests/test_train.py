"""Whole runs of train.py and eval.py, as a user starts them."""

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import eval as eval_script
import train as train_script
from kdmini import assemble, engine
from kdmini.optim import Recipe
from tests.commands import assert_equal, newest, records, run
from tests.conftest import ROOT
from tests.kept import Kept

PATIENCE_S = 120
POLL_S = 0.01


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- what a run leaves


def test_a_run_leaves_a_record_of_every_epoch(finished: Path) -> None:
    lines = records(finished / "run")
    assert [line["epoch"] for line in lines] == [-1, 0, 1, 2, 3]
    last = lines[-1]
    assert last["loss/box"] > 0
    assert last["images/s"] > 0
    assert last["skipped"] == 0
    assert last["distance/raw"] > 0
    assert last["distance/aligned"] > 0


def test_the_teacher_rests_where_lambda_is_0(finished: Path) -> None:
    lines = records(finished / "run")[1:]
    assert [line["lambda/attention"] for line in lines] == [2.0, 1.0, 0.0, 1.0]
    assert ["loss/attention" in line for line in lines] == [True, True, False, True]


def test_a_run_leaves_a_table_and_two_checkpoints(finished: Path) -> None:
    folder = finished / "run"
    header, *rows = (folder / "results.csv").read_text().splitlines()
    assert header.startswith("epoch,")
    assert len(rows) == 5
    assert len(list((folder / "ckpt").glob("*.pt"))) == 2
    assert not list(folder.rglob("*.tmp"))


def test_a_run_leaves_its_best_weights_with_what_is_needed_to_load_them(finished: Path) -> None:
    best = torch.load(finished / "run" / "best.pt", weights_only=True)
    assert best["names"][0] == "circle"
    assert best["nc"] == 6
    assert best["imgsz"] == 64
    assert best["card"]["scale"] == [0.5, 0.0625, 1024]
    assert all(key.startswith("model.") for key in best["model"])
    assert {value.dtype for value in best["model"].values()} == {torch.float32, torch.int64}


def test_align_modules_are_saved_and_move(finished: Path) -> None:
    state = newest(finished / "run")["distillation"]
    rests = ("0.weight", "1.running_mean", "1.running_var", "1.num_batches_tracked")
    assert set(state) == {f"align.layers.{i}.{rest}" for i in range(6) for rest in rests}
    for i in range(6):
        assert state[f"align.layers.{i}.1.num_batches_tracked"] == 9


def test_the_teacher_is_nowhere_in_a_checkpoint(finished: Path) -> None:
    state = newest(finished / "run")
    parts = ["student", "ema", "distillation", "optimizer", "scaler", "progress"]
    assert set(state) == {*parts, "inputs", "rng", "cuda_rng", "config"}
    optimised = sum(len(group["params"]) for group in state["optimizer"]["param_groups"])
    learning = [key for key in state["student"] if not re.search("running|num_batches|dfl", key)]
    assert optimised == len(learning) + 6  # and one convolution a tap


# --- evaluated


def test_eval_prints_the_metrics_per_class_and_the_cost(finished: Path, capsys) -> None:
    best = finished / "run" / "best.pt"
    run(eval_script, "--config", finished / "config.yaml", "--weights", best)
    out = capsys.readouterr().out
    metrics = ("VOC07", "VOC", "AP50-95", "AP75", "pycocotools")
    for word in (*metrics, "all classes", "circle", "cross"):
        assert word in out
    cost = re.search(
        r"student: ([\d.]+) M parameters, ([\d.]+) GFLOPs at 64 px, [\d.]+ ms an image", out
    )
    millions, giga = map(float, cost.groups())
    assert millions == pytest.approx(0.33, abs=0.01)
    assert 0 < giga < 1


def test_eval_writes_the_detections_of_student_and_teacher(
    finished: Path, tmp_path: Path, capsys
) -> None:
    best = finished / "run" / "best.pt"
    command = ["--config", finished / "config.yaml", "--weights", best, "--teacher"]
    run(eval_script, *command, "--save", tmp_path, f"teacher.weights={best}")
    assert "teacher" in capsys.readouterr().out
    student = json.loads((tmp_path / "student.json").read_text())
    teacher = json.loads((tmp_path / "teacher.json").read_text())
    assert student == teacher


# --- resumed


def killed_after(config: Path, folder: Path, checkpoint: str) -> None:
    """A run in another process, until that checkpoint is there."""
    command = [sys.executable, "train.py", "--config", str(config), f"run={folder}"]
    # as here: sums come out otherwise with other numbers of threads
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    quiet = subprocess.DEVNULL
    with subprocess.Popen(command, cwd=ROOT, env=env, stdout=quiet, stderr=quiet) as process:
        end = time.monotonic() + PATIENCE_S
        while not (folder / "ckpt" / checkpoint).exists():
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(POLL_S)
        os.kill(process.pid, signal.SIGKILL)


def test_killed_and_resumed_equals_never_killed(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    killed_after(finished / "config.yaml", folder, "step_00000006.pt")  # two of four epochs
    assert len(list((folder / "ckpt").glob("*.pt"))) <= 3
    run(train_script, "--resume", folder)

    whole = newest(finished / "run")
    resumed = newest(folder)
    del whole["config"], resumed["config"]  # they name different folders
    assert_equal(whole, resumed)
    for one, other in zip(records(finished / "run"), records(folder), strict=True):
        assert {**one, "images/s": 0} == {**other, "images/s": 0}


def test_a_finished_run_is_not_overwritten(finished: Path) -> None:
    before = files(finished / "run")
    with pytest.raises(SystemExit, match="holds a run already"):
        run(train_script, "--config", finished / "config.yaml")
    assert files(finished / "run") == before


def test_resuming_a_finished_run_changes_nothing(finished: Path) -> None:
    before = files(finished / "run")
    run(train_script, "--resume", finished / "run")
    assert files(finished / "run") == before


# --- what holds during a run


def test_the_teacher_is_bit_identical_after_training(config_file: Path, monkeypatch) -> None:
    make = assemble.make_distillation
    teachers = []
    states = []

    @functools.wraps(make)
    def watched(student, teacher, **settings):
        distillation = make(student, teacher, **settings)
        teachers.append(teacher)
        states.append({key: value.clone() for key, value in teacher.state_dict().items()})
        return distillation

    monkeypatch.setattr(assemble, "make_distillation", watched)
    run(train_script, "--config", config_file, "train.epochs=1")
    (teacher,) = teachers
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not any(module.training for module in teacher.modules())
    assert_equal(states[0], teacher.state_dict())


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_a_run_in_half_precision_stays_finite_and_keeps_float32_weights(
    amp: str, config_file: Path, tmp_path: Path
) -> None:
    run(train_script, "--config", config_file, "train.epochs=2", f"train.amp={amp}")
    last = records(tmp_path / "run")[-1]
    for name in ("loss/box", "loss/cls", "loss/dfl", "loss/attention", "distance/raw"):
        assert last[name] > 0
    assert last["skipped"] == 0 or amp == "fp16"  # whose scale begins too high
    state = newest(tmp_path / "run")
    for value in state["student"].values():
        assert value.dtype != torch.float16
        assert value.isfinite().all()
    assert bool(state["scaler"]) == (amp == "fp16")


def test_deterministic_runs_repeat_bit_for_bit_and_leave_the_setting_behind(
    config_file: Path, tmp_path: Path
) -> None:
    command = ["--config", config_file, "train.epochs=1"]
    for name in ("one", "two"):
        run(train_script, *command, f"run={tmp_path / name}", "deterministic=true")
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.backends.cudnn.benchmark
    assert_equal(newest(tmp_path / "one")["ema"], newest(tmp_path / "two")["ema"])
    run(train_script, *command)
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cudnn.benchmark


@pytest.mark.parametrize(("patience", "last"), [(2, 2), (0, 4)])
def test_training_stops_when_nothing_improves_unless_patience_is_0(
    patience: int, last: int, config_file: Path, tmp_path: Path, monkeypatch
) -> None:
    def stand_still(optimizer, setting) -> None:
        for group in optimizer.param_groups:
            group["lr"] = 0.0

    monkeypatch.setattr(engine, "apply_setting", stand_still)
    changes = ["train.epochs=5", f"train.patience={patience}"]
    run(train_script, "--config", config_file, *changes)
    assert records(tmp_path / "run")[-1]["epoch"] == last


BROKEN = """
from torch import nn


class NaN(nn.Module):
    uses = {"feats"}

    def forward(self, student, teacher, targets):
        return sum(feat.sum() for feat in student.feats.values()) * float("nan")
"""


def test_a_loss_that_is_never_finite_stops_the_run_by_name(
    config_file: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken.py").write_text(BROKEN)
    command = ["--config", config_file, "train.epochs=30"]
    with pytest.raises(SystemExit, match=r"2\d updates in a row.*broken not finite"):
        run(train_script, *command, "distill.broken={build: broken:NaN, weight: 1}")


# --- records elsewhere


def test_loggers_get_the_records_that_a_resumed_run_adds(
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(Kept, "records", [])
    folder = tmp_path / "run"
    shutil.copytree(finished / "run", folder)
    command = ["--resume", folder, "train.epochs=5"]
    with pytest.raises(SystemExit, match=r"log\.build: .* cannot be called with a record"):
        run(train_script, *command, "log=[{build: tests.kept:Kept}, {build: tests.kept:NotCalled}]")
    run(train_script, *command, "log={build: tests.kept:Kept}")
    assert Kept.records == [{**records(folder)[-1], "run": str(folder)}]
    assert records(folder)[-1]["epoch"] == 4
    run(train_script, *command, "log={build: tests.kept:KeptToo}")
    assert "warning: log.build was 'tests.kept:Kept', is 'tests." in capsys.readouterr().out


# --- more epochs


def test_a_finished_run_goes_on_as_one_of_more_epochs(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    longer = tmp_path / "run"
    shutil.copytree(finished / "run", longer)
    run(train_script, "--resume", longer, f"run={longer}", "train.epochs=6")
    said = capsys.readouterr().out
    assert "warning: train.epochs was 4, is 6; it goes on as a run of 6 epochs" in said
    assert "4 of 6 epochs and 0 steps done" in said
    lines = records(longer)
    assert [line["epoch"] for line in lines] == [-1, 0, 1, 2, 3, 4, 5]
    assert lines[:5] == records(finished / "run")
    recipe = Recipe(epochs=6, batch=8, nbs=16, warmup_steps=4, warmup_epochs=1)
    assert [line["lr"] for line in lines[5:]] == [recipe.at(14, 3).lr, recipe.at(17, 3).lr]
    with pytest.raises(SystemExit, match=r"train\.epochs was 6, is 5"):
        run(train_script, "--resume", longer, "train.epochs=5")
