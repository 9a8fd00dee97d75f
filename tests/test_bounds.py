"""Every number that a config can set: in its range it is taken, outside it is one line.

The numbers are found, not listed: see every_number.py.
"""

import inspect
import math
import re
from typing import Annotated, Any, Literal

import pytest

from kdmini import config
from kdmini.bounds import Range, Share
from kdmini.contracts import UserError
from kdmini.typed import short
from tests.every_number import (
    Key,
    every_key,
    high_end,
    low_end,
    numbers_in,
    outside,
    range_of,
    targets,
)

KEYS = every_key()
BOUNDED = [key for key in KEYS if key.number.within is not None]
IDS = [f"{key}-{index}" for index, key in enumerate(BOUNDED)]
WHERE = "voc.yaml: section"


def taken(key: Key, value: Any) -> Any:
    """What the key's target would get of the value; the target itself is not called."""
    target = config.locate(key.target, key.target)
    parameter = inspect.signature(target, eval_str=True).parameters[key.name]
    keyword = parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)

    def target_of_one_key(**settings: Any) -> Any:
        return settings[key.name]

    target_of_one_key.__signature__ = inspect.Signature([keyword])  # type: ignore[attr-defined]
    return config.call(target_of_one_key, {key.name: value}, WHERE)


def refusal(key: Key, value: Any) -> str:
    with pytest.raises(UserError) as caught:
        taken(key, value)
    line = str(caught.value)
    assert line.startswith(f"{WHERE}.{key.name}"), line
    assert "\n" not in line
    assert len(line) < 200, line
    return line


# --- the walk


def test_every_number_has_a_range() -> None:
    assert [str(key) for key in KEYS if key.number.within is None] == []


def test_the_walk_misses_nothing() -> None:
    """By another way: a row of the page that speaks of a number has a range."""
    assert len(BOUNDED) > 60
    assert len(targets()) > 20
    page = config.locate("kdmini.tools.reference:page", "")()
    rows = [row.split(" | ") for row in page.splitlines() if row.startswith("| `")]
    numeric = [row for row in rows if re.search(r"\b(int|float)\b", row[1])]
    assert [row[0] for row in numeric if not row[3].strip()] == []
    names = {key.name for key in KEYS}
    assert {row[0].strip("| `") for row in numeric} <= names


def test_a_number_without_a_range_would_be_seen() -> None:
    kinds: list[Any] = [
        int,
        float | None,
        float | Literal["batch"],
        list[tuple[str, float]],
        dict[str, int],
        Annotated[float, "a note"],
    ]
    for kind in kinds:
        assert [number.within for number in numbers_in(kind)] == [None], kind
    assert [number.within for number in numbers_in(Share | Literal["batch"])] == [Range(0, 1)]
    assert not list(numbers_in(bool | str))


@pytest.mark.parametrize("key", BOUNDED, ids=IDS)
def test_the_ends_of_the_range_are_taken(key: Key) -> None:
    for number in (low_end(key.number), high_end(key.number)):
        value = key.number.in_value(number)
        assert value == as_lists(taken(key, value))


@pytest.mark.parametrize("key", BOUNDED, ids=IDS)
def test_what_is_outside_the_range_is_refused_in_one_line(key: Key) -> None:
    for number in outside(key.number):
        line = refusal(key, key.number.in_value(number))
        if isinstance(number, float) and math.isnan(number):
            continue  # no number at all
        assert short(number) in line
        assert "is out of range; " in line
        if number < 1e300:  # else Python has no such float
            assert line.endswith(str(range_of(key.number)))


@pytest.mark.parametrize("key", BOUNDED, ids=IDS)
def test_what_is_no_number_is_refused_in_one_line(key: Key) -> None:
    nothings: list[Any] = [True, False, "1", "", b"1", 1j, [[[]]], {"a": {"b": {}}}]
    if key.number.kind is int:
        nothings += [1.0, math.nan, 1e30, math.inf]
    for nothing in nothings:
        if isinstance(nothing, str) and accepts_text(key):
            continue
        refusal(key, key.number.in_value(nothing))


def accepts_text(key: Key) -> bool:
    target = config.locate(key.target, key.target)
    annotation = inspect.signature(target, eval_str=True).parameters[key.name].annotation
    return annotation is str or str in getattr(annotation, "__args__", ())


def as_lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: as_lists(item) for name, item in value.items()}
    return [as_lists(item) for item in value] if isinstance(value, list | tuple) else value


# --- a range


@pytest.mark.parametrize(
    ("within", "inside", "beyond", "words"),
    [
        (Range(0, 1), [0, 1, 0.5], [-1e-9, 1.01, math.inf], "0 to 1"),
        (Range(0, 1, above=True), [5e-324, 1], [0, -0.0], "above 0 to 1"),
        (Range(0, 1, below=True), [0, 1 - 1e-16], [1, 1.0], "0 to below 1"),
        (Range(1e-6, math.inf), [1e-6, math.inf], [0, -math.inf], "1e-06 to .inf"),
        (Range(1, 10**9), [1, 10**9], [0, 10**9 + 1, 2**70], "1 to 1,000,000,000"),
        (
            Range(32, 8192, step=32),
            [32, 640, 8192],
            [0, 16, 33, 8193, 8224],
            "32 to 8,192, a multiple of 32",
        ),
    ],
)
def test_a_range(within: Range, inside: list, beyond: list, words: str) -> None:
    assert all(number in within for number in inside)
    assert not any(number in within for number in [*beyond, math.nan])
    assert str(within) == words
