"""Reads a YAML file with overrides, and calls what it names: the constructor is the schema.

A section `{build: package.module:Name, key: value, ...}` is the call `Name(key=value, ...)`. Its
keys are checked against the signature and the annotations of `Name`, so that a typo or a value of
the wrong type is one line that names the key, and not a run with a setting nobody asked for.
A config is trusted code: it names what is imported.
"""

import difflib
import importlib
import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from kdmini.contracts import UserError

# YAML 1.1, which PyYAML reads, wants 5.0e-4 and 1.0e+3: it takes 5e-4 and 1e3 for text.
EXPONENT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+\.?[0-9]*)[eE][-+]?[0-9]+")
FLOAT_TAG = "tag:yaml.org,2002:float"
MERGE_TAG = "tag:yaml.org,2002:merge"
VALUE_TAG, STRING_TAG = "tag:yaml.org,2002:value", "tag:yaml.org,2002:str"


class _Loader(yaml.SafeLoader):
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Here and not in construct_mapping, where keys merged by `<<` already stand beside the
        # mapping's own.
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise yaml.MarkedYAMLError(
                        problem=f"the key `{key.value}` is given twice; remove one",
                        problem_mark=key.start_mark,
                    )
                seen.add((key.tag, key.value))
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Puts the pairs that `<<` brings in before the node's own, of which the last one of a key
        is the one that counts.

        So a mapping's own keys win over those of its bases, and an earlier base over a later one,
        as YAML's merge rule
        has it: https://yaml.org/type/merge.html. PyYAML 6.0.4 lets the outermost base of a chain
        win."""
        node.value = self._merged(node, inside=())

    def _merged(
        self, node: yaml.Node, inside: tuple[yaml.Node, ...]
    ) -> list[tuple[yaml.Node, yaml.Node]]:
        """inside: the nodes that are being merged into, to refuse one that would contain itself."""
        if not isinstance(node, yaml.MappingNode) or node in inside:
            fault = (
                "merges itself"
                if node in inside
                else f"expected a mapping, or a list of them, got a {node.id}"
            )
            raise yaml.MarkedYAMLError(problem=f"`<<`: {fault}", problem_mark=node.start_mark)
        own: list[tuple[yaml.Node, yaml.Node]] = []
        bases: list[yaml.Node] = []
        for key, value in node.value:
            if key.tag == MERGE_TAG:
                bases += value.value if isinstance(value, yaml.SequenceNode) else [value]
                continue
            if key.tag == VALUE_TAG:  # a bare `=`, which is a text to us
                key.tag = STRING_TAG
            own.append((key, value))
        inherited = [
            pair for base in reversed(bases) for pair in self._merged(base, (*inside, node))
        ]
        return inherited + own

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        number = super().construct_yaml_float(node)
        if math.isnan(number):
            raise yaml.MarkedYAMLError(problem="NaN is not a setting", problem_mark=node.start_mark)
        return number


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


_Loader.add_constructor(FLOAT_TAG, _Loader.construct_yaml_float)
_Dumper.add_representer(
    list,
    lambda dumper, items: dumper.represent_sequence(
        "tag:yaml.org,2002:seq", items, len(str(items)) <= 100
    ),
)
for _side in (_Loader, _Dumper):  # the dumper too, so that it puts quotes around the text "5e-4"
    _side.add_implicit_resolver(
        FLOAT_TAG, re.compile(rf"^(?:{EXPONENT.pattern})$"), list("-+.0123456789")
    )


def load(path: str | Path, overrides: Sequence[str] = ()) -> dict[Any, Any]:
    """The mapping in a YAML file; an empty file is {}.

    An override `key.path=value` is read by the rules of YAML (`section=null` removes a section, a
    number in the path is an index into a list). The section it goes into must exist; whether the
    key itself does is checked when the section is called. Raises UserError, with file and line
    where the YAML is wrong or a key is repeated.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); name a config that exists"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text ({error.reason}); save it as such") from error
    config = _parse(text, str(path))
    if config is None:
        config = {}
    if not isinstance(config, dict):
        raise UserError(f"{path}: expected sections (`name: value`), got {_short(config)}")
    for override in overrides:
        keys, equals, value = override.partition("=")
        parts, where = keys.split("."), f"override `{override}`"
        if not equals or not all(parts):
            raise UserError(f"{where}: write it as key.path=value")
        config = _replace(config, parts, _parse(value, where), where)
    return config


def dump(config: Mapping[Any, Any]) -> str:
    """YAML text that `load` reads back to an equal dict."""
    return yaml.dump(
        dict(config),
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        default_flow_style=False,
        width=120,
    )


def changed(before: Any, now: Any, where: str = "") -> dict[str, str]:
    """{key path: "key path was 1, is 2"} where two configs differ; None stands for a key that is
    not there.
    """
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        keys = dict.fromkeys([*before, *now])
        parts = (
            changed(before.get(key), now.get(key), f"{where}.{key}".lstrip(".")) for key in keys
        )
        return {path: told for part in parts for path, told in part.items()}
    return (
        {}
        if before == now
        else {where: f"{_short(where)[1:-1]} was {_short(before)}, is {_short(now)}"}
    )


def build(section: Any, where: str, /, **offered: Any) -> Any:
    """Import `section["build"]`, "package.module:Name", and `call` it with the other keys."""
    if not isinstance(section, Mapping) or "build" not in section:
        raise UserError(
            f"{where}: expected a section with `build: package.module:Name`, got {_short(section)}"
        )
    settings = dict(section)
    spec = settings.pop("build")
    where_build = _join(where, "build")
    if not isinstance(spec, str) or not re.fullmatch(r"\w+(\.\w+)*:\w+", spec):
        raise UserError(f"{where_build}: expected package.module:Name, got {_short(spec)}")
    module_name, name = spec.split(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(f"{where_build}: cannot import `{module_name}`: {error}") from error
    target = getattr(module, name, None)
    if not callable(target):
        public = [
            key
            for key, value in vars(module).items()
            if callable(value) and not key.startswith("_")
        ]
        raise UserError(
            f"{where_build}: `{module_name}` has no class or function `{name}`; {_nearest(name, public)}"
        )
    return call(target, settings, where, **offered)


def call(
    target: Callable[..., Any], settings: Mapping[Any, Any], where: str, /, **offered: Any
) -> Any:
    """`target(**settings)`, checked against its signature and annotations.

    target: a class or a function. where: file and key path, "voc.yaml: student", for messages.
    offered: values for parameters of these names, if the target has them and the settings do not.
    Raises UserError for an unknown or missing key and for a value that does not fit its annotation.
    """
    if not isinstance(settings, Mapping):
        raise UserError(f"{where}: expected a section (`name: value`), got {_short(settings)}")
    title = getattr(target, "__name__", repr(target))
    try:
        parameters = inspect.signature(target, eval_str=True).parameters.values()
    except (NameError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{where}: the signature of `{title}` cannot be read: {error}") from error
    known = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    kinds = {p.kind: p for p in parameters}
    # A bare (*args, **kwargs) is the constructor of nn.Module, inherited by a class that takes no
    # settings.
    takes_any = known or inspect.Parameter.VAR_POSITIONAL not in kinds
    rest = kinds.get(inspect.Parameter.VAR_KEYWORD) if takes_any else None

    arguments = {name: value for name, value in offered.items() if name in known}
    for key, value in settings.items():
        parameter = known.get(key, rest)
        if parameter is None or not isinstance(key, str):
            settable = [name for name in known if name not in offered]
            raise UserError(f"{_join(where, key)}: unknown key; {_nearest(str(key), settable)}")
        arguments[key] = _fit(value, parameter.annotation, _join(where, key))
    missing = [name for name, p in known.items() if p.default is p.empty and name not in arguments]
    if missing:
        raise UserError(
            f"{where}: `{title}` needs {', '.join(f'`{name}`' for name in missing)}; add it"
        )
    return target(**arguments)


def _fit(value: Any, kind: Any, where: str) -> Any:
    """The value as the annotation has it (int -> float, list -> tuple, str -> Path), or UserError."""
    origin, args = get_origin(kind) or kind, get_args(kind)
    if origin in (Any, object, inspect.Parameter.empty):
        return value
    if origin in (Union, UnionType):
        for member in sorted(
            args, key=lambda member: type(value) is not member
        ):  # 3 stays an int in float | int
            try:
                return _fit(value, member, where)
            except UserError:
                continue
    elif origin is Literal:
        if any(value == choice and type(value) is type(choice) for choice in args):
            return value
        if isinstance(value, str):
            raise UserError(
                f"{where}: {value!r} is not a choice; {_nearest(value, [str(choice) for choice in args])}"
            )
    elif origin in (bool, int, str):
        if type(value) is origin:  # not isinstance: True is an int
            return value
    elif origin is float:
        if type(value) in (int, float) and not math.isnan(value):
            return float(value)
    elif origin is Path and isinstance(value, str):
        return Path(value)
    elif isinstance(value, list | tuple) and origin in (
        list,
        tuple,
        set,
        frozenset,
        Sequence,
        Iterable,
    ):
        kinds = [args[0] if args else Any] * len(value)
        if (
            origin is tuple and args and args[-1] is not Ellipsis
        ):  # tuple[int, float], one kind for each place
            kinds = list(args)
        if len(kinds) == len(value):
            items = (
                _fit(v, k, _join(where, i))
                for i, (v, k) in enumerate(zip(value, kinds, strict=True))
            )
            return origin(items) if origin in (tuple, set, frozenset) else list(items)
    elif isinstance(value, Mapping) and origin in (dict, Mapping):
        key_kind, value_kind = args or (Any, Any)
        return {
            _fit(k, key_kind, _join(where, k)): _fit(v, value_kind, _join(where, k))
            for k, v in value.items()
        }
    else:
        try:
            if isinstance(value, origin):
                return value
        except (
            TypeError
        ):  # a TypeVar, a TypedDict, a Protocol: nothing that isinstance could decide
            return value
    text = isinstance(value, bool) and (origin is str or str in args)
    quotes = "; put quotes around yes, no, on and off" if text else ""
    members = (
        args if origin is Union else [kind]
    )  # Union[bool, Literal["bf16"]] is what Python makes of a `|`
    expected = " | ".join(map(inspect.formatannotation, members))
    raise UserError(f"{where}: expected {expected}, got {_short(value)}{quotes}")


def _parse(text: str, where: str) -> Any:
    try:
        loader = _Loader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{where}{line}: {error.problem}") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: 2012-13-45 looks like a date
        raise UserError(f"{where}: {' '.join(str(error).split())}") from error


def _replace(node: Any, parts: Sequence[str], value: Any, where: str) -> Any:
    """A copy of the node with the value at the path. A copy, as a YAML alias lets two sections
    share one node.
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
            raise UserError(f"{where}: there is no `{first}`; {_nearest(first, node)}")
    else:
        raise UserError(
            f"{where}: `{first}` would go into {_short(node)}, which is not a section; set the whole of it"
        )
    copy = node.copy()
    copy[key] = _replace(node[key], rest, value, where) if rest else value
    return copy


def _nearest(name: str, known: Iterable[Any]) -> str:
    names = [str(key) for key in known]
    near = difflib.get_close_matches(name, names, n=1)
    return f"did you mean `{near[0]}`?" if near else f"known: {', '.join(names) or 'none'}"


def _join(where: str, key: Any) -> str:
    return f"{where}.{key}" if ": " in where else f"{where}: {key}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
