"""Weight files: public YOLO11 `.pt` files and kdmini's own `best.pt`, read without running what is
in them.

A `.pt` file is a zip of one pickle and the bytes of the tensors. A pickle is a program: unpickling
it may call anything. Here an interpreter of our own walks through the few opcodes that such files
use: a name stays a name, and a call becomes a `Node` that notes what would have been called with
what. Of these notes only the tensors and the tree of modules are looked at. Nothing is imported or
called."""

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from kdmini.contracts import UserError
from kdmini.detection.yolo11.pickled import (
    MAX_CLASSES,
    MAX_FILE_BYTES,
    Node,
    Refused,
    interpret,
    listed,
    shown,
    tensor_maker,
    tree_of,
    unzip,
)
from kdmini.weightfile import find

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
