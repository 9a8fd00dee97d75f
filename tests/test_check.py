"""`train.py --check`: green where distillation works, and what it says where not.

Each test below the first ones is a way in which distillation can be off in silence.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

import train as train_script
from kdmini import assemble, engine
from kdmini.distill import step
from tests.commands import run

SOME = "metric={build: tests.test_check:Seen}"  # the small teacher has not learned anything


class Seen:
    """How many images were evaluated."""

    fitness = "seen"

    def __init__(self) -> None:
        self.records: list[int] = []

    def update(self, predictions, targets) -> None:
        self.records.append(len(targets))

    def compute(self) -> dict[str, float]:
        return {"seen": float(sum(self.records))}


class Deaf(nn.Module):
    """A term that does not reach the student."""

    uses = frozenset({"feats"})

    def forward(self, student, teacher, targets):
        return sum(feat.detach().square().mean() for feat in student.feats.values())


class AroundAlign(nn.Module):
    """A term that the align modules have no part in."""

    uses = frozenset({"preds"})

    def forward(self, student, teacher, targets):
        pairs = zip(student.preds, teacher.preds, strict=True)
        return sum((ours - theirs).square().mean() for ours, theirs in pairs)


def term(name: str) -> str:
    return f"distill.attention={{build: tests.test_check:{name}, weight: 1.0}}"


class Table(NamedTuple):
    text: str
    failed: list[str]  # names of the rows


Check = Callable[..., Table]


@pytest.fixture
def check(config_file: Path, teacher_file: Path, tmp_path: Path, capsys) -> Check:
    """-> a call of --check with a teacher that has weights, and overrides.

    It leaves nothing behind, and its exit names what has failed.
    """

    def checked(*overrides: str) -> Table:
        error = ""
        try:
            teacher = f"teacher.weights={teacher_file}"
            run(train_script, "--config", config_file, "--check", SOME, teacher, *overrides)
        except SystemExit as left:
            error = str(left.code)
        text = capsys.readouterr().out
        lines = [line for line in text.splitlines() if line.startswith("FAIL ")]
        failed = [line.removeprefix("FAIL ").split("  ")[0] for line in lines]
        expected = f"error: --check: {', '.join(failed)} failed, see above" if failed else ""
        assert error == expected
        assert not (tmp_path / "run" / "ckpt").exists()
        return Table(text, failed)

    return checked


# --- green


def test_it_is_green_where_distillation_works(check: Check) -> None:
    table = check()
    assert table.failed == []
    assert table.text.endswith("--check: distillation is on\n")
    taps = [f"model.{i}" for i in (6, 8, 13, 16, 19, 22)]
    gradients = ["KD gradient, student", "KD gradient, align and terms", "KD / task gradient"]
    for row in (*taps, *gradients, "teacher, held-out images"):
        assert f"ok   {row} " in table.text


def test_it_reads_no_more_than_it_needs(check: Check) -> None:
    assert "data: 16 images, 2 steps an epoch" in check().text


@pytest.mark.parametrize(
    "override", ["train.amp=bf16", "distill.align=frozen", "distill.kd_scale=batch"]
)
def test_it_is_green_for_the_other_settings(check: Check, override: str) -> None:
    assert check(override).failed == []


def test_it_says_for_how_many_images_its_ratio_is_and_what_depends_on_the_batch(
    check: Check,
) -> None:
    text = check("train.batch=8", "train.nbs=32", "distill.attention.reduction=notes").text
    assert re.search(r"KD / task gradient +[\d.]+% in updates of 32 images", text)
    assert (
        "warning: distill.attention: its reduction, `notes`, depends on the batch, which is 8 "
        "here, not train.nbs=32; `sample`, where it has that, does not\n"
    ) in text
    assert "reduction" not in check("train.nbs=32", "distill.attention.reduction=sample").text


def test_an_epoch_in_which_lambda_is_not_zero_is_looked_for(check: Check) -> None:
    table = check("distill.attention.schedule=[[0, 0.0, 2, 0.0], [2, 0.5, .inf, 0.5]]")
    assert table.failed == []
    assert "attention 0.375 in epoch 3" in table.text


# --- what it finds


@pytest.mark.parametrize(
    "override",
    [
        "distill.attention.weight=0",
        "distill.attention.schedule=[[0, 0.0, .inf, 0.0]]",
        "distill=null",
    ],
)
def test_nothing_to_distil(check: Check, override: str) -> None:
    assert check(override).failed == ["weight * lambda"]


def test_a_term_that_does_not_reach_the_student(check: Check) -> None:
    assert check(term("Deaf")).failed[0] == "KD gradient, student"


def test_align_modules_without_a_gradient(check: Check) -> None:
    assert check(term("AroundAlign")).failed[0] == "KD gradient, align and terms"


def test_align_modules_that_are_not_in_the_optimiser(check: Check, monkeypatch) -> None:
    make_optimizer = assemble.make_optimizer

    def without_align(modules, recipe):
        return make_optimizer(modules[:1], recipe)

    monkeypatch.setattr(assemble, "make_optimizer", without_align)
    assert check().failed == ["optimiser", "align and terms, some steps later"]


def test_a_teacher_that_is_trained(check: Check, monkeypatch) -> None:
    make_optimizer = assemble.make_optimizer
    freeze = step.freeze
    teachers = []

    def hardly_freeze(teacher):
        teachers.append(freeze(teacher).requires_grad_(True))

    def with_teacher(modules, recipe):
        return make_optimizer([*modules, teachers[0]], recipe)

    monkeypatch.setattr(step, "freeze", hardly_freeze)
    monkeypatch.setattr(assemble, "make_optimizer", with_teacher)
    assert check().failed == ["teacher, some steps later"]


def test_a_teacher_whose_statistics_move(check: Check, monkeypatch) -> None:
    def freeze_weights_alone(teacher):
        return teacher.requires_grad_(False).train()

    for module in (assemble, step):
        monkeypatch.setattr(module, "freeze", freeze_weights_alone)
    assert "teacher, some steps later" in check().failed


def test_a_student_that_does_not_move(check: Check, monkeypatch) -> None:
    def stand_still(optimizer, setting) -> None:
        for group in optimizer.param_groups:
            group["lr"] = 0.0

    monkeypatch.setattr(engine, "apply_setting", stand_still)
    assert check().failed == [
        "student, some steps later",
        "align and terms, some steps later",
    ]


def test_a_tap_that_says_nothing(check: Check, monkeypatch) -> None:
    freeze = step.freeze

    def silence(teacher: nn.Module) -> None:
        for parameter in freeze(teacher).get_submodule("model.13").parameters():
            parameter.data.zero_()

    monkeypatch.setattr(step, "freeze", silence)
    table = check()
    assert table.failed[0] == "model.13"
    assert "constant or not finite" in table.text


def test_a_teacher_that_is_as_strong_everywhere(check: Check, monkeypatch) -> None:
    """As the untrained one is, and as others are after a LayerNorm: it is said, and no more, for
    terms that compare something else may still use the map.
    """

    def tilted(layer: nn.Module, inputs: object, feat: Tensor) -> Tensor:
        return feat * torch.linspace(0.5, 2, feat.shape[3])

    freeze = step.freeze

    def tilt(teacher: nn.Module) -> None:
        freeze(teacher).get_submodule("model.13").register_forward_hook(tilted)

    def line_of(tap: str) -> str:
        return next(line for line in check().text.splitlines() if f" {tap} " in line)

    even = "(its attention map is even)"
    assert line_of("model.13").endswith(even)
    monkeypatch.setattr(step, "freeze", tilt)
    assert not line_of("model.13").endswith(even)
    assert line_of("model.16").endswith(even)


def test_a_tap_that_does_not_fire(config_file: Path) -> None:
    words = r"distill\.taps: model\.23\.cv2\.0 did not fire .* no part of its head"
    with pytest.raises(SystemExit, match=words):
        run(train_script, "--config", config_file, "--check", "distill.taps=[model.23.cv2.0]")


def test_a_teacher_that_has_no_weights(check: Check) -> None:
    table = check("teacher.weights=null")
    assert table.failed == ["teacher, weights", "model.22"]
    assert "give teacher.weights" in table.text
    assert "as in a network that is not trained" in table.text


def test_one_of_two_terms_that_never_begins(check: Check) -> None:
    table = check(
        "distill.late={build: kdmini.distill.attention:AttentionTransfer, weight: 1, "
        "schedule: [[200, 1.0, 300, 0.0]]}"
    )
    assert table.failed == ["weight * lambda"]
    assert "distill.late: lambda is 0 in all 4 epochs" in table.text


def test_a_teacher_that_detects_nothing(check: Check) -> None:
    table = check("metric={build: kdmini.detection.average_precision:DetectionMetric}")
    assert table.failed == ["teacher, held-out images"]
    assert "AP50-95 0.000" in table.text


# --- beside a run


def test_a_run_in_the_folder_is_neither_in_the_way_nor_touched(
    check: Check, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text("another run's")
    assert check().failed == []
    assert [path.name for path in folder.iterdir()] == ["config.yaml"]
    assert (folder / "config.yaml").read_text() == "another run's"


def test_it_goes_with_a_config(capsys) -> None:
    with pytest.raises(SystemExit):
        run(train_script, "--resume", "runs/none", "--check")
    assert "--check goes with --config" in capsys.readouterr().err
