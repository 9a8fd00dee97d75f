"""Reads a YAML file with overrides, and calls what it names: the constructor is the schema.

A section `{build: package.module:Name, key: value, ...}` is the call `Name(key=value, ...)`.
Its keys are checked against the signature and the annotations of `Name`, so that a typo or
a value of the wrong type is one line that names the key, and not a run with a setting
nobody asked for. A config is trusted code: it names what is imported.
"""

import importlib
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kdmini.contracts import UserError
from kdmini.files import check_kind
from kdmini.typed import fit, join, nearest, short
from kdmini.yamltext import dump, parse

__all__ = ["build", "call", "changed", "dump", "load", "locate"]

SPEC = r"\w+(\.\w+)*:\w+"  # package.module:Name


def load(path: str | Path, overrides: Sequence[str] = ()) -> dict[Any, Any]:
    """The mapping in a YAML file; an empty file is {}.

    An override `key.path=value` is read by the rules of YAML (`section=null` removes a
    section, a number in the path is an index into a list). The section it goes into must
    exist; whether the key itself does is checked when the section is called. Raises
    UserError, with file and line where the YAML is wrong or a key is repeated.
    """
    check_kind(path)
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); name a config that exists"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text ({error.reason}); save it as such") from error

    config = parse(text, str(path))
    if config is None:
        config = {}
    if not isinstance(config, dict):
        raise UserError(f"{path}: expected sections (`name: value`), got {short(config)}")
    for override in overrides:
        keys, equals, value = override.partition("=")
        parts = keys.split(".")
        where = f"override `{override}`"
        if not equals or not all(parts):
            raise UserError(f"{where}: write it as key.path=value")
        config = replaced(config, parts, parse(value, where), where)
    return config


def replaced(node: Any, parts: Sequence[str], value: Any, where: str) -> Any:
    """A copy of the node with the value at the path. A copy, as a YAML alias lets two
    sections share one node.
    """
    first, *rest = parts
    key: Any
    if isinstance(node, list):
        if not first.isdecimal() or int(first) >= len(node):
            raise UserError(f"{where}: `{first}` is not an index into a list of {len(node)}")
        key = int(first)
    elif isinstance(node, dict):
        key = next((known for known in node if str(known) == first), first)
        if rest and key not in node:
            raise UserError(f"{where}: there is no `{first}`; {nearest(first, node)}")
    else:
        raise UserError(
            f"{where}: `{first}` would go into {short(node)}, which is not a section; "
            "set the whole of it"
        )
    copy = node.copy()
    copy[key] = replaced(node[key], rest, value, where) if rest else value
    return copy


def changed(before: Any, now: Any, where: str = "") -> dict[str, str]:
    """{key path: "key path was 1, is 2"} where two configs differ; None stands for a key
    that is not there.
    """
    if not (isinstance(before, Mapping) and isinstance(now, Mapping)):
        if before == now:
            return {}
        return {where: f"{short(where)[1:-1]} was {short(before)}, is {short(now)}"}
    differences: dict[str, str] = {}
    for key in dict.fromkeys([*before, *now]):
        path = f"{where}.{key}".lstrip(".")
        differences |= changed(before.get(key), now.get(key), path)
    return differences


def build(section: Any, where: str, /, **offered: Any) -> Any:
    """Import `section["build"]`, "package.module:Name", and `call` it with the other keys."""
    if not isinstance(section, Mapping) or "build" not in section:
        raise UserError(
            f"{where}: expected a section with `build: package.module:Name`, got {short(section)}"
        )
    target = locate(section["build"], join(where, "build"))
    settings = {key: value for key, value in section.items() if key != "build"}
    return call(target, settings, where, **offered)


def locate(spec: Any, where: str) -> Callable[..., Any]:
    """The class or function at "package.module:Name". Raises UserError."""
    if not isinstance(spec, str) or not re.fullmatch(SPEC, spec):
        raise UserError(f"{where}: expected package.module:Name, got {short(spec)}")
    module_name, name = spec.split(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(f"{where}: cannot import `{module_name}`: {error}") from error
    target = getattr(module, name, None)
    if not callable(target):
        members = vars(module).items()
        public = [key for key, value in members if callable(value) and not key.startswith("_")]
        raise UserError(
            f"{where}: `{module_name}` has no class or function `{name}`; {nearest(name, public)}"
        )
    return target


def call(
    target: Callable[..., Any], settings: Mapping[Any, Any], where: str, /, **offered: Any
) -> Any:
    """`target(**settings)`, checked against its signature and annotations.

    target: a class or a function.
    where: file and key path, "voc.yaml: student", for messages.
    offered: values for parameters of these names, if the target has them and the settings do
        not.

    Raises UserError for an unknown or missing key and for a value that does not fit its
    annotation.
    """
    if not isinstance(settings, Mapping):
        raise UserError(f"{where}: expected a section (`name: value`), got {short(settings)}")
    known, rest = parameters_of(target, where)
    arguments = {name: value for name, value in offered.items() if name in known}
    for key, value in settings.items():
        parameter = known.get(key, rest)
        if parameter is None or not isinstance(key, str):
            settable = [name for name in known if name not in offered]
            raise UserError(f"{join(where, key)}: unknown key; {nearest(str(key), settable)}")
        arguments[key] = fit(value, parameter.annotation, join(where, key))

    needed = [name for name, parameter in known.items() if parameter.default is parameter.empty]
    missing = [f"`{name}`" for name in needed if name not in arguments]
    if missing:
        raise UserError(f"{where}: `{name_of(target)}` needs {', '.join(missing)}; add it")
    return target(**arguments)


def parameters_of(
    target: Callable[..., Any], where: str
) -> tuple[dict[str, inspect.Parameter], inspect.Parameter | None]:
    """-> the parameters that may be named, and the one that takes all other names, if any."""
    try:
        parameters = inspect.signature(target, eval_str=True).parameters.values()
    except (NameError, AttributeError, TypeError, ValueError) as error:
        raise UserError(
            f"{where}: the signature of `{name_of(target)}` cannot be read: {error}"
        ) from error
    known = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    of_kind = {p.kind: p for p in parameters}
    rest = of_kind.get(inspect.Parameter.VAR_KEYWORD)
    # A bare (*args, **kwargs) is the constructor of nn.Module, inherited by a class that takes
    # no settings.
    if not known and inspect.Parameter.VAR_POSITIONAL in of_kind:
        rest = None
    return known, rest


def name_of(target: Callable[..., Any]) -> str:
    return getattr(target, "__name__", repr(target))
