"""Configs: read with overrides and called, or refused in one line by key."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from kdmini import config
from kdmini.contracts import UserError

SCHEDULE = [[0, 2.0, 40, 0.0], [40, 0.3, 100, 0.0], [100, 0.05, math.inf, 0.05]]
VOC = """\
student: {build: kdmini.detection.yolo11.model:YOLO11, scale: s, weights: {path: yolo11s.pt}}
train: {epochs: 150, lr0: 0.01, amp: true, run: runs/voc}
distill:
  attention:
    weight: 0.75
    schedule: [[0, 2.0, 40, 0.0], [40, 0.3, 100, 0.0], [100, 0.05, .inf, 0.05]]
"""


@dataclass
class Train:
    epochs: int
    lr0: float = 0.01
    amp: bool = True
    run: str = "runs/voc"
    patience: int | None = None


@dataclass
class Attention:
    weight: float
    schedule: list[list[float]]


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    path = tmp_path / "voc.yaml"
    path.write_text(VOC, encoding="utf-8")
    return path


def write(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "case.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def refused(message: str, function: Callable[..., object], *args: Any, **kwargs: Any) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)


def read_and_call(path: Path, overrides: Any = ()) -> tuple[Train, Attention]:
    settings = config.load(path, overrides)
    train = config.call(Train, settings["train"], "voc.yaml: train")
    section = settings["distill"]["attention"]
    return train, config.call(Attention, section, "voc.yaml: distill.attention")


# --- a file


def test_a_correct_file_reaches_the_constructors(voc):
    train, attention = read_and_call(voc)
    assert train == Train(epochs=150)
    assert attention.schedule == SCHEDULE
    assert all(type(number) is float for row in attention.schedule for number in row)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "epochs: 150",
            "epoch: 150",
            "voc.yaml: train.epoch: unknown key; did you mean `epochs`?",
        ),
        (
            "weight: 0.75",
            "wieght: 0.75",
            "voc.yaml: distill.attention.wieght: unknown key; did you mean `weight`?",
        ),
        ("epochs: 150", "epochs: ten", "voc.yaml: train.epochs: expected int, got 'ten'"),
        ("epochs: 150", "epochs: 3.7", "train.epochs: expected int, got 3.7"),
        ("epochs: 150", "epochs: true", "train.epochs: expected int, got True"),
        ("epochs: 150", "epochs: null", "train.epochs: expected int, got None"),
        ("epochs: 150", "patience: 5", "voc.yaml: train: `Train` needs `epochs`; add it"),
        ("amp: true", "amp: half", "train.amp: expected bool, got 'half'"),
        ("amp: true", "amp: 2", "train.amp: expected bool, got 2"),
        ("run: runs/voc", "run: no", "train.run: expected str, got False; put quotes"),
        ("lr0: 0.01", "lr0: true", "train.lr0: expected float, got True"),
        ("0.05, .inf", "x, .inf", "distill.attention.schedule.2.1: expected float, got 'x'"),
        ("lr0: 0.01", "lr0: .nan", "voc.yaml:2: NaN"),
        ("lr0: 0.01", "epochs: 2", "voc.yaml:2: the key `epochs` is given twice"),
        ("    weight: 0.75", "\tweight: 0.75", "voc.yaml:5: found character '\\t'"),
        ("0.05]]", "0.05]", "voc.yaml:7: "),
    ],
)
def test_a_mistake_in_the_file(voc, old, new, message):
    assert VOC.count(old) == 1
    voc.write_text(VOC.replace(old, new))
    refused(message, read_and_call, voc)


def test_a_config_that_is_dumped_is_read_again(tmp_path, voc):
    settings = config.load(voc)
    again = config.load(write(tmp_path, config.dump(settings)))
    assert again == settings
    assert list(again) == ["student", "train", "distill"]  # in the order of the file


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path):
    assert config.load(write(tmp_path, "\ufeffa: 5e-4")) == {"a": 5e-4}


@pytest.mark.parametrize("text", ["", "\n# nothing\n", "---\n"])
def test_an_empty_file_has_no_sections(tmp_path, text):
    assert config.load(write(tmp_path, text)) == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "case.yaml: expected sections (`name: value`), got [1, 2]"),
        ("text", "got 'text'"),
        ("0", "expected sections"),
        ("a: 한글".encode("cp949"), "is not UTF-8 text"),
        ("a: \x07", "special characters are not allowed"),
        ("a: 1\nb: !!python/name:x", "case.yaml:2: could not determine a constructor"),
        ("a: 2012-13-45", "case.yaml: month must be in"),
        ("a: 1\n\n---\nb: 1", "case.yaml:3: but found another document"),
    ],
)
def test_a_file_that_is_no_config(tmp_path, text, message):
    refused(message, config.load, write(tmp_path, text))


def test_a_file_that_cannot_be_read(tmp_path):
    refused("missing.yaml", config.load, tmp_path / "missing.yaml")
    refused(str(tmp_path), config.load, tmp_path)


# --- overrides


def test_overrides_reach_the_constructors(voc):
    overrides = [
        "train.epochs=2",
        "train.lr0=5e-4",
        "train.run='no'",
        "train.patience=7",
        "distill.attention.weight=0.5",
        "distill.attention.schedule.1.0=30",
        "distill.attention.schedule.2.2=.inf",
    ]
    train, attention = read_and_call(voc, overrides)
    assert train == Train(epochs=2, lr0=0.0005, run="no", patience=7)
    assert attention.weight == 0.5
    assert attention.schedule == [SCHEDULE[0], [30, 0.3, 100, 0.0], SCHEDULE[2]]


@pytest.mark.parametrize(
    ("override", "section", "value"),
    [
        ("distill=null", "distill", None),
        ("note=a=b", "note", "a=b"),
        ("train={run: 5e-4}", "train", {"run": 5e-4}),
        ("train={run: '5e-4'}", "train", {"run": "5e-4"}),
    ],
)
def test_an_override_is_read_by_the_rules_of_yaml(voc, override, section, value):
    assert config.load(voc, [override])[section] == value


def test_an_override_keeps_its_quotes_and_the_rest_of_the_section(voc):
    settings = config.load(voc, ['train.run="5e-4"', "student.weights={path: 한글 폴더/a.pt}"])
    assert settings["train"] == {"epochs": 150, "lr0": 0.01, "amp": True, "run": "5e-4"}
    assert settings["student"]["weights"] == {"path": "한글 폴더/a.pt"}
    assert settings["student"]["scale"] == "s"


def test_of_two_overrides_the_last_counts(voc):
    assert config.load(voc, ["train.epochs=1", "train.epochs=2"])["train"]["epochs"] == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trian.epochs=2", "override `trian.epochs=2`: there is no `trian`; did you mean `train`?"),
        ("distill.atention.weight=2", "there is no `atention`; did you mean `attention`?"),
        ("zzz.epochs=2", "there is no `zzz`; known: student, train, distill"),
        ("train.epohcs=2", "voc.yaml: train.epohcs: unknown key; did you mean `epochs`?"),
        ("train.epochs=ten", "voc.yaml: train.epochs: expected int, got 'ten'"),
        ("train.epochs=", "train.epochs: expected int, got None"),
        ("train.epochs", "write it as key.path=value"),
        ("train.=2", "write it as key.path=value"),
        ("=2", "write it as key.path=value"),
        ("train.lr0=.nan", "NaN"),
        ("train.run=[1", "override `train.run=[1`:1: "),
        ("student.weights.path.x=1", "`x` would go into 'yolo11s.pt', which is not a section"),
        ("distill.attention.schedule.3=1", "`3` is not an index into a list of 3"),
        ("distill.attention.schedule.-1=1", "`-1` is not an index"),
    ],
)
def test_a_mistake_in_an_override(voc, override, message):
    refused(message, read_and_call, voc, [override])


def test_an_override_does_not_reach_a_section_through_a_shared_alias(tmp_path):
    path = write(tmp_path, "teacher: &model {scale: m, taps: [6, 8]}\nstudent: *model\n")
    settings = config.load(path, ["student.scale=s", "student.taps.0=4"])
    assert settings["teacher"] == {"scale": "m", "taps": [6, 8]}
    assert settings["student"] == {"scale": "s", "taps": [4, 8]}


def test_an_override_finds_a_key_that_is_a_number(tmp_path):
    path = write(tmp_path, "align: {6: all}")
    assert config.load(path, ["align.6=none"]) == {"align": {6: "none"}}


# --- what a section names

DETECTOR = """
from __future__ import annotations


class Detector:
    def __init__(self, names: list[str], width: int = 8, *, scale: str = 's'):
        self.settings = names, width, scale
"""
SECTION = {"build": "forked_detector:Detector", "width": 4}
WHERE = "voc.yaml: student"
OFFERED: dict[str, Any] = {"names": ["cat"], "device": "cpu", "shapes": {}}


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules that are no part of kdmini."""
    (tmp_path / "forked_detector.py").write_text(DETECTOR)
    (tmp_path / "forked_broken.py").write_text("import no_such_package\n")
    (tmp_path / "forked_hidden.py").write_text("def make(x: 'Unknown'): ...\n")
    monkeypatch.syspath_prepend(tmp_path)


def test_build_calls_a_class_outside_the_package(outside):
    section = dict(SECTION)
    assert config.build(section, WHERE, **OFFERED).settings == (["cat"], 4, "s")
    assert section == SECTION


def test_settings_win_over_what_is_offered(outside):
    section = {**SECTION, "names": ["dog"]}
    assert config.build(section, WHERE, **OFFERED).settings == (["dog"], 4, "s")


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {**SECTION, "widht": 4},
            "voc.yaml: student.widht: unknown key; did you mean `width`?",
        ),
        ({**SECTION, "width": "4"}, "voc.yaml: student.width: expected int, got '4'"),
        ({**SECTION, "device": "cpu"}, "student.device: unknown key"),
        (
            {"build": "forked_detector:Detectr"},
            "`forked_detector` has no class or function `Detectr`; did you mean `D",
        ),
        (
            {"build": "forked_detectr:Detector"},
            "student.build: cannot import `forked_detectr`: No module named",
        ),
        (
            {"build": "forked_broken:Detector"},
            "cannot import `forked_broken`: No module named 'no_such_package'",
        ),
        (
            {"build": "forked_hidden:make"},
            "the signature of `make` cannot be read: name 'Unknown' is not defined",
        ),
        ({"build": "math:pi"}, "`math` has no class or function `pi`"),
        ({"build": "forked_detector.Detector"}, "student.build: expected package.module:Name"),
        ({"build": "../evil:Name"}, "expected package.module:Name"),
        ({"build": 3}, "expected package.module:Name, got 3"),
        (
            {"scale": "s"},
            "voc.yaml: student: expected a section with `build: package.module:Name`",
        ),
        (
            None,
            "voc.yaml: student: expected a section with `build: package.module:Name`, got None",
        ),
    ],
)
def test_a_section_that_cannot_be_built(outside, section, message):
    refused(message, config.build, section, WHERE, **OFFERED)


def test_what_a_constructor_needs_and_nobody_gives(outside):
    refused("`Detector` needs `names`; add it", config.build, SECTION, WHERE)


# --- calls with open signatures


def forwards(width: int, **others: float) -> tuple[int, dict[str, float]]:
    return width, others


def test_a_function_may_take_other_names():
    called = config.call(forwards, {"width": 1, "gain": 2}, "a: b", names=["cat"])
    assert called == (1, {"gain": 2.0})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 1, "gain": "x"}, "a: b.gain: expected float, got 'x'"),
        ({"width": 1, 7: 1.0}, "a: b.7: unknown key"),
    ],
)
def test_other_names_are_checked_too(settings, message):
    refused(message, config.call, forwards, settings, "a: b")


class NoSettings(torch.nn.Module):
    """Its constructor is nn.Module's own, (*args, **kwargs)."""


def test_a_module_without_a_constructor_takes_no_settings():
    assert isinstance(config.call(NoSettings, {}, "a: b", shapes={}), NoSettings)
    refused("a: b.p: unknown key; known: none", config.call, NoSettings, {"p": 2}, "a: b")
    refused("voc.yaml: p: unknown key", config.call, NoSettings, {"p": 2}, "voc.yaml")


def test_a_list_is_no_section():
    refused("a: b: expected a section", config.call, NoSettings, [1], "a: b")
