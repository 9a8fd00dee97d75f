"""A value out of YAML -> what an annotation asks for, or one line that says what is wrong.

A caster takes the value, the arguments of the annotation and where the value stands, and
gives MISFIT for a value of another kind.
"""

import argparse
import difflib
import functools
import inspect
import math
import operator
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from kdmini.bounds import Range
from kdmini.contracts import UserError

MISFIT = object()
LONGEST = 60  # characters of a value in a message

# of a value that holds itself many times over repr would fill the memory
BRIEFLY = reprlib.Repr()
BRIEFLY.maxlevel = 4
BRIEFLY.maxlist = BRIEFLY.maxtuple = BRIEFLY.maxdict = BRIEFLY.maxset = 20
BRIEFLY.maxstring = BRIEFLY.maxother = 1000


class OutOfRange(UserError):
    """Of the right kind, and too small or too large."""


def fit(value: Any, kind: Any, where: str) -> Any:
    """The value as the annotation `kind` has it: int -> float, list -> tuple, str -> Path.

    Raises UserError for a value that does not fit, or is outside the kdmini.bounds.Range of
    `Annotated[float, Range(0, 1)]`.
    """
    origin = get_origin(kind) or kind
    if origin in (Any, object, inspect.Parameter.empty):
        return value
    caster = CASTERS.get(origin, as_it_is(origin))
    cast = caster(value, get_args(kind), where)
    if cast is MISFIT:
        raise UserError(f"{where}: expected {title(kind)}, got {short(value)}{hint(value, kind)}")
    return cast


def fit_annotated(value: Any, args: tuple, where: str) -> Any:
    kind, *notes = args
    cast = fit(value, kind, where)
    for note in notes:
        if isinstance(note, Range) and cast not in note:
            raise OutOfRange(f"{where}: {short(value)} is out of range; use {note}")
    return cast


def fit_union(value: Any, members: tuple, where: str) -> Any:
    """As the first member that fits; one of the value's own type before the others, so that
    3 stays an int in float | int.
    """
    outside: OutOfRange | None = None
    for member in sorted(members, key=lambda member: type(value) is not bare(member)):
        try:
            return fit(value, member, where)
        except OutOfRange as error:
            outside = error
        except UserError:
            continue
    if outside:
        raise outside
    return MISFIT


def fit_literal(value: Any, choices: tuple, where: str) -> Any:
    if any(value == choice and type(value) is type(choice) for choice in choices):
        return value
    if isinstance(value, str):
        names = [str(choice) for choice in choices]
        raise UserError(f"{where}: {value!r} is not a choice; {nearest(value, names)}")
    return MISFIT


def fit_float(value: Any, _: tuple, where: str) -> Any:
    if type(value) not in (int, float):
        return MISFIT
    try:
        number = float(value)
    except OverflowError:
        raise OutOfRange(f"{where}: {short(value)} is out of range; give fewer digits") from None
    return MISFIT if math.isnan(number) else number


def fit_path(value: Any, _: tuple, where: str) -> Any:
    return Path(value) if isinstance(value, str | Path) else MISFIT


def fit_list(value: Any, args: tuple, where: str) -> Any:
    if not isinstance(value, list | tuple):
        return MISFIT
    kind = args[0] if args else Any
    return [fit(item, kind, join(where, index)) for index, item in enumerate(value)]


def fit_set(value: Any, args: tuple, where: str) -> Any:
    items = fit_list(value, args, where)
    return MISFIT if items is MISFIT else set(items)


def fit_frozenset(value: Any, args: tuple, where: str) -> Any:
    items = fit_list(value, args, where)
    return MISFIT if items is MISFIT else frozenset(items)


def fit_tuple(value: Any, args: tuple, where: str) -> Any:
    """tuple[int, ...] has one kind for all, tuple[int, float] one for each position."""
    if not args or args[-1] is Ellipsis:
        items = fit_list(value, args, where)
        return MISFIT if items is MISFIT else tuple(items)
    if not isinstance(value, list | tuple) or len(value) != len(args):
        return MISFIT
    pairs = enumerate(zip(value, args, strict=True))
    return tuple(fit(item, kind, join(where, index)) for index, (item, kind) in pairs)


def fit_dict(value: Any, args: tuple, where: str) -> Any:
    if not isinstance(value, Mapping):
        return MISFIT
    key_kind, value_kind = args or (Any, Any)
    cast = {}
    for key, item in value.items():
        place = join(where, key)
        cast[fit(key, key_kind, place)] = fit(item, value_kind, place)
    return cast


def exactly(kind: type) -> Callable[[Any, tuple, str], Any]:
    """Not by isinstance: True is an int."""

    def caster(value: Any, _: tuple, where: str) -> Any:
        return value if type(value) is kind else MISFIT

    return caster


def as_it_is(kind: Any) -> Callable[[Any, tuple, str], Any]:
    """For any other class, and for what isinstance cannot decide: a TypeVar, a TypedDict, a
    Protocol.
    """

    def caster(value: Any, _: tuple, where: str) -> Any:
        try:
            return value if isinstance(value, kind) else MISFIT
        except TypeError:
            return value

    return caster


CASTERS: dict[Any, Callable[[Any, tuple, str], Any]] = {
    Annotated: fit_annotated,
    Union: fit_union,
    UnionType: fit_union,
    Literal: fit_literal,
    bool: exactly(bool),
    int: exactly(int),
    str: exactly(str),
    float: fit_float,
    Path: fit_path,
    list: fit_list,
    Sequence: fit_list,
    Iterable: fit_list,
    set: fit_set,
    frozenset: fit_frozenset,
    tuple: fit_tuple,
    dict: fit_dict,
    Mapping: fit_dict,
}


def title(kind: Any) -> str:
    """An annotation as a person would write it."""
    kind = bare(kind)
    # Union[bool, Literal["bf16"]] is what Python makes of a `|`
    members = get_args(kind) if get_origin(kind) is Union else [kind]
    text = " | ".join(map(inspect.formatannotation, members))
    return text.replace("pathlib._local.", "pathlib.")  # where Python 3.13 keeps it


def bare(kind: Any) -> Any:
    """An annotation without its ranges."""
    origin = get_origin(kind)
    parts = get_args(kind)
    if origin is Annotated:
        return bare(parts[0])
    if origin in (Union, UnionType):
        return functools.reduce(operator.or_, map(bare, parts))
    if origin in CASTERS and origin is not Literal:
        return origin[tuple(map(bare, parts))]
    return kind


def argument(kind: Any) -> Callable[[str], Any]:
    """For the `type` of an argparse option: text -> a number in the range of the annotation."""
    number, within = get_args(kind)

    def read(text: str) -> Any:
        try:
            value = number(text)
        except ValueError:
            wanted = f"expected {number.__name__}, got {short(text)}"
            raise argparse.ArgumentTypeError(wanted) from None
        if value not in within:
            raise argparse.ArgumentTypeError(f"{short(value)} is out of range; use {within}")
        return value

    return read


def hint(value: Any, kind: Any) -> str:
    """YAML reads yes, no, on and off as true and false."""
    wants_text = kind is str or str in get_args(kind)
    if isinstance(value, bool) and wants_text:
        return "; put quotes around yes, no, on and off"
    return ""


def nearest(name: str, known: Iterable[Any]) -> str:
    names = [str(key) for key in known]
    near = difflib.get_close_matches(name, names, n=1)
    if near:
        return f"did you mean `{near[0]}`?"
    return f"known: {', '.join(names) or 'none'}"


def join(where: str, key: Any) -> str:
    """File and key path of a key in the section at `where`."""
    return f"{where}.{key}" if ": " in where else f"{where}: {key}"


def printable(text: Any) -> str:
    """On one line and whole, what a terminal would act upon escaped: for names of files."""
    text = str(text)
    return text if text.isprintable() else repr(text)[1:-1]


def short(value: Any) -> str:
    """The value as Python writes it, cut: for messages."""
    try:
        text = BRIEFLY.repr(value)
    except ValueError:  # Python writes no integer of more than 4,300 digits
        text = f"{type(value).__name__} too long to show"
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."
