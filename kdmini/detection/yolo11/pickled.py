"""A `.pt` file opened without running what is in it: the zip, and the pickle in it.

A pickle is a program for a machine with a stack, and it may call anything. The machine
here knows only the few opcodes that YOLO11 files use. Where pickle would import, it
keeps the name (`Global`); where pickle would call, it notes what would have been called
with what (`Node`). Nothing is imported or called, ever.
"""

import io
import pickletools
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

MAX_OPCODES = 2_000_000  # far more than a file from mid-training has


class Refused(Exception):
    """Why a file is not read: the rest of a sentence that begins with its name."""


def quoted(text: str, most: int = 80) -> str:
    """Text out of a file, fit for a terminal: in quotes, escaped, cut."""
    return repr(text if len(text) <= most else text[:most] + "...")


# --- the zip


def unzip(data: bytes) -> dict[str, bytearray]:
    """Entry -> content, without the root folder that all entries share.

    Raises Refused unless the entries are as torch.save writes them: stored, each once.
    """
    if data[:2] != b"PK":
        raise Refused(foreign(data))

    entries = {}
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        infos = archive.infolist()
        check_listing(infos, len(data))
        for info in infos:
            if info.CRC == 0:  # not computed, see torch.serialization.set_crc32_options
                info.CRC = None  # type: ignore[assignment]
            name = info.filename.partition("/")[2]
            content = archive.read(info)  # raises where the CRC differs
            entries[name] = bytearray(content)

    if "data.pkl" not in entries:
        raise Refused("is a zip without data.pkl, so no weight file: give a YOLO11 .pt file")
    if entries.get("byteorder", b"little") != b"little":
        raise Refused("is from a big-endian machine: save it again on a little-endian one")
    return entries


# how a file that is no zip begins -> what it seems to be
FOREIGN = {
    rb"$": "is empty (0 bytes): obtain it again",
    rb"(?i)\s*<(!doctype|html)": (
        "is a web page (HTML), perhaps of a failed download: obtain the file again"
    ),
    rb"(?s).{257}ustar|\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19\.": (
        "is in a format from before PyTorch 1.6: "
        "load it where it is from and save it with a newer one"
    ),
    rb"\x80": "is a bare pickle, which is never opened: give a .pt file that torch.save wrote",
    rb"(?s).{8}\{": "is a safetensors file: give the YOLO11 .pt file",
    rb"\x08[\x01-\x20][\x12:]": "is an ONNX model: give the .pt file it was exported from",
}


def foreign(data: bytes) -> str:
    """What a file that is no zip seems to be."""
    for beginning, description in FOREIGN.items():
        if re.match(beginning, data):
            return description
    return f"is no weight file (it begins with {data[:8]!r}): give a YOLO11 .pt file"


def check_listing(infos: list[zipfile.ZipInfo], file_bytes: int) -> None:
    """Raises Refused where torch.save writes no such list of entries."""
    names = [info.filename for info in infos]
    roots = {name.partition("/")[0] for name in names}
    total_bytes = sum(info.file_size for info in infos)

    if any(name.endswith("/constants.pkl") for name in names):
        raise Refused(
            "is a TorchScript archive, which is a program: give the .pt file it was exported from"
        )
    if any(info.compress_type != zipfile.ZIP_STORED for info in infos):
        raise Refused("has compressed entries, which torch.save never writes: obtain it again")
    # by name, or the same bytes: then all entries together are larger than the file
    if len(set(names)) < len(names) or total_bytes > file_bytes:
        raise Refused("has an entry twice: obtain it from a source you trust")
    if len(roots) > 1:
        raise Refused("has more than one root folder: obtain it from a source you trust")


# --- the pickle


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


def interpret(pickled: bytes | bytearray) -> Any:
    """The object in a pickle of protocol 2, with a Node for all that is no plain value.

    Raises Refused for an opcode or a name that no YOLO11 detection file has.
    """
    machine = Machine()
    for count, (opcode, arg, _) in enumerate(pickletools.genops(pickled)):
        if count > MAX_OPCODES:
            raise Refused(
                f"has a pickle of over {MAX_OPCODES} steps, which no YOLO11 file has: "
                "name another file"
            )
        if opcode.name == "STOP":
            break
        if opcode.name not in OPCODES:
            raise unknown(opcode.name, arg)
        OPCODES[opcode.name](machine, arg)
    return machine.stack.pop()


def unknown(opcode: str, arg: Any) -> Refused:
    return Refused(
        f"has the pickle opcode {opcode} {quoted(str(arg))}, which no YOLO11 file has: "
        "nothing was run, obtain it from a source you trust"
    )


class Machine:
    """The stack, the marks and the memo of a pickle, and what its opcodes do to them.

    A stack that is too short ends in an IndexError, a ValueError or a TypeError.
    """

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []  # the stacks below the open marks
        self.memo: dict[int, Any] = {}  # position -> value to be used again

    def protocol(self, version: int) -> None:
        if version != 2:
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
        """Into the list on top of the stack."""
        if type(self.stack[-1]) is not list:
            raise ValueError("an item for what is no list or dict")
        self.stack[-1].extend(items)

    def set_items(self, items: list[Any]) -> None:
        """Keys and values in turn, into the dict on top of the stack."""
        keys = items[::2]
        values = items[1::2]
        # the hash of a tuple in a tuple in a tuple may recurse until the stack is full
        plain_keys = {type(key) for key in keys} <= {str, int}
        if type(self.stack[-1]) is not dict or not plain_keys:
            raise ValueError("an item for what is no list or dict")
        self.stack[-1].update(zip(keys, values, strict=True))

    def storage(self) -> None:
        """Where pickle would ask torch for the bytes of a tensor."""
        self.push(Node("storage", *self.take(1)))

    def call(self) -> None:
        """Where pickle would call a function, or make an object."""
        called, args = self.take(2)
        if type(called) is not Global:
            raise ValueError("a call of what is no function")
        if called.name == "collections OrderedDict":
            self.push({})
        else:
            self.push(Node(called.name, args))

    def build(self) -> None:
        """Where pickle would set the attributes of the object on top of the stack."""
        items = self.take(1)
        # an OrderedDict may have attributes too, of no use here
        if type(self.stack[-1]) is not dict:
            (self.stack[-1].state,) = items


# all opcodes but STOP that YOLO11 files use -> what each does with its argument
OPCODES: dict[str, Callable[[Machine, Any], None]] = {
    "PROTO": lambda machine, arg: machine.protocol(arg),
    # values
    "NONE": lambda machine, arg: machine.push(None),
    "NEWTRUE": lambda machine, arg: machine.push(True),
    "NEWFALSE": lambda machine, arg: machine.push(False),
    "BININT": lambda machine, arg: machine.push(arg),
    "BININT1": lambda machine, arg: machine.push(arg),
    "BININT2": lambda machine, arg: machine.push(arg),
    "LONG1": lambda machine, arg: machine.push(arg),
    "BINFLOAT": lambda machine, arg: machine.push(arg),
    "BINUNICODE": lambda machine, arg: machine.push(arg),
    # the memo
    "BINPUT": lambda machine, arg: machine.put(arg),
    "LONG_BINPUT": lambda machine, arg: machine.put(arg),
    "BINGET": lambda machine, arg: machine.get(arg),
    "LONG_BINGET": lambda machine, arg: machine.get(arg),
    # tuples, lists and dicts
    "MARK": lambda machine, arg: machine.mark(),
    "EMPTY_TUPLE": lambda machine, arg: machine.push(()),
    "TUPLE1": lambda machine, arg: machine.push(tuple(machine.take(1))),
    "TUPLE2": lambda machine, arg: machine.push(tuple(machine.take(2))),
    "TUPLE3": lambda machine, arg: machine.push(tuple(machine.take(3))),
    "TUPLE": lambda machine, arg: machine.push(tuple(machine.take_marked())),
    "EMPTY_LIST": lambda machine, arg: machine.push([]),
    "APPEND": lambda machine, arg: machine.append(machine.take(1)),
    "APPENDS": lambda machine, arg: machine.append(machine.take_marked()),
    "EMPTY_DICT": lambda machine, arg: machine.push({}),
    "SETITEM": lambda machine, arg: machine.set_items(machine.take(2)),
    "SETITEMS": lambda machine, arg: machine.set_items(machine.take_marked()),
    # what pickle would import and call
    "GLOBAL": lambda machine, arg: machine.push(checked_global(arg)),
    "BINPERSID": lambda machine, arg: machine.storage(),
    "REDUCE": lambda machine, arg: machine.call(),
    "NEWOBJ": lambda machine, arg: machine.call(),
    "BUILD": lambda machine, arg: machine.build(),
}


def checked_global(name: str) -> Global:
    """The name as a Global. Raises Refused unless YOLO11 detection files mention it."""
    if name in ALLOWED:
        return Global(name)
    if task := re.fullmatch(r"ultralytics\.nn\.tasks (\w{1,40})Model", name):
        raise Refused(f"is a {task[1].lower()} checkpoint: give a YOLO11 detection file")
    raise Refused(
        f"names {quoted(name.replace(' ', '.'))}, which no YOLO11 detection file does: "
        "nothing was run, give a YOLO11 detection file from a source you trust"
    )


# all names that the pickle of a YOLO11 detection file mentions
ALLOWED = {
    "__builtin__ set",
    "collections OrderedDict",
    "torch FloatStorage",
    "torch HalfStorage",
    "torch LongStorage",
    "torch Size",
    "torch device",
    "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_tensor_v2",
    "torch.nn.modules.activation SiLU",
    "torch.nn.modules.batchnorm BatchNorm2d",
    "torch.nn.modules.container ModuleList",
    "torch.nn.modules.container Sequential",
    "torch.nn.modules.conv Conv2d",
    "torch.nn.modules.linear Identity",
    "torch.nn.modules.pooling MaxPool2d",
    "torch.nn.modules.upsampling Upsample",
    "ultralytics.nn.modules.block Attention",
    "ultralytics.nn.modules.block Bottleneck",
    "ultralytics.nn.modules.block C2PSA",
    "ultralytics.nn.modules.block C3k",
    "ultralytics.nn.modules.block C3k2",
    "ultralytics.nn.modules.block DFL",
    "ultralytics.nn.modules.block PSABlock",
    "ultralytics.nn.modules.block SPPF",
    "ultralytics.nn.modules.conv Concat",
    "ultralytics.nn.modules.conv Conv",
    "ultralytics.nn.modules.conv DWConv",
    "ultralytics.nn.modules.head Detect",
    "ultralytics.nn.tasks DetectionModel",
    # in files from mid-training
    "_codecs encode",
    "numpy dtype",
    "numpy._core.multiarray scalar",
    "torch.nn.modules.loss BCEWithLogitsLoss",
    "ultralytics.utils IterableSimpleNamespace",
    "ultralytics.utils.loss BboxLoss",
    "ultralytics.utils.loss DFLoss",
    "ultralytics.utils.loss v8DetectionLoss",
    "ultralytics.utils.tal TaskAlignedAssigner",
}
