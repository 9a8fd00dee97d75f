"""Ways of training on nothing, or on something else than was meant: each is refused before the
first step, or said.
"""

import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

import eval as eval_script
import train as train_script
from examples.shapes import SHAPE_NAMES
from kdmini import checkpoint
from kdmini.detection.yolo11.model import YOLO11
from tests.commands import run
from tests.conftest import TINY
from tests.faults.own import Own
from tests.faults.record import survived

ATTENTION = "build: kdmini.distill.attention:AttentionTransfer, weight: 1"
LOGITS = "build: kdmini.terms.logits:LogitDistillation, weight: 1"
TAPS = "taps: [model.6, model.13]"
FAULT = "Training: on nothing, or on something else"


@pytest.fixture
def line_of(config_file: Path, own: Own, tmp_path: Path) -> Callable[..., str]:
    """-> the line that a script ends with; nothing of a run is left behind."""

    def refusal(*changes: str, script: ModuleType = train_script) -> str:
        with pytest.raises(SystemExit) as left:
            run(script, "--config", config_file, f"data.root={own.folder}", *changes)
        assert not (tmp_path / "run").exists()
        survived(FAULT, of="runs without a word")
        return str(left.value.code)

    return refusal


def weights(folder: Path, names: list[str]) -> Path:
    """A best.pt of a detector of these classes."""
    path = folder / f"{len(names)}-{names[0]}.pt"
    checkpoint.save_best(path, YOLO11(names, [0.5, 0.0625, 1024]), 64, 0, 0.0)
    return path


# --- the ground truth


def rewrite(own: Own, change: Callable[[str], str]) -> None:
    for path in (own.folder / "Annotations").glob("*.xml"):
        path.write_text(change(path.read_text()))


def scaled(factor: float) -> Callable[[str], str]:
    def change(text: str) -> str:
        pattern = r"(<(?:x|y)(?:min|max)>)(\d+)"
        return re.sub(pattern, lambda found: f"{found[1]}{float(found[2]) * factor:g}", text)

    return change


def wrapped(text: str) -> str:
    return text.replace("<object>", "<objects><object>", 1).replace(
        "</annotation>", "</objects></annotation>"
    )


def all_difficult(text: str) -> str:
    return text.replace("<difficult>0", "<difficult>1")


def without_objects(text: str) -> str:
    return re.sub(r"<object>.*</object>", "", text, flags=re.DOTALL)


TRUTHS = {
    "boxes in parts of the sides": (scaled(1 / 64), "from 0 to 1; multiply by width and height"),
    "boxes of an image five times as large": (scaled(5), r"as if these were \d+\.\d times larger"),
    "objects within another element": (wrapped, "<object> within <objects>"),
    "objects that are all difficult": (all_difficult, "no object to learn from"),
    "no objects": (without_objects, "has an object"),
}


@pytest.mark.parametrize("case", TRUTHS)
def test_a_training_set_without_objects(case: str, own: Own, line_of) -> None:
    change, words = TRUTHS[case]
    rewrite(own, change)
    assert re.search(words, line_of())


# --- the classes


def test_a_student_of_other_classes(line_of, tmp_path: Path) -> None:
    six = weights(tmp_path, SHAPE_NAMES)
    names = "[circle, square, triangle, star, ring, cross, moon]"
    others = [f"data.train.names={names}", f"data.val.names={names}"]
    kept = f"student.weights={{path: {six}, classes: keep}}"
    told = line_of(*others, kept)
    assert "the student has 6 classes, the data 7" in told
    assert "only in the data: 'moon'" in told
    assert line_of(*others, kept, script=eval_script) == told
    assert line_of(*others, kept, "--check") == told


def test_a_student_of_the_same_classes_in_another_order(line_of, tmp_path: Path) -> None:
    file = weights(tmp_path, ["square", "circle", *SHAPE_NAMES[2:]])
    for source in (f"{{path: {file}, classes: keep}}", file):
        told = line_of(f"student.weights={source}")
        assert "in another order: class 0 is 'square'" in told
        assert "'circle' in the data" in told


def test_sets_of_the_same_classes_in_another_order(line_of) -> None:
    told = line_of("data.val.names=[square, circle, triangle, star, ring, cross]")
    assert "data.val and data.train have the same classes in another order" in told


def test_scores_of_classes_that_the_weights_do_not_know(line_of, tmp_path: Path) -> None:
    file = weights(tmp_path, ["circle", "moon"])
    told = line_of(f"student.weights={{path: {file}, classes: by_name}}", script=eval_script)
    assert "know nothing of 5 of 6 classes, such as 'square'" in told


# --- the teacher and the terms

STRICT = "allow_void=false"
TERMS = {
    "a schedule that begins after the last epoch": (
        f"distill={{{TAPS}, late: {{{ATTENTION}, schedule: [[200, 1.0, 300, 0.0]]}}}}",
        "distill.late: lambda is 0 in all 4 epochs",
    ),
    "a weight of 0": (
        f"distill={{{TAPS}, idle: {{build: {ATTENTION.split()[1][:-1]}, weight: 0}}}}",
        "distill.idle: weight is 0",
    ),
    "no term": (f"distill={{{TAPS}}}", "distill has no term"),
    "an empty list": ("distill=[]", r"distill: expected a section.*got \[\]"),
    "one tap twice": (
        "distill.taps=[model.6, [model.6, model.8]]",
        "'model.6' of the student is named twice, for 'model.6' and 'model.8' of the teacher",
    ),
}


@pytest.mark.parametrize("case", TERMS)
def test_a_term_that_does_nothing(case: str, line_of, teacher_file: Path) -> None:
    change, words = TERMS[case]
    assert re.search(words, line_of(f"teacher.weights={teacher_file}", STRICT, change))


def test_a_teacher_without_weights(line_of) -> None:
    told = line_of(STRICT)
    assert "teacher: has no weights" in told
    assert "allow_void=true" in told


def test_a_teacher_whose_scores_are_those_of_chance(line_of, tmp_path: Path) -> None:
    file = weights(tmp_path, ["circle", "moon"])
    teacher = f"teacher={{build: kdmini.detection.yolo11.model:YOLO11, scale: {TINY}, weights: "
    by_name = f"{teacher}{{path: {file}, classes: by_name}}}}"
    told = line_of(STRICT, by_name, f"distill={{taps: [], logits: {{{LOGITS}}}}}")
    assert "teacher: its weights have not learned 5 of 6 classes, such as 'square'" in told


def test_a_softmax_over_one_class(line_of, own: Own) -> None:
    rewrite(own, lambda text: re.sub("<name>.*</name>", "<name>thing</name>", text))
    names = ["data.train.names=[thing]", "data.val.names=[thing]"]
    told = line_of(*names, f"distill={{taps: [], logits: {{{LOGITS}, form: softmax}}}}")
    assert "softmax over one class" in told


WEIGHTS = {
    "{path: PATH, clases: keep}": "unknown key `clases`",
    "{classes: keep}": "`path`",
    "{path: PATH, classes: kept}": "got 'kept'",
}


@pytest.mark.parametrize("settings", WEIGHTS)
def test_settings_of_weights(settings: str, line_of, teacher_file: Path) -> None:
    for name in ("student", "teacher"):
        told = line_of(f"{name}.weights={settings.replace('PATH', str(teacher_file))}")
        assert WEIGHTS[settings] in told


# --- what is found before an image is decoded


LATE = {
    "metric.build=kdmini.detection.average_precision:DetectionMetrik": "DetectionMetric`?",
    "metric.build=builtins:print": "has no fitness, records, update, compute",
    "metric={build: kdmini.detection.average_precision:DetectionMetric, iuo: 1}": "iuo",
    "train.batch=32": "32 is more than the 24 training images",
}


@pytest.mark.parametrize("change", LATE)
def test_it_is_found_before_decoding(change: str, line_of, teacher_file: Path, monkeypatch) -> None:
    monkeypatch.setattr("kdmini.data.store.decode_all", None)
    changes = (change, f"student.weights={teacher_file}")
    assert LATE[change] in line_of(*changes)
    if "metric" in change:
        assert LATE[change] in line_of(*changes, script=eval_script)


# --- what is said


def said(config_file: Path, capsys, *changes: str) -> str:
    run(train_script, "--config", config_file, "train.epochs=1", *changes)
    survived(FAULT, of="runs without a word")
    return capsys.readouterr().out


def test_a_warm_up_that_takes_the_whole_run(config_file: Path, capsys) -> None:
    told = said(config_file, capsys, "train.warmup_steps=100")
    assert "3 updates of the weights; warm-up in 3 of 3 steps; mosaic in 0 of 1 epochs" in told
    assert "the warm-up takes 100% of the run, whose learning rate reaches 2% of train.lr0" in told
    assert "warning: mosaic never happens" in told


def test_nothing_is_said_where_nothing_is_wrong(config_file: Path, capsys) -> None:
    phases = ["train.warmup_epochs=0", "data.augment={close_mosaic: 0}"]
    told = said(config_file, capsys, *phases, "distill.attention.reduction=sample")
    assert "2 updates of the weights; warm-up in 0 of 3 steps; mosaic in 1 of 1 epochs" in told
    assert "warning" not in told
