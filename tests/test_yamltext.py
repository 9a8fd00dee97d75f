"""YAML where PyYAML alone would misread it, and written so that it reads back equal."""

import datetime
import math
import re
import time
from typing import Any

import pytest
import yaml

from kdmini.contracts import UserError
from kdmini.yamltext import dump, parse


def refused(message: str, text: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        parse(text, "case.yaml")
    assert "\n" not in str(caught.value)


# --- numbers


@pytest.mark.parametrize(
    "number", ["5e-4", "1e3", "1E3", "-2e+3", ".5e1", "3.e2", "1.5e3", "1.0e-05"]
)
def test_a_number_with_an_exponent_is_a_float(number):
    # within a text that begins with a byte order mark
    value = parse(f"\ufeffa: [{number}]", "case.yaml")["a"][0]
    assert value == float(number)
    assert type(value) is float


@pytest.mark.parametrize("text", ["'5e-4'", "e3", "1e", "12e5x", "1.2.3", "07e"])
def test_what_only_looks_like_one_is_a_text(text):
    assert parse(f"a: {text}", "case.yaml")["a"] == text.strip("'")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0),
        ("-12", -12),
        ("1_000", 1000),
        ("0x1F", 31),
        ("0b11", 3),
        ("1.5", 1.5),
        ("-.5", -0.5),
        ("3.", 3.0),
        (".inf", math.inf),
        ("-.INF", -math.inf),
    ],
)
def test_numbers_as_everywhere(text, value):
    read = parse(f"a: {text}", "case.yaml")["a"]
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize("text", ["12:30:45", "1:30", "12:30.5", "-1:30", "010", "007", "0x"])
def test_a_time_and_a_number_that_begins_with_0_are_texts(text):
    assert yaml.safe_load("a: 12:30:45") == {"a": 45045}  # in base 60, by YAML 1.1
    assert parse(f"a: {text}", "case.yaml")["a"] == text
    assert parse(dump({"a": text}), "case.yaml") == {"a": text}


# --- keys


def test_repeated_keys_are_refused():
    refused("case.yaml:3: the key `a` is given twice", "x:\n  a: 1\n  'a': 2\n")
    refused("the key `<<` is given twice", "b: &b {a: 1}\nx: {<<: *b, <<: *b}\n")


class Merge:
    """A text, and what becomes of its `x`."""

    def __init__(self, *lines: str, x: dict[Any, Any]):
        self.text = "\n".join(lines)
        self.x = x


MERGES = {
    "own keys win, whether they stand before or after": Merge(
        "b: &b {a: 1, c: 2}",
        "x: {a: 3, <<: *b, c: 4}",
        x={"a": 3, "c": 4},
    ),
    "a base that merges and overrides": Merge(
        "b: &b {a: 1, b: 2}",
        "more: {deep: &deep {<<: *b, a: 3}}",
        "x: {<<: *deep, b: 4}",
        x={"a": 3, "b": 4},
    ),
    "three levels, each overriding the one before": Merge(
        "p: &p {a: 1, b: 1, c: 1, d: 1}",
        "q: &q {<<: *p, b: 2, c: 2, d: 2}",
        "r: &r {<<: *q, c: 3, d: 3}",
        "x: {<<: *r, d: 4}",
        x={"a": 1, "b": 2, "c": 3, "d": 4},
    ),
    "of a list the earlier base wins": Merge(
        "p: &p {a: 1, b: 1}",
        "q: &q {a: 2, c: 2}",
        "x: {<<: [*p, *q], d: 3}",
        x={"a": 1, "b": 1, "c": 2, "d": 3},
    ),
    "a list of bases that merge and override": Merge(
        "p: &p {a: 1, b: 1}",
        "q: &q {<<: *p, b: 2, c: 2}",
        "r: &r {<<: *p, c: 3, d: 3}",
        "x: {<<: [*r, *q]}",
        x={"a": 1, "b": 1, "c": 3, "d": 3},
    ),
    "a base that is used twice": Merge(
        "p: &p {a: 1}",
        "q: &q {<<: *p, a: 2}",
        "y: {<<: *q}",
        "x: {<<: [*p, *q]}",
        x={"a": 1},
    ),
    "keys of any type": Merge(
        "b: &b {1: one, 2.5: two, true: yes, null: nothing, '1': text, 2012-01-01: day}",
        "q: &q {<<: *b, 0x1: ONE, 2.50: TWO, on: false}",
        "x: {<<: *q, ~: NOTHING}",
        x={
            1: False,  # True is 1
            2.5: "TWO",
            None: "NOTHING",
            "1": "text",
            datetime.date(2012, 1, 1): "day",
        },
    ),
    "a bare = is a text": Merge(
        "b: &b {=: 1}",
        "x: {<<: *b, a: 2}",
        x={"=": 1, "a": 2},
    ),
    "an empty base": Merge(
        "b: &b {}",
        "x: {<<: *b, a: 1}",
        x={"a": 1},
    ),
    "a base in place": Merge(
        "x: {<<: {a: 1, b: 2}, b: 3}",
        x={"a": 1, "b": 3},
    ),
}


@pytest.mark.parametrize("merge", MERGES.values(), ids=MERGES)
def test_merged_keys(merge):
    assert parse(merge.text, "case.yaml")["x"] == merge.x


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("x: {<<: 3}", "case.yaml:1: `<<`: expected a mapping, or a list of them, got a scalar"),
        (
            "a: {}\nx: {<<: [{}, b]}",
            "case.yaml:2: `<<`: expected a mapping, or a list of them, got a scalar",
        ),
        ("x: {<<: [[{}]]}", "got a sequence"),
        ("x: &x {<<: *x, a: 1}", "case.yaml:1: an alias stands in what it names"),
        ("x: &x {y: &y {<<: *x}, <<: *y}", "an alias stands in what it names"),
    ],
)
def test_what_cannot_be_merged(text, fault):
    refused(fault, text)


# --- written and read back

SCHEDULE = [[0, 2.0, 40, 0.0], [40, 0.3, 100, 0.0], [100, 0.05, math.inf, 0.05]]
TEXTS = [
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
]
ROUND_TRIP: dict[Any, Any] = {
    "floats": [1e-5, 5e-4, 1e16, 1.5e300, 0.1, -0.0, 3.0, math.inf, -math.inf],
    "schedule": SCHEDULE,
    "text": TEXTS,
    "한글 키": "한글 값 with 말",
    "none": None,
    "flags": [True, False, None],
    "empty": {"list": [], "mapping": {}},
    "shared": [SCHEDULE, SCHEDULE],
    6: {"tuple of mappings": [{"a": 1}, {"b": [1, 2]}]},
    "long": [f"class {index} with a name" for index in range(30)],
}


def test_what_is_dumped_reads_back_equal():
    value = parse(dump(ROUND_TRIP), "case.yaml")
    assert value == ROUND_TRIP
    assert {type(number) for number in value["floats"]} == {float}
    assert list(value) == list(ROUND_TRIP)  # in the same order


def test_other_readers_see_text_as_text():
    assert yaml.safe_load(dump(ROUND_TRIP))["text"] == TEXTS


def test_what_is_dumped_reads_well():
    text = dump(ROUND_TRIP)
    assert "한글 값" in text
    assert "&id" not in text
    assert "schedule: [[0, 2.0, 40, 0.0], [40, 0.3, 100, 0.0], [100, 0.05, .inf, 0.05]]\n" in text


# --- aliases


def tens(levels: int, item: str = "[{}]") -> str:
    """Ten aliases of ten aliases, and so on."""
    lines = ["a0: &a0 {x: 1}"]
    for level in range(1, levels + 1):
        aliases = ", ".join([f"*a{level - 1}"] * 10)
        lines.append(f"a{level}: &a{level} " + item.replace("{}", aliases))
    return "\n".join(lines)


def test_aliases_that_make_a_thousand_values_are_read():
    assert len(parse(tens(3), "case.yaml")["a3"]) == 10


@pytest.mark.parametrize("item", ["[{}]", "{<<: [{}]}"], ids=["list", "merged"])
def test_aliases_that_make_more_values_than_a_config_has_are_refused_at_once(item):
    started = time.process_time()
    refused("case.yaml:6: aliases make it more than 100,000 values", tens(60, item))
    assert time.process_time() - started < 2


@pytest.mark.parametrize("text", ["a: &a [*a]", "a: &a {b: *a}", "a: &a {b: [1, {c: *a}]}"])
def test_an_alias_within_what_it_names_is_refused(text):
    refused("case.yaml:1: an alias stands in what it names", text)


@pytest.mark.parametrize("text", ["[" * 3000 + "]" * 3000, "{a: " * 3000 + "}" * 3000])
def test_what_is_nested_too_deep_is_refused(text):
    refused("case.yaml: brackets or sections are nested too deep", text)
