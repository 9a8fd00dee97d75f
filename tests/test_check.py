"""`train.py --check` is green where distillation works, and names each way in which it can be off
in silence.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import nn

import train as train_script
from kdmini.distill import step
from tests.test_train import run

SOME = "metric={build: tests.test_check:Seen}"  # the small teacher has not learned anything


class Seen:
    """How many images were evaluated."""

    fitness = "seen"

    def __init__(self) -> None:
        self.count = 0

    def update(self, detections, targets) -> None:
        self.count += len(targets)

    def compute(self) -> dict[str, float]:
        return {"seen": float(self.count)}


class Deaf(nn.Module):
    """A term that does not reach the student."""

    uses = frozenset({"feats"})

    def forward(self, student, teacher, targets):
        return sum(feat.detach().square().mean() for feat in student.feats.values())


class AroundAlign(nn.Module):
    """A term that the align modules have no part in."""

    uses = frozenset({"preds"})

    def forward(self, student, teacher, targets):
        return sum(
            (ours - theirs).square().mean()
            for ours, theirs in zip(student.preds, teacher.preds, strict=True)
        )


def term(name: str) -> str:
    return f"distill.attention={{build: tests.test_check:{name}, weight: 1.0}}"


@pytest.fixture
def check(config_file: Path, tmp_path: Path, capsys) -> Iterator:
    """-> the rows that fail and what was printed; nothing is left behind."""

    def checked(*overrides: str) -> tuple[list[str], str]:
        failed = ""
        try:
            run(train_script, "--config", config_file, "--check", SOME, *overrides)
        except SystemExit as left:
            failed = str(left.code)
        told = capsys.readouterr().out
        assert not (tmp_path / "run").exists()
        rows = [line[5:].split("  ")[0] for line in told.splitlines() if line.startswith("FAIL ")]
        assert failed == (f"error: --check: {', '.join(rows)} failed, see above" if rows else "")
        return rows, told

    yield checked


def test_it_is_green_where_distillation_works(check) -> None:
    rows, told = check()
    assert rows == [] and told.endswith("--check: distillation is on\n")
    for tap in (6, 8, 13, 16, 19, 22):
        assert f"ok   model.{tap} " in told
    for what in (
        "KD gradient, student",
        "KD gradient, align and terms",
        "KD / task gradient",
        "teacher, held-out images",
    ):
        assert f"ok   {what} " in told
    assert "data: 16 images, 2 steps an epoch" in told  # and not all of the set is read


@pytest.mark.parametrize(
    "overrides", [["train.amp=bf16"], ["distill.align=frozen"], ["distill.kd_scale=batch"]]
)
def test_it_is_green_for_the_other_settings(check, overrides: list[str]) -> None:
    assert check(*overrides)[0] == []


@pytest.mark.parametrize(
    "overrides",
    [
        ["distill.attention.weight=0"],
        ["distill.attention.schedule=[[0, 0.0, .inf, 0.0]]"],
        ["distill=null"],
    ],
)
def test_nothing_to_distil(check, overrides: list[str]) -> None:
    assert check(*overrides)[0] == ["weight * lambda"]


def test_an_epoch_in_which_lambda_is_not_zero_is_looked_for(check) -> None:
    rows, told = check("distill.attention.schedule=[[0, 0.0, 2, 0.0], [2, 0.5, .inf, 0.5]]")
    assert rows == [] and "attention 0.375 in epoch 3" in told


def test_a_term_that_does_not_reach_the_student(check) -> None:
    assert check(term("Deaf"))[0][0] == "KD gradient, student"


def test_align_modules_without_a_gradient(check) -> None:
    rows, _ = check(term("AroundAlign"))
    assert rows[0] == "KD gradient, align and terms"


def test_align_modules_that_are_not_in_the_optimiser(check, monkeypatch) -> None:
    make_sgd = train_script.make_sgd
    monkeypatch.setattr(
        train_script, "make_sgd", lambda modules, recipe: make_sgd(modules[:1], recipe)
    )
    assert check()[0] == ["optimiser", "align and terms, some steps later"]


def test_a_teacher_that_is_trained(check, monkeypatch) -> None:
    make_sgd, freeze = train_script.make_sgd, step.freeze
    teachers = []
    monkeypatch.setattr(
        step, "freeze", lambda teacher: teachers.append(freeze(teacher).requires_grad_(True))
    )
    monkeypatch.setattr(
        train_script, "make_sgd", lambda modules, recipe: make_sgd([*modules, teachers[0]], recipe)
    )
    assert check()[0] == ["teacher, some steps later"]


def test_a_teacher_whose_statistics_move(check, monkeypatch) -> None:
    monkeypatch.setattr(step, "freeze", lambda teacher: teacher.requires_grad_(False).train())
    assert "teacher, some steps later" in check()[0]


def test_a_student_that_does_not_move(check) -> None:
    assert check("train.lr0=0", "train.warmup_bias_lr=0")[0] == [
        "student, some steps later",
        "align and terms, some steps later",
    ]


def test_a_tap_that_says_nothing(check, monkeypatch) -> None:
    freeze = step.freeze

    def silence(teacher: nn.Module) -> None:
        for parameter in freeze(teacher).get_submodule("model.13").parameters():
            parameter.data.zero_()

    monkeypatch.setattr(step, "freeze", silence)
    rows, told = check()
    assert rows[0] == "model.13" and "constant or not finite" in told


def test_a_tap_that_does_not_fire(config_file: Path) -> None:
    with pytest.raises(
        SystemExit, match=r"distill\.taps: model\.23\.cv2\.0 did not fire .* no part of its head"
    ):
        run(train_script, "--config", config_file, "--check", "distill.taps=[model.23.cv2.0]")


def test_a_teacher_that_detects_nothing(check) -> None:
    rows, told = check("metric={build: kdmini.detection.average_precision:DetectionMetric}")
    assert rows == ["teacher, held-out images"] and "AP50-95 0.000" in told


def test_a_run_in_the_folder_is_neither_in_the_way_nor_touched(
    config_file: Path, tmp_path: Path, capsys
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text("another run's")
    run(train_script, "--config", config_file, "--check", SOME)
    assert "distillation is on" in capsys.readouterr().out
    assert {path.name: path.read_text() for path in (tmp_path / "run").iterdir()} == {
        "config.yaml": "another run's"
    }


def test_it_goes_with_a_config(config_file: Path, capsys) -> None:
    with pytest.raises(SystemExit):
        run(train_script, "--resume", "runs/none", "--check")
    assert "--check goes with --config" in capsys.readouterr().err
