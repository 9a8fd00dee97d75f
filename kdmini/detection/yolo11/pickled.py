"""An interpreter of the few pickle opcodes that weight files use: it notes what would be called, and calls nothing."""

import copy
import io
import math
import pickletools
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# module -> names: all that the pickle of a YOLO11 detection file mentions, the last seven lines
# only in mid-training
GLOBALS = {
    "collections": "OrderedDict",
    "__builtin__": "set",
    "torch": "Size HalfStorage FloatStorage LongStorage device",
    "torch._utils": "_rebuild_tensor_v2 _rebuild_parameter",
    "torch.nn.modules": "activation.SiLU batchnorm.BatchNorm2d container.ModuleList container.Sequential conv.Conv2d "
    "linear.Identity pooling.MaxPool2d upsampling.Upsample",
    "ultralytics.nn.modules.block": "Attention Bottleneck C2PSA C3k C3k2 DFL PSABlock SPPF",
    "ultralytics.nn.modules.conv": "Concat Conv DWConv",
    "ultralytics.nn.modules.head": "Detect",
    "ultralytics.nn.tasks": "DetectionModel",
    "_codecs": "encode",
    "numpy": "dtype",
    "numpy._core.multiarray": "scalar",
    "torch.nn.modules.loss": "BCEWithLogitsLoss",
    "ultralytics.utils": "IterableSimpleNamespace",
    "ultralytics.utils.loss": "BboxLoss DFLoss v8DetectionLoss",
    "ultralytics.utils.tal": "TaskAlignedAssigner",
}


ALLOWED = {
    " ".join(f"{module}.{name}".rsplit(".", 1))
    for module, names in GLOBALS.items()
    for name in names.split()
}


STORAGES = {
    "torch HalfStorage": torch.float16,
    "torch FloatStorage": torch.float32,
    "torch LongStorage": torch.int64,
}


MAX_FILE_BYTES, MAX_OPCODES = 1 << 30, 2_000_000


MAX_NODES, MAX_NAME, MAX_CLASSES = 20_000, 200, 10_000


class Refused(Exception):
    """Why a file is not read; `read` puts the file's name before it."""


def shown(text: str, cap: int = 80) -> str:
    """Text out of a file, fit for a terminal: quoted, escaped, cut."""
    return repr(text if len(text) <= cap else text[:cap] + "...")


def listed(texts: Iterable[str], most: int = 8) -> str:
    texts = list(texts)
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return (", ".join(shown(text, 40) for text in texts[:most]) or "none") + more


def unzip(data: bytes) -> dict[str, bytearray]:
    """Entry -> content, without the root folder they share. Entries as torch.save writes them:
    stored, unique.
    """
    if data[:2] != b"PK":
        raise Refused(foreign(data))
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        infos = archive.infolist()
        if any(info.filename.endswith("/constants.pkl") for info in infos):
            raise Refused(
                "is a TorchScript archive, which is a program: give the .pt file it was exported from"
            )
        if any(info.compress_type != zipfile.ZIP_STORED for info in infos):
            raise Refused("has compressed entries, which torch.save never writes: obtain it again")
        if len({info.filename for info in infos}) < len(infos) or sum(
            info.file_size for info in infos
        ) > len(data):
            raise Refused("has an entry twice: obtain it from a source you trust")
        if len({info.filename.partition("/")[0] for info in infos}) > 1:
            raise Refused("has more than one root folder: obtain it from a source you trust")
        entries = {}
        for info in infos:
            if info.CRC == 0:
                info.CRC = None  # type: ignore[assignment]  # not computed, see torch.serialization.set_crc32_options
            entries[info.filename.partition("/")[2]] = bytearray(
                archive.read(info)
            )  # raises where the CRC differs
    if "data.pkl" not in entries:
        raise Refused("is a zip without data.pkl, so no weight file: give a YOLO11 .pt file")
    if entries.get("byteorder", b"little") != b"little":
        raise Refused("is from a big-endian machine: save it again on a little-endian one")
    return entries


FOREIGN = {  # how a file that is no zip begins -> what it seems to be
    rb"$": "is empty (0 bytes): obtain it again",
    rb"(?i)\s*<(!doctype|html)": "is a web page (HTML), perhaps of a failed download: obtain the file again",
    rb"(?s).{257}ustar|\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19\.": "is in a format from before PyTorch 1.6: load it "
    "where it is from and save it with a newer one",
    rb"\x80": "is a bare pickle, which is never opened: give a .pt file that torch.save wrote",
    rb"(?s).{8}\{": "is a safetensors file: give the YOLO11 .pt file",
    rb"\x08[\x01-\x20][\x12:]": "is an ONNX model: give the .pt file it was exported from",
}


def foreign(data: bytes) -> str:
    """What a file that is no zip seems to be."""
    known = (what for begins, what in FOREIGN.items() if re.match(begins, data))
    return next(known, f"is no weight file (it begins with {data[:8]!r}): give a YOLO11 .pt file")


@dataclass(eq=False)
class Node:
    """A call in the pickle that was not made: `name` would have been called with `args`."""

    name: str
    args: Any
    state: Any = field(default_factory=dict)  # what would have become the object's __dict__


@dataclass(frozen=True)
class Global:
    name: str  # "module name"


# opcode -> what it puts on the stack, and how many values it takes from there
MADE: dict[str, Any] = dict(
    NONE=None, NEWTRUE=True, NEWFALSE=False, EMPTY_DICT={}, EMPTY_LIST=[], EMPTY_TUPLE=()
)


TAKEN = dict(
    TUPLE1=1, TUPLE2=2, TUPLE3=3, APPEND=1, SETITEM=2, BINPERSID=1, REDUCE=2, NEWOBJ=2, BUILD=1
)


def interpret(pickled: bytes | bytearray) -> Any:
    """The object in a pickle of protocol 2, with a Node for all that is no plain value. Runs
    nothing.
    """
    stack: list[Any] = []
    marks: list[list[Any]] = []  # the stacks below the open marks
    memo: dict[int, Any] = {}
    arg: Any
    for count, (opcode, arg, _) in enumerate(pickletools.genops(pickled)):
        if count > MAX_OPCODES:
            raise Refused(
                f"has a pickle of over {MAX_OPCODES} steps, which no YOLO11 file has: name another file"
            )
        if opcode.name in ("TUPLE", "APPENDS", "SETITEMS"):
            items, stack = stack, marks.pop()
        elif taken := TAKEN.get(opcode.name):
            items = stack[-taken:]
            del stack[-taken:]
        match opcode.name:
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE":
                stack.append(arg)
            case name if name in MADE:
                stack.append(copy.copy(MADE[name]))
            case "BINPUT" | "LONG_BINPUT":
                memo[arg] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[arg])
            case "MARK":
                marks.append(stack)
                stack = []
            case "TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(items))
            case "APPEND" | "APPENDS" if type(stack[-1]) is list:
                stack[-1].extend(items)
            case "SETITEM" | "SETITEMS" if type(stack[-1]) is dict and {
                type(key) for key in items[::2]
            } <= {str, int}:
                stack[-1].update(zip(items[::2], items[1::2], strict=True))
            case "APPEND" | "APPENDS" | "SETITEM" | "SETITEMS":
                raise ValueError("an item for what is no list or dict")
            case "GLOBAL":
                stack.append(_global(arg))
            case "BINPERSID":
                stack.append(Node("storage", *items))
            case "REDUCE" | "NEWOBJ":
                called, args = items
                if type(called) is not Global:
                    raise ValueError("a call of what is no function")
                stack.append(
                    {} if called.name == "collections OrderedDict" else Node(called.name, args)
                )
            case "BUILD":
                if (
                    type(stack[-1]) is not dict
                ):  # an OrderedDict may have attributes too, of no use here
                    (stack[-1].state,) = items
            case "PROTO" if arg == 2:
                pass
            case "STOP":
                return stack.pop()
            case _:
                raise Refused(
                    f"has the pickle opcode {opcode.name} {shown(str(arg))}, which no YOLO11 file has: "
                    "nothing was run, obtain it from a source you trust"
                )


def _global(name: str) -> Global:
    if name in ALLOWED:
        return Global(name)
    if task := re.fullmatch(r"ultralytics\.nn\.tasks (\w{1,40})Model", name):
        raise Refused(f"is a {task[1].lower()} checkpoint: give a YOLO11 detection file")
    raise Refused(
        f"names {shown(name.replace(' ', '.'))}, which no YOLO11 detection file does: nothing was run, "
        "give a YOLO11 detection file from a source you trust"
    )


def tree_of(root: Node) -> dict[str, Node]:
    """Dotted name -> every module, parameter and buffer; what is shared stands under each of its
    names.
    """
    found: list[tuple[str, Any]] = [("", root)]
    for name, node in found:  # which grows meanwhile
        for held in ("_modules", "_parameters", "_buffers") if node is not None else ():
            for child, value in node.state.get(held, {}).items():
                if len(found) > MAX_NODES or len(name) + len(child) > MAX_NAME:
                    raise Refused(
                        "has modules in modules without end: obtain it from a source you trust"
                    )
                found.append((f"{name}.{child}" if name else child, value))
    return {name: node for name, node in found if node is not None}


def tensor_maker(entries: Mapping[str, bytearray]) -> Callable[[Any], Tensor]:
    """-> a function from a Node to a tensor of its own, float32 or int64.

    All that it makes together has no more elements than the file has bytes: neither strides of zero
    nor one storage named a thousand times fill the memory.
    """
    budget = sum(map(len, entries.values()))

    def to_tensor(node: Any) -> Tensor:
        nonlocal budget
        if node.name == "torch._utils _rebuild_parameter":
            node = node.args[0]
        storage, offset, size, stride = node.args[:4]
        kind, dtype_name, entry, _, length = storage.args
        if (node.name, kind, type(entry)) != ("torch._utils _rebuild_tensor_v2", "storage", str):
            raise ValueError("no tensor")
        dtype, content = STORAGES[dtype_name.name], entries[f"data/{entry}"]
        if not all(0 <= n < 1 << 40 for n in (offset, length, *size, *stride)):
            raise ValueError("a size, stride or offset that is no count")
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        budget -= math.prod(size)
        if length * dtype.itemsize != len(content) or last >= length or budget < 0:
            raise ValueError("a tensor that reaches outside its storage")
        tensor = torch.frombuffer(content, dtype=dtype).as_strided(size, stride, offset)
        return tensor.to(
            torch.int64 if dtype == torch.int64 else torch.float32, copy=True
        ).contiguous()

    return to_tensor
