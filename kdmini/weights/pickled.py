"""The pickle of a `.pt` file, interpreted without running what is in it.

A pickle is a program for a machine with a stack, and it may call anything. The machine
here knows only the opcodes that torch.save writes. Where pickle would import, it keeps
the name (`Global`); where pickle would call, it notes what would have been called with
what (`Node`). Nothing is imported or called, ever: a name that nobody knows is an inert
note, and whoever reaches it when the content is read decides what to do about it.
"""

import pickletools
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from kdmini.weights.archive import Refused, quoted

MAX_OPCODES = 2_000_000  # far more than a file from mid-training has
PROTOCOLS = (2, 3, 4, 5)
MAX_NAME = 300  # characters of a module and a name in it


@dataclass(frozen=True)
class Global:
    """A name that was not imported."""

    name: str  # "module name", as a pickle spells it


@dataclass(eq=False)
class Node:
    """A call that was not made: `name` would have been called with `args`."""

    name: str  # "module name", or "storage" for a reference to the bytes of a tensor
    args: Any
    # what would have become the object's __dict__
    state: Any = field(default_factory=dict)


class Pickled(NamedTuple):
    """What a pickle says."""

    value: Any
    names: set[str]  # all that pickle would have imported, "module name"


def interpret(pickled: bytes | bytearray) -> Pickled:
    """The object in a pickle, with a Node for all that is no plain value.

    Raises Refused for an opcode that torch.save does not write.
    """
    machine = Machine()
    for count, (opcode, arg, _) in enumerate(pickletools.genops(pickled)):
        if count > MAX_OPCODES:
            raise Refused(
                f"has a pickle of over {MAX_OPCODES} steps, which no file of weights has: "
                "name another file"
            )
        if opcode.name == "STOP":
            break
        if opcode.name not in OPCODES:
            raise unknown(opcode.name, arg)
        OPCODES[opcode.name](machine, arg)
    return Pickled(machine.stack.pop(), machine.names)


# what kdmini's own files name: tensors, and the dicts that they are in
OWN_NAMES = r"collections OrderedDict|torch \w+Storage|torch\._utils _rebuild_(tensor_v2|parameter)"
TRUSTED = "nothing was run, obtain it from a source you trust"


def refuse_names(names: set[str]) -> None:
    """Raises Refused where a file of kdmini names what kdmini does not write."""
    for name in sorted(names):
        if not re.fullmatch(OWN_NAMES, name):
            raise Refused(f"names {spelt(name)}, which no file of kdmini does: {TRUSTED}")


def spelt(name: str) -> str:
    """What a pickle would import, as it is written in Python."""
    return quoted(name.replace(" ", "."))


def unknown(opcode: str, arg: Any) -> Refused:
    return Refused(
        f"has the pickle opcode {opcode} {quoted(str(arg))}, which torch.save does not write: "
        f"{TRUSTED}"
    )


class Machine:
    """The stack, the marks and the memo of a pickle, and what its opcodes do to them.

    A stack that is too short ends in an IndexError, a ValueError or a TypeError.
    """

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []  # the stacks below the open marks
        self.memo: dict[int, Any] = {}  # position -> value to be used again
        self.names: set[str] = set()

    def protocol(self, version: int) -> None:
        if version not in PROTOCOLS:
            raise unknown("PROTO", version)

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def put(self, position: int) -> None:
        self.memo[position] = self.stack[-1]

    def get(self, position: int) -> None:
        self.push(self.memo[position])

    def mark(self) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def take(self, count: int) -> list[Any]:
        """-> so many values, off the stack."""
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def take_marked(self) -> list[Any]:
        """-> all values since the last mark, off the stack, and the mark with them."""
        items = self.stack
        self.stack = self.marks.pop()
        return items

    def append(self, items: list[Any]) -> None:
        """Into the list on top of the stack; lost where that is something else."""
        if type(self.stack[-1]) is list:
            self.stack[-1].extend(items)

    def set_items(self, items: list[Any]) -> None:
        """Keys and values in turn, into the dict on top of the stack; lost where that is
        something else, and where the key is no text or number.

        The hash of a tuple in a tuple in a tuple may recurse until the stack is full.
        """
        if type(self.stack[-1]) is not dict:
            return
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) in (str, int):
                self.stack[-1][key] = value

    def name(self, module: Any, name: Any) -> None:
        """Where pickle would import."""
        if not type(module) is type(name) is str or len(module) + len(name) > MAX_NAME:
            raise ValueError("a name that is none")
        self.names.add(f"{module} {name}")
        self.push(Global(f"{module} {name}"))

    def storage(self) -> None:
        """Where pickle would ask torch for the bytes of a tensor."""
        self.push(Node("storage", *self.take(1)))

    def call(self, count: int = 2) -> None:
        """Where pickle would call a function, or make an object, with the `count - 1`
        values on top of the stack.
        """
        called, *args = self.take(count)
        if called == Global("collections OrderedDict"):
            self.push({})
        elif type(called) is Global:
            self.push(Node(called.name, *args[:1]))
        else:
            self.push(Node("what another call gave", *args[:1]))

    def build(self) -> None:
        """Where pickle would set the attributes of the object on top of the stack."""
        items = self.take(1)
        # an OrderedDict may have attributes too, of no use here
        if type(self.stack[-1]) is Node:
            (self.stack[-1].state,) = items


OPCODES: dict[str, Callable[[Machine, Any], Any]] = {
    "PROTO": lambda machine, arg: machine.protocol(arg),
    "FRAME": lambda machine, arg: None,
    # plain values
    "NONE": lambda machine, arg: machine.push(None),
    "NEWTRUE": lambda machine, arg: machine.push(True),
    "NEWFALSE": lambda machine, arg: machine.push(False),
    **dict.fromkeys(
        (
            *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
            *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
            *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
        ),
        lambda machine, arg: machine.push(arg),
    ),
    # the memo
    "BINPUT": lambda machine, arg: machine.put(arg),
    "LONG_BINPUT": lambda machine, arg: machine.put(arg),
    "MEMOIZE": lambda machine, arg: machine.put(len(machine.memo)),
    "BINGET": lambda machine, arg: machine.get(arg),
    "LONG_BINGET": lambda machine, arg: machine.get(arg),
    # tuples, lists and dicts; sets are lists, for nothing that is read is one
    "MARK": lambda machine, arg: machine.mark(),
    "POP": lambda machine, arg: machine.stack.pop(),
    "POP_MARK": lambda machine, arg: machine.take_marked(),
    "EMPTY_TUPLE": lambda machine, arg: machine.push(()),
    "TUPLE1": lambda machine, arg: machine.push(tuple(machine.take(1))),
    "TUPLE2": lambda machine, arg: machine.push(tuple(machine.take(2))),
    "TUPLE3": lambda machine, arg: machine.push(tuple(machine.take(3))),
    "TUPLE": lambda machine, arg: machine.push(tuple(machine.take_marked())),
    "EMPTY_LIST": lambda machine, arg: machine.push([]),
    "APPEND": lambda machine, arg: machine.append(machine.take(1)),
    "APPENDS": lambda machine, arg: machine.append(machine.take_marked()),
    "EMPTY_SET": lambda machine, arg: machine.push([]),
    "ADDITEMS": lambda machine, arg: machine.append(machine.take_marked()),
    "FROZENSET": lambda machine, arg: machine.push(machine.take_marked()),
    "EMPTY_DICT": lambda machine, arg: machine.push({}),
    "SETITEM": lambda machine, arg: machine.set_items(machine.take(2)),
    "SETITEMS": lambda machine, arg: machine.set_items(machine.take_marked()),
    # what pickle would import and call
    "GLOBAL": lambda machine, arg: machine.name(*arg.split(" ", 1)),
    "STACK_GLOBAL": lambda machine, arg: machine.name(*machine.take(2)),
    "BINPERSID": lambda machine, arg: machine.storage(),
    "REDUCE": lambda machine, arg: machine.call(),
    "NEWOBJ": lambda machine, arg: machine.call(),
    "NEWOBJ_EX": lambda machine, arg: machine.call(3),
    "BUILD": lambda machine, arg: machine.build(),
}
