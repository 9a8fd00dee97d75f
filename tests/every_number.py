"""Every number that a config can set, found in the signatures that docs and configs name."""

import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import UnionType
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin

from kdmini import config
from kdmini.bounds import Range
from tests.conftest import ROOT

SPEC = r"((?:\w+\.)*\w+:\w+)"  # package.module:Name


class Number(NamedTuple):
    """A number in a key."""

    kind: type  # int or float
    within: Range | None
    in_value: Callable[[Any], Any]  # the number -> a value of the key that holds it


class Key(NamedTuple):
    """A key with a number in it."""

    target: str  # package.module:Name
    name: str
    number: Number

    def __str__(self) -> str:
        return f"{self.target.split(':')[1]}.{self.name}"


def every_key() -> list[Key]:
    return [key for target in targets() for key in keys_of(target)]


def targets() -> list[str]:
    """What the page of keys describes, and what configs and examples build."""
    page = (ROOT / "docs/config.md").read_text()
    found = re.findall(rf"^`{SPEC}`", page, re.MULTILINE)
    for path in [*sorted((ROOT / "configs").rglob("*.yaml")), *sorted(ROOT.glob("docs/*.md"))]:
        built = re.findall(rf"build: {SPEC}", path.read_text())
        found += [spec for spec in built if spec.startswith(("kdmini.", "examples."))]
    return list(dict.fromkeys(found))


def keys_of(target: str) -> Iterator[Key]:
    signature = inspect.signature(config.locate(target, target), eval_str=True)
    for name, parameter in signature.parameters.items():
        for number in numbers_in(parameter.annotation):
            yield Key(target, name, number)


def numbers_in(kind: Any) -> Iterator[Number]:
    """Those of an annotation, wherever they stand in it."""
    origin = get_origin(kind)
    parts = get_args(kind)
    if kind in (int, float):
        yield Number(kind, None, itself)
    elif origin is Annotated:
        ranges = [note for note in parts if isinstance(note, Range)]
        for number in numbers_in(parts[0]):
            yield number._replace(within=ranges[0] if ranges else None)
    elif origin in (Union, UnionType):
        for part in parts:
            yield from numbers_in(part)
    elif origin is tuple and Ellipsis not in parts:
        for place, part in enumerate(parts):
            for number in numbers_in(part):
                in_value = partial(in_tuple, parts, place, number.in_value)
                yield number._replace(in_value=in_value)
    elif origin in HOLDERS:
        item = [part for part in parts if part is not Ellipsis][-1]
        for number in numbers_in(item):
            yield number._replace(in_value=partial(HOLDERS[origin], number.in_value))


def itself(number: Any) -> Any:
    return number


def in_list(inner: Callable[[Any], Any], number: Any) -> list[Any]:
    return [inner(number)]


def in_mapping(inner: Callable[[Any], Any], number: Any) -> dict[str, Any]:
    return {"model.6": inner(number)}


HOLDERS = {
    list: in_list,
    set: in_list,
    frozenset: in_list,
    tuple: in_list,
    Sequence: in_list,
    dict: in_mapping,
    Mapping: in_mapping,
}


def in_tuple(
    kinds: Sequence[Any], place: int, inner: Callable[[Any], Any], number: Any
) -> list[Any]:
    """Beside others, which are as low or as high as they may be."""
    others = [extreme(kind, lowest=index < place) for index, kind in enumerate(kinds)]
    return [inner(number) if index == place else other for index, other in enumerate(others)]


def extreme(kind: Any, lowest: bool) -> Any:
    for number in numbers_in(kind):
        return number.in_value(low_end(number) if lowest else high_end(number))
    return "a"


# --- numbers at the ends of a range


def low_end(number: Number) -> Any:
    within = range_of(number)
    low = number.kind(within.low)
    return next_to(number, low, math.inf) if within.above else low


def high_end(number: Number) -> Any:
    within = range_of(number)
    high = number.kind(within.high)
    return next_to(number, high, -math.inf) if within.below else high


def outside(number: Number) -> list[Any]:
    """Numbers that are too small, too large or none, of the kind that is asked for."""
    within = range_of(number)
    tried = [
        next_to(number, low_end(number), -math.inf),
        next_to(number, high_end(number), math.inf),
        number.kind(within.low) - 1,
        -(2**70),
        2**70,
        10**400,
        10**5000,
    ]
    if within.step > 1:
        tried.append(within.low + 1)
    if number.kind is float:
        tried += [math.nan, math.inf, -math.inf, 1e30]
    reaches_infinity = math.isinf(within.high)
    return [value for value in tried if not (reaches_infinity and value > within.low)]


def next_to(number: Number, value: Any, towards: float) -> Any:
    if number.kind is float:
        return math.nextafter(value, towards)
    return value + int(math.copysign(1, towards))


def range_of(number: Number) -> Range:
    assert number.within is not None
    return number.within
