"""Values out of YAML that fit an annotation, and those that do not."""

import math
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from kdmini.contracts import UserError
from kdmini.typed import LONGEST, fit, short


@pytest.mark.parametrize(
    ("annotation", "value", "expected"),
    [
        (Any, [1, "a"], [1, "a"]),
        (float, 3, 3.0),
        (float, math.inf, math.inf),
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
def test_a_value_that_fits(annotation, value, expected):
    cast = fit(value, annotation, "voc.yaml: s.x")
    assert cast == expected
    assert repr(cast) == repr(expected)  # 3 and 3.0 are equal, their types are not


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
def test_a_value_that_does_not_fit(annotation, value, message):
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        fit(value, annotation, "voc.yaml: s.x")
    assert "\n" not in str(caught.value)


def test_a_value_that_holds_itself_many_times_over_is_cut_before_it_is_written():
    value = [1, 2]
    for _ in range(60):
        value = [value, value]
    started = time.process_time()
    assert len(short(value)) <= LONGEST
    assert len(short({"a": value})) <= LONGEST
    assert time.process_time() - started < 1


def test_a_number_that_python_does_not_write_is_named_by_its_kind():
    assert short(16**9000) == "int too long to show"
