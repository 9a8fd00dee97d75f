"""YAML as a config is written: PyYAML's safe loader, with the places mended where a user is
misread in silence.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import yaml

from kdmini.contracts import UserError

# YAML 1.1, which PyYAML reads, wants 5.0e-4 and 1.0e+3: it takes 5e-4 and 1e3 for text.
EXPONENT = r"[-+]?(\.[0-9]+|[0-9]+\.?[0-9]*)[eE][-+]?[0-9]+"
# It takes 12:30:45 for 45,045, and 010 for 8: both are texts to us.
INTEGER = r"[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F][0-9a-fA-F_]*|0b[01][01_]*)"
DECIMAL = r"[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|\.(inf|Inf|INF))|\.(nan|NaN|NAN)"
INT = "tag:yaml.org,2002:int"
FLOAT = "tag:yaml.org,2002:float"
MERGE = "tag:yaml.org,2002:merge"
BARE_EQUALS = "tag:yaml.org,2002:value"
STRING = "tag:yaml.org,2002:str"
SEQUENCE = "tag:yaml.org,2002:seq"

LINE = 120  # columns of what is dumped
IN_ONE_LINE = 100  # characters of a list that is not spread over lines
MOST = 100_000  # values of a config, those that aliases repeat counted each time

Pairs = list[tuple[yaml.Node, yaml.Node]]  # key, value


def parse(text: str, where: str) -> Any:
    """The value in a YAML text. where: file or override, for messages.

    Raises UserError with the line where the YAML is wrong, a key is repeated, a number is
    NaN, or an alias stands in what it names or makes more than MOST values.
    """
    try:
        loader = Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            count_values(node, {})
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except RecursionError:
        raise UserError(
            f"{where}: brackets or sections are nested too deep; no config needs that"
        ) from None
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{where}{line}: {error.problem}") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: 2012-13-45 looks like a date
        raise UserError(f"{where}: {' '.join(str(error).split())}") from error


def dump(config: Mapping[Any, Any]) -> str:
    """YAML text that `parse` reads back to an equal dict."""
    return yaml.dump(
        dict(config),
        Dumper=Dumper,
        sort_keys=False,
        allow_unicode=True,
        default_flow_style=False,
        width=LINE,
    )


class Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML has it on the class
        first: [(tag, pattern) for tag, pattern in pairs if tag not in (INT, FLOAT)]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Refuses a repeated key. Here and not in construct_mapping, where keys merged by `<<`
        already stand beside the mapping's own.
        """
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if (key.tag, key.value) in seen:
                problem = f"the key `{key.value}` is given twice; remove one"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.add((key.tag, key.value))
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Puts the pairs that `<<` brings in before the node's own; of pairs with one key the
        last counts.

        So a mapping's own keys win over those of its bases, and an earlier base over a later
        one, as YAML's merge rule has it: https://yaml.org/type/merge.html. PyYAML 6.0.4 lets
        the outermost base of a chain win, where a key is one character long.
        """
        node.value = merged(node)

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        number = super().construct_yaml_float(node)
        if math.isnan(number):
            problem = "NaN is not a setting"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        return number


def count_values(node: yaml.Node, counted: dict[yaml.Node, int]) -> int:
    """How many values a node stands for: ten aliases of ten aliases of ten make a thousand
    in three lines.

    counted: the nodes met so far, with theirs; 0 for those that this one is in.
    Raises yaml.MarkedYAMLError where they are more than MOST, or without end.
    """
    problem = ""
    if node not in counted:
        counted[node] = 0
        counted[node] = 1 + sum(count_values(part, counted) for part in parts_of(node))
    if not counted[node]:
        problem = "an alias stands in what it names"
    elif counted[node] > MOST:
        problem = f"aliases make it more than {MOST:,} values; write out what is meant"
    if problem:
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
    return counted[node]


def parts_of(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else []


def merged(node: yaml.Node) -> Pairs:
    """The pairs of a mapping and of all that it merges, none of which holds itself."""
    if not isinstance(node, yaml.MappingNode):
        kind = getattr(node, "id", "value")
        problem = f"`<<`: expected a mapping, or a list of them, got a {kind}"
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)

    own: Pairs = []
    bases: list[yaml.Node] = []
    for key, value in node.value:
        if key.tag == MERGE:
            bases += value.value if isinstance(value, yaml.SequenceNode) else [value]
            continue
        if key.tag == BARE_EQUALS:  # a text to us
            key.tag = STRING
        own.append((key, value))
    inherited: Pairs = []
    for base in reversed(bases):
        inherited += merged(base)
    return inherited + own


class Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_items(self, items: list) -> yaml.SequenceNode:
        """Short lists in one line."""
        return self.represent_sequence(SEQUENCE, items, len(str(items)) <= IN_ONE_LINE)


Loader.add_constructor(FLOAT, Loader.construct_yaml_float)
Dumper.add_representer(list, Dumper.represent_items)
Loader.add_implicit_resolver(INT, re.compile(rf"^(?:{INTEGER})$"), list("-+0123456789"))
Loader.add_implicit_resolver(FLOAT, re.compile(rf"^(?:{DECIMAL})$"), list("-+.0123456789"))
# the dumper too, so that it puts quotes around the text "5e-4", as it does around "12:30:45"
for side in (Loader, Dumper):
    side.add_implicit_resolver(FLOAT, re.compile(rf"^(?:{EXPONENT})$"), list("-+.0123456789"))
