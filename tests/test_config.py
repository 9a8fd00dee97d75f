import datetime
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import yaml

from kdmini import config
from kdmini.contracts import UserError

INF = math.inf
SCHEDULE = [[0, 2.0, 40, 0.0], [40, 0.3, 100, 0.0], [100, 0.05, INF, 0.05]]
VOC = """\
student: {build: kdmini.detection.yolo11.model:YOLO11, scale: s, weights: {path: yolo11s.pt, classes: by_name}}
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
def voc(tmp_path):
    path = tmp_path / "voc.yaml"
    path.write_text(VOC, encoding="utf-8")
    return path


def write(tmp_path, text):
    path = tmp_path / "case.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def refused(message, function, *args, **kwargs):
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)


def read_and_call(path, overrides=()):
    read = config.load(path, overrides)
    train = config.call(Train, read["train"], "voc.yaml: train")
    return train, config.call(
        Attention, read["distill"]["attention"], "voc.yaml: distill.attention"
    )


def test_a_correct_file_reaches_the_constructors(voc):
    train, attention = read_and_call(voc)
    assert train == Train(epochs=150)
    assert attention.schedule == SCHEDULE
    assert all(type(number) is float for row in attention.schedule for number in row)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("epochs: 150", "epoch: 150", "voc.yaml: train.epoch: unknown key; did you mean `epochs`?"),
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
def test_mistake_in_the_file(voc, old, new, message):
    assert VOC.count(old) == 1
    voc.write_text(VOC.replace(old, new))
    refused(message, read_and_call, voc)


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
def test_mistake_in_an_override(voc, override, message):
    refused(message, read_and_call, voc, [override])


def test_overrides(voc):
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

    read = config.load(
        voc,
        ["distill=null", 'train.run="5e-4"', "note=a=b", "student.weights={path: 한글 폴더/a.pt}"],
    )
    assert read["distill"] is None
    assert read["train"]["run"] == "5e-4"
    assert read["note"] == "a=b"
    assert read["student"]["weights"] == {"path": "한글 폴더/a.pt"}
    assert config.load(voc, ["train.epochs=1", "train.epochs=2"])["train"]["epochs"] == 2


def test_an_override_does_not_reach_a_section_through_a_shared_alias(tmp_path):
    path = write(tmp_path, "teacher: &model {scale: m, taps: [6, 8]}\nstudent: *model\n")
    read = config.load(path, ["student.scale=s", "student.taps.0=4"])
    assert read == {
        "teacher": {"scale": "m", "taps": [6, 8]},
        "student": {"scale": "s", "taps": [4, 8]},
    }


def test_an_override_finds_a_key_that_is_a_number(tmp_path):
    assert config.load(write(tmp_path, "align: {6: all}"), ["align.6=none"]) == {
        "align": {6: "none"}
    }


def test_files_that_are_no_config(tmp_path):
    for text in ("", "\n# nothing\n", "---\n"):
        assert config.load(write(tmp_path, text)) == {}
    refused(
        "case.yaml: expected sections (`name: value`), got [1, 2]",
        config.load,
        write(tmp_path, "[1, 2]"),
    )
    refused("got 'text'", config.load, write(tmp_path, "text"))
    refused("expected sections", config.load, write(tmp_path, "0"))
    refused("is not UTF-8 text", config.load, write(tmp_path, "a: 한글".encode("cp949")))
    refused("special characters are not allowed", config.load, write(tmp_path, "a: \x07"))
    refused(
        "case.yaml:2: could not determine a constructor",
        config.load,
        write(tmp_path, "a: 1\nb: !!python/name:x"),
    )
    refused("case.yaml: month must be in", config.load, write(tmp_path, "a: 2012-13-45"))
    refused(
        "case.yaml:3: but found another document", config.load, write(tmp_path, "a: 1\n\n---\nb: 1")
    )
    refused("missing.yaml", config.load, tmp_path / "missing.yaml")
    refused(str(tmp_path), config.load, tmp_path)


def test_numbers_with_an_exponent(tmp_path):
    numbers = ["5e-4", "1e3", "1E3", "-2e+3", ".5e1", "3.e2", "1.5e3", "1.0e-05"]
    read = config.load(
        write(
            tmp_path,
            "\ufeffa: [" + ", ".join(numbers) + "]\nb: ['5e-4', e3, 1e, 12e5x, 1.2.3, 07e]",
        )
    )
    assert read["a"] == [float(number) for number in numbers]
    assert all(type(number) is float for number in read["a"])
    assert all(type(text) is str for text in read["b"])


def test_repeated_keys(tmp_path):
    refused(
        "case.yaml:3: the key `a` is given twice",
        config.load,
        write(tmp_path, "x:\n  a: 1\n  'a': 2\n"),
    )
    refused(
        "the key `<<` is given twice",
        config.load,
        write(tmp_path, "b: &b {a: 1}\nx: {<<: *b, <<: *b}\n"),
    )


MERGES = {
    "own keys win, whether they stand before or after": (
        "b: &b {a: 1, c: 2}\nx: {a: 3, <<: *b, c: 4}",
        {"a": 3, "c": 4},
    ),
    "a base that merges and overrides": (
        "b: &b {a: 1, b: 2}\nmore: {deep: &deep {<<: *b, a: 3}}\nx: {<<: *deep, b: 4}",
        {"a": 3, "b": 4},
    ),
    "three levels, each overriding the one before": (
        "p: &p {a: 1, b: 1, c: 1, d: 1}\nq: &q {<<: *p, b: 2, c: 2, d: 2}\n"
        "r: &r {<<: *q, c: 3, d: 3}\nx: {<<: *r, d: 4}",
        {"a": 1, "b": 2, "c": 3, "d": 4},
    ),
    "of a list the earlier base wins": (
        "p: &p {a: 1, b: 1}\nq: &q {a: 2, c: 2}\nx: {<<: [*p, *q], d: 3}",
        {"a": 1, "b": 1, "c": 2, "d": 3},
    ),
    "a list of bases that merge and override": (
        "p: &p {a: 1, b: 1}\nq: &q {<<: *p, b: 2, c: 2}\nr: &r {<<: *p, c: 3, d: 3}\nx: {<<: [*r, *q]}",
        {"a": 1, "b": 1, "c": 3, "d": 3},
    ),
    "a base that is used twice": (
        "p: &p {a: 1}\nq: &q {<<: *p, a: 2}\ny: {<<: *q}\nx: {<<: [*p, *q]}",
        {"a": 1},
    ),
    "keys of any type": (
        "b: &b {1: one, 2.5: two, true: yes, null: nothing, '1': text, 2012-01-01: day}\n"
        "q: &q {<<: *b, 0x1: ONE, 2.50: TWO, on: false}\nx: {<<: *q, ~: NOTHING}",
        {
            1: False,
            2.5: "TWO",
            None: "NOTHING",
            "1": "text",
            datetime.date(2012, 1, 1): "day",
        },  # True is 1
    ),
    "a bare = is a text": ("b: &b {=: 1}\nx: {<<: *b, a: 2}", {"=": 1, "a": 2}),
    "an empty base": ("b: &b {}\nx: {<<: *b, a: 1}", {"a": 1}),
    "a base in place": ("x: {<<: {a: 1, b: 2}, b: 3}", {"a": 1, "b": 3}),
}


@pytest.mark.parametrize("text, merged", MERGES.values(), ids=MERGES)
def test_merged_keys(tmp_path, text: str, merged: dict):
    assert config.load(write(tmp_path, text))["x"] == merged


@pytest.mark.parametrize(
    "text, fault",
    [
        ("x: {<<: 3}", "case.yaml:1: `<<`: expected a mapping, or a list of them, got a scalar"),
        (
            "a: {}\nx: {<<: [{}, b]}",
            "case.yaml:2: `<<`: expected a mapping, or a list of them, got a scalar",
        ),
        ("x: {<<: [[{}]]}", "got a sequence"),
        ("x: &x {<<: *x, a: 1}", "case.yaml:1: `<<`: merges itself"),
        ("x: &x {y: &y {<<: *x}, <<: *y}", "merges itself"),
    ],
)
def test_what_cannot_be_merged(tmp_path, text: str, fault: str):
    refused(fault, config.load, write(tmp_path, text))


ROUND_TRIP: dict[Any, Any] = {
    "floats": [1e-5, 5e-4, 1e16, 1.5e300, 0.1, -0.0, 3.0, INF, -INF],
    "schedule": SCHEDULE,
    "text": [
        "5e-4",
        "1e3",
        "no",
        "null",
        "~",
        "",
        " a",
        "1:30",
        "010",
        ".inf",
        "2012-01-01",
        "a: b",
        "#'",
        "두\n줄",
    ],
    "한글 키": "한글 값 with 말",
    "none": None,
    "flags": [True, False, None],
    "empty": {"list": [], "mapping": {}},
    "shared": [SCHEDULE, SCHEDULE],
    6: {"tuple of mappings": [{"a": 1}, {"b": [1, 2]}]},
    "long": [f"class {index} with a name" for index in range(30)],
}


def test_dump_reads_back_equal(tmp_path, voc):
    text = config.dump(ROUND_TRIP)
    read = config.load(write(tmp_path, text))
    assert read == ROUND_TRIP
    assert [type(number) for number in read["floats"]] == [float] * 9
    assert "한글 값" in text and "&id" not in text
    assert "schedule: [[0, 2.0, 40, 0.0], [40, 0.3, 100, 0.0], [100, 0.05, .inf, 0.05]]\n" in text
    assert yaml.safe_load(text)["text"] == ROUND_TRIP["text"]  # and other readers see text as text

    read = config.load(voc)
    again = config.load(write(tmp_path, config.dump(read)))
    assert again == read
    assert list(again) == ["student", "train", "distill"]  # in the order of the file


def test_build_from_a_module_outside_the_package(tmp_path, monkeypatch):
    (tmp_path / "forked_detector.py").write_text(
        "from __future__ import annotations\n"
        "class Detector:\n"
        "    def __init__(self, names: list[str], width: int = 8, *, scale: str = 's'):\n"
        "        self.settings = names, width, scale\n"
    )
    (tmp_path / "forked_broken.py").write_text("import no_such_package\n")
    (tmp_path / "forked_hidden.py").write_text("def make(x: 'Unknown'): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    section = {"build": "forked_detector:Detector", "width": 4}
    where = "voc.yaml: student"
    offered = {"names": ["cat"], "device": "cpu", "shapes": {}}
    assert config.build(section, where, **offered).settings == (["cat"], 4, "s")
    assert config.build(section | {"names": ["dog"]}, where, **offered).settings == (
        ["dog"],
        4,
        "s",
    )
    assert section == {"build": "forked_detector:Detector", "width": 4}

    cases = [
        (section | {"widht": 4}, "voc.yaml: student.widht: unknown key; did you mean `width`?"),
        (section | {"width": "4"}, "voc.yaml: student.width: expected int, got '4'"),
        (section | {"device": "cpu"}, "student.device: unknown key"),
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
        ({"scale": "s"}, "voc.yaml: student: expected a section with `build: package.module:Name`"),
        (None, "voc.yaml: student: expected a section with `build: package.module:Name`, got None"),
    ]
    for broken, message in cases:
        refused(message, config.build, broken, where, **offered)
    refused("`Detector` needs `names`; add it", config.build, section, where)


def annotated(annotation):
    def take(x):
        return x

    take.__annotations__["x"] = annotation
    return take


@pytest.mark.parametrize(
    ("annotation", "value", "expected"),
    [
        (Any, [1, "a"], [1, "a"]),
        (float, 3, 3.0),
        (float, INF, INF),
        (Path, "한글/a.pt", Path("한글/a.pt")),
        (int | None, None, None),
        (float | int, 3, 3),
        (float | None, 3, 3.0),
        (str | dict[str, Any], {"path": "a"}, {"path": "a"}),
        (Path | None, "a", Path("a")),
        (bool | Literal["auto"], "auto", "auto"),
        (Literal["s", "m", 1], 1, 1),
        (tuple[int, float], [1, 2], (1, 2.0)),
        (tuple[float, ...], [1, 2], (1.0, 2.0)),
        (Sequence[float], [1], [1.0]),
        (set[str], ["feats"], {"feats"}),
        (list, [1, "a"], [1, "a"]),
        (dict[int, float], {6: 1}, {6: 1.0}),
        (Mapping[str, list[int] | None], {"a": [1], "b": None}, {"a": [1], "b": None}),
        (list[dict[str, tuple[int, int]]], [{"a": [1, 2]}], [{"a": (1, 2)}]),
        (dict, {}, {}),
    ],
)
def test_value_that_fits(annotation, value, expected):
    result = config.call(annotated(annotation), {"x": value}, "voc.yaml: s")
    assert result == expected
    assert repr(result) == repr(expected)  # 3 and 3.0 are equal, their types are not


@pytest.mark.parametrize(
    ("annotation", "value", "message"),
    [
        (float, math.nan, "s.x: expected float, got nan"),
        (list[float], [1.0, math.nan], "s.x.1: expected float, got nan"),
        (float, "1", "expected float, got '1'"),
        (str, 3, "expected str, got 3"),
        (str | None, False, "got False; put quotes around yes, no"),
        (bool, 1, "expected bool, got 1"),
        (Path, 3, "expected pathlib.Path, got 3"),
        (type(None), 3, "expected NoneType, got 3"),
        (int | None, "ten", "expected int | None, got 'ten'"),
        (Literal["notes", "sample"], "smaple", "'smaple' is not a choice; did you mean `sample`?"),
        (Literal["notes", "sample"], 3, "expected Literal['notes', 'sample'], got 3"),
        (Literal[1], True, "got True"),
        (list[int], 3, "expected list[int], got 3"),
        (list[str], "cat", "expected list[str], got 'cat'"),
        (list[int], [1, "a"], "s.x.1: expected int, got 'a'"),
        (list[list[float]], [[0, 2.0], 40], "s.x.1: expected list[float], got 40"),
        (tuple[int, int], [1, 2, 3], "expected tuple[int, int], got [1, 2, 3]"),
        (dict[str, float], {"a": {"b": 1}}, "s.x.a: expected float, got {'b': 1}"),
        (dict[str, float], {6: 1.0}, "s.x.6: expected str, got 6"),
        (dict[str, float], [1], "expected dict[str, float], got [1]"),
        (torch.device, "cuda", "expected torch.device, got 'cuda'"),
        (list[int], "a" * 500, "aaa..."),
    ],
)
def test_value_that_does_not_fit(annotation, value, message):
    refused(message, config.call, annotated(annotation), {"x": value}, "voc.yaml: s")


def test_calls_with_open_signatures():
    def forwards(width: int, **others: float):
        return width, others

    assert config.call(forwards, {"width": 1, "gain": 2}, "a: b", names=["cat"]) == (
        1,
        {"gain": 2.0},
    )
    refused(
        "a: b.gain: expected float, got 'x'",
        config.call,
        forwards,
        {"width": 1, "gain": "x"},
        "a: b",
    )
    refused("a: b.7: unknown key", config.call, forwards, {"width": 1, 7: 1.0}, "a: b")

    class NoSettings(torch.nn.Module):
        pass

    assert isinstance(config.call(NoSettings, {}, "a: b", shapes={}), NoSettings)
    refused("a: b.p: unknown key; known: none", config.call, NoSettings, {"p": 2}, "a: b")
    refused("a: b: expected a section", config.call, NoSettings, [1], "a: b")
    refused("voc.yaml: p: unknown key", config.call, NoSettings, {"p": 2}, "voc.yaml")
