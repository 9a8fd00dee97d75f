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
FLOAT = "tag:yaml.org,2002:float"
MERGE = "tag:yaml.org,2002:merge"
BARE_EQUALS = "tag:yaml.org,2002:value"
STRING = "tag:yaml.org,2002:str"
SEQUENCE = "tag:yaml.org,2002:seq"

LINE = 120  # columns of what is dumped
IN_ONE_LINE = 100  # characters of a list that is not spread over lines

Pairs = list[tuple[yaml.Node, yaml.Node]]  # key, value


def parse(text: str, where: str) -> Any:
    """The value in a YAML text. where: file or override, for messages.

    Raises UserError with the line where the YAML is wrong, a key is repeated, or a number is
    NaN.
    """
    try:
        loader = Loader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
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
        node.value = merged(node, inside=())

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        number = super().construct_yaml_float(node)
        if math.isnan(number):
            problem = "NaN is not a setting"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        return number


def merged(node: yaml.Node, inside: tuple[yaml.Node, ...]) -> Pairs:
    """The pairs of a mapping and of all that it merges.

    inside: the nodes that are being merged into, to refuse one that would contain itself.
    """
    kind = getattr(node, "id", "value")
    fault = ""
    if not isinstance(node, yaml.MappingNode):
        fault = f"expected a mapping, or a list of them, got a {kind}"
    elif node in inside:
        fault = "merges itself"
    if fault:
        raise yaml.MarkedYAMLError(problem=f"`<<`: {fault}", problem_mark=node.start_mark)

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
        inherited += merged(base, (*inside, node))
    return inherited + own


class Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_items(self, items: list) -> yaml.SequenceNode:
        """Short lists in one line."""
        return self.represent_sequence(SEQUENCE, items, len(str(items)) <= IN_ONE_LINE)


Loader.add_constructor(FLOAT, Loader.construct_yaml_float)
Dumper.add_representer(list, Dumper.represent_items)
# the dumper too, so that it puts quotes around the text "5e-4"
for side in (Loader, Dumper):
    side.add_implicit_resolver(FLOAT, re.compile(rf"^(?:{EXPONENT})$"), list("-+.0123456789"))
