"""Weight files: public YOLO11 `.pt` files and kdmini's own `best.pt`, read without running what is
in them.

A `.pt` file is a zip of one pickle and the bytes of the tensors. A pickle is a program: unpickling
it may call anything. Here an interpreter of our own walks through the few opcodes that such files
use: a name stays a name, and a call becomes a `Node` that notes what would have been called with
what. Of these notes only the tensors and the tree of modules are looked at. Nothing is imported or
called."""

import copy
import hashlib
import io
import math
import os
import pickletools
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdmini.contracts import UserError

Scale = str | tuple[float, ...]  # n, s, m, l, x, or (depth, width, max channels)

SCALE_OF = {
    (16, 1): "n",
    (32, 1): "s",
    (64, 1): "m",
    (64, 2): "l",
    (96, 2): "x",
}  # channels of layer 0, blocks in 2

COCO_NAME = {  # of the VOC classes that are called otherwise there
    "aeroplane": "airplane",
    "diningtable": "dining table",
    "motorbike": "motorcycle",
    "pottedplant": "potted plant",
    "sofa": "couch",
    "tvmonitor": "tv",
}
CLASS_BRANCH = "model.23.cv3."
CLASS_ROWS = [
    f"{CLASS_BRANCH}{level}.2.{kind}" for level in range(3) for kind in ("weight", "bias")
]

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


@dataclass(frozen=True)
class WeightFile:
    path: Path
    sha256: str
    state: dict[str, Tensor]  # under public keys; float32, counters int64
    names: list[str]
    scale: Scale
    sppf_act: bool  # False: trained without the SiLU of the first convolution in SPPF
    license: str  # as the file states it; empty where it does not
    version: str


class Refused(Exception):
    """Why a file is not read; `read` puts the file's name before it."""


def find(path: str | Path) -> Path:
    """Where a weight file is; a name without a folder is also looked for in ./weights and in the
    cache (KDMINI_CACHE, else ~/.cache/kdmini). Raises UserError.
    """
    wanted = Path(path).expanduser()
    if wanted.is_dir():
        raise UserError(f"weights {str(path)!r} is a folder: name a file in it")
    cache = Path(os.environ.get("KDMINI_CACHE") or "~/.cache/kdmini").expanduser()
    places = (
        [wanted, Path("weights") / wanted, cache / wanted]
        if wanted.name == str(wanted)
        else [wanted]
    )
    for place in places:
        if place.is_file():
            return place
    name = f" --weights {wanted}" if re.fullmatch(r"yolo11[nsm]\.pt", str(wanted)) else ""
    raise UserError(
        f"weights {str(path)!r} are not there ({', '.join(map(str, places))}): name a file that exists, "
        f"or fetch the public ones with `python -m kdmini.extras.download{name}`"
    )


def read(path: str | Path) -> WeightFile:
    """Find, check and read a weight file, and print one line that says what it is. Raises
    UserError.
    """
    path = find(path)
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise Refused(
                f"is larger than {MAX_FILE_BYTES} bytes, which no YOLO11 file is: name another file"
            )
        data = path.read_bytes()
        entries = unzip(data)
        file = parse(
            path, hashlib.sha256(data).hexdigest(), interpret(entries["data.pkl"]), entries
        )
    except Refused as reason:
        raise UserError(f"{path} {reason}") from None
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): check it, or name another file"
        ) from error
    except (
        Exception
    ) as error:  # whatever a damaged or crafted file trips over, the file is the cause
        raise UserError(
            f"{path} is damaged or no weight file ({type(error).__name__}: {shown(str(error))}): obtain it again"
        ) from error
    version, license_ = (
        shown(text) if text else "not stated" for text in (file.version, file.license)
    )
    print(
        f"{path}: {title(file.scale)}{'' if file.sppf_act else ' (no SiLU in SPPF)'}, {len(file.names)} classes, "
        f"version {version}, license {license_}, sha256 {file.sha256[:12]}"
    )
    return file


def fit(
    file: WeightFile,
    state: Mapping[str, Tensor],
    names: list[str],
    scale: str | Sequence[float],
    classes: str | None,
) -> dict[str, Tensor]:
    """-> the complete state_dict for a model of these class names and this scale, out of the file.

    state: the state_dict of the freshly initialised model. classes: None or "keep" where the names
    are the file's; "by_name" carries the rows of the class branch over by class name, leaves those
    of new classes as initialised, and prints what it did. Raises UserError where anything is left
    over."""
    scale = scale if isinstance(scale, str) else tuple(scale)
    if classes not in (None, "by_name", "keep"):
        raise UserError(f"classes is {classes!r} and has to be by_name or keep")
    if file.scale != scale:
        raise UserError(
            f"{file.path} is {title(file.scale)}, the config says {title(scale)}: change `scale`, or name another file"
        )
    _refuse_if(state.keys() - file.state.keys(), "lacks", file)
    _refuse_if(file.state.keys() - state.keys(), "has unknown", file)

    result = file.state | (_class_rows(file, state, names) if classes == "by_name" else {})
    misfits = [key for key in state if result[key].shape != state[key].shape]
    if classes != "by_name" and names != file.names:
        raise UserError(
            f"{file.path} has {len(file.names)} classes, the data {len(names)} "
            f"(only in the file: {listed(n for n in file.names if n not in names)}; "
            f"only in the data: {listed(n for n in names if n not in file.names)}; "
            f"tensors that do not fit: {listed(misfits)}): give `classes: by_name` to carry over those that both "
            "have, in the order of the data, or `classes: keep` to keep those of the file"
        )
    _refuse_if(misfits, "has other shapes in", file)
    return result


def _class_rows(
    file: WeightFile, state: Mapping[str, Tensor], names: list[str]
) -> dict[str, Tensor]:
    """The tensors that depend on the classes: the file's rows where it has the class, else those of
    `state`.
    """
    theirs, ours = (tensors[CLASS_ROWS[0]].shape[1:].numel() for tensors in (file.state, state))
    if theirs != ours:
        print(
            f"{file.path.name}: the class branch is {theirs} wide for {len(file.names)} classes and {ours} for "
            f"{len(names)}: all of it starts anew, no class is carried over"
        )
        return {key: value for key, value in state.items() if key.startswith(CLASS_BRANCH)}

    other = [
        key
        for key in CLASS_ROWS
        if file.state[key].shape != (len(file.names), *state[key].shape[1:])
    ]
    _refuse_if(other, "has other shapes in", file)
    row_of = {COCO_NAME.get(name, name): row for row, name in enumerate(file.names)}
    row_of |= {name: row for row, name in enumerate(file.names)}
    source = [row_of.get(name, row_of.get(COCO_NAME.get(name, name))) for name in names]
    pairs = [(new, row) for new, row in enumerate(source) if row is not None]
    rows = {key: state[key].clone() for key in CLASS_ROWS}
    for key, tensor in rows.items():
        for new, row in pairs:
            tensor[new] = file.state[key][row]
    renamed = [
        f"{file.names[row]} = {names[new]}" for new, row in pairs if file.names[row] != names[new]
    ]
    new_names = [name for name, row in zip(names, source, strict=True) if row is None]
    print(
        f"{file.path.name}: {len(pairs)} of {len(file.names)} class rows carried over by name "
        f"(renamed: {listed(renamed)}); new: {listed(new_names)}"
    )
    return rows


def _refuse_if(keys: Iterable[str], what: str, file: WeightFile) -> None:
    if keys := sorted(keys):
        raise UserError(
            f"{file.path} {what} {listed(keys)}, so it is no {title(file.scale)}: name another file"
        )


def title(scale: Scale) -> str:
    return f"YOLO11{scale}" if isinstance(scale, str) else f"YOLO11 {list(scale)}"


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


def parse(path: Path, sha256: str, content: Any, entries: Mapping[str, bytearray]) -> WeightFile:
    """What the interpreter made of the pickle -> WeightFile."""
    to_tensor = tensor_maker(entries)
    if type(content) is dict and content.get("format") == "kdmini":
        facts = content["card"]
        names, scale, sppf_act = content["names"], facts["scale"], facts["sppf_act"]
        if scale not in SCALE_OF.values():
            depth, width, max_channels = map(float, scale)
            scale = depth, width, max_channels
        state = {key: to_tensor(node) for key, node in content["model"].items()}
    else:
        # a file from mid-training may have both: `ema` is what is evaluated
        root = (content.get("ema") or content.get("model")) if type(content) is dict else None
        if not (isinstance(root, Node) and root.name == "ultralytics.nn.tasks DetectionModel"):
            raise Refused(
                "holds no YOLO11 detector: give a YOLO11 detection file, or a best.pt of kdmini"
            )
        facts, names = content, root.state["names"]
        names = [names[row] for row in range(len(names))]
        tree = tree_of(root)
        state = {
            name: to_tensor(node)
            for name, node in tree.items()
            if node.name.startswith("torch._utils ")
        }
        blocks = [name for name in tree if re.fullmatch(r"model\.2\.m\.\d+", name)]
        scale = SCALE_OF.get((len(state.get("model.0.conv.weight", ())), len(blocks)))
        if scale is None:
            raise Refused(
                "is a detector, but no YOLO11 of the scales n, s, m, l or x: give one that is"
            )
        sppf_act = tree["model.9.cv1.act"].name != "torch.nn.modules.linear Identity"

    rows = len(state[CLASS_ROWS[0]])
    if (
        type(names) is not list
        or {type(name) for name in names} != {str}
        or not len(names) == rows <= MAX_CLASSES
    ):
        raise Refused(f"has no list of names for its {rows} classes: give another file")
    for key, tensor in state.items():
        if not tensor.isfinite().all():
            raise Refused(
                f"has NaN or infinity in {shown(key)}: give a file from before its training diverged"
            )
    stated = (facts.get(key) for key in ("license", "version"))
    license_, version = (text if type(text) is str else "" for text in stated)
    return WeightFile(path, sha256, state, names, scale, sppf_act is not False, license_, version)


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
