"""YOLO11 weight files, public ones and kdmini's `best.pt`: read and fitted to a model.

Nothing in a file is run: pickled.py interprets its pickle, tensors.py makes the
tensors, and what they say is checked here. Whatever does not serve is refused in one
line that names the file.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from kdmini.contracts import UserError
from kdmini.detection.yolo11.pickled import Node, Refused, interpret, quoted, unzip
from kdmini.detection.yolo11.tensors import Storages, tree_of
from kdmini.weightfile import find

MAX_FILE_BYTES = 1 << 30
MAX_CLASSES = 10_000

Scale = str | tuple[float, ...]  # n, s, m, l, x, or (depth, width, max channels)

# channels of layer 0, blocks in layer 2 -> scale
SCALE_OF = {
    (16, 1): "n",
    (32, 1): "s",
    (64, 1): "m",
    (64, 2): "l",
    (96, 2): "x",
}

# the VOC classes that COCO calls otherwise
COCO_NAME = {
    "aeroplane": "airplane",
    "diningtable": "dining table",
    "motorbike": "motorcycle",
    "pottedplant": "potted plant",
    "sofa": "couch",
    "tvmonitor": "tv",
}

# the class branch of the head; its width may depend on the number of classes
CLASS_BRANCH = "model.23.cv3."
# what has one row a class in it, at the three levels
CLASS_ROWS = [
    f"{CLASS_BRANCH}{level}.2.{kind}" for level in range(3) for kind in ("weight", "bias")
]


@dataclass(frozen=True)
class WeightFile:
    """What has been read from a file, and checked."""

    path: Path
    sha256: str
    state: dict[str, Tensor]  # under public keys; float32, counters int64
    names: list[str]  # of the classes, in the order of their rows
    scale: Scale
    sppf_act: bool  # False: trained without the SiLU of the first convolution in SPPF
    license: str  # as the file states it; empty where it does not
    version: str  # likewise


# --- reading


def read(path: str | Path) -> WeightFile:
    """Find, check and read a weight file, and print one line that says what it is.

    Raises UserError.
    """
    path = find(path)
    try:
        file = parse(path)
    except Refused as reason:
        raise UserError(f"{path} {reason}") from None
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): check it, or name another file"
        ) from error
    except Exception as error:
        # whatever a damaged or crafted file trips over, the file is the cause
        cause = f"{type(error).__name__}: {quoted(str(error))}"
        raise UserError(
            f"{path} is damaged or no weight file ({cause}): obtain it again"
        ) from error
    print(description(file))
    return file


def description(file: WeightFile) -> str:
    """The line that says what has been read."""
    without_act = "" if file.sppf_act else " (no SiLU in SPPF)"
    version = quoted(file.version) if file.version else "not stated"
    license_text = quoted(file.license) if file.license else "not stated"
    return (
        f"{file.path}: {title(file.scale)}{without_act}, {len(file.names)} classes, "
        f"version {version}, license {license_text}, sha256 {file.sha256[:12]}"
    )


def title(scale: Scale) -> str:
    return f"YOLO11{scale}" if isinstance(scale, str) else f"YOLO11 {list(scale)}"


class Content(NamedTuple):
    """What a file says of its detector, not yet checked."""

    facts: Mapping[str, Any]  # where license and version are stated
    names: Any
    scale: Scale
    sppf_act: Any
    state: dict[str, Tensor]


def parse(path: Path) -> WeightFile:
    """The content of the file, checked.

    Raises Refused with the reason, or whatever else a damaged file leads to.
    """
    if path.stat().st_size > MAX_FILE_BYTES:
        raise Refused(
            f"is larger than {MAX_FILE_BYTES} bytes, which no YOLO11 file is: name another file"
        )

    data = path.read_bytes()
    entries = unzip(data)
    pickled = interpret(entries["data.pkl"])
    storages = Storages(entries)
    if type(pickled) is dict and pickled.get("format") == "kdmini":
        content = own_content(pickled, storages)
    else:
        content = public_content(pickled, storages)
    check(content)

    return WeightFile(
        path=path,
        sha256=hashlib.sha256(data).hexdigest(),
        state=content.state,
        names=content.names,
        scale=content.scale,
        sppf_act=content.sppf_act is not False,
        license=stated(content.facts, "license"),
        version=stated(content.facts, "version"),
    )


def own_content(best: dict[str, Any], storages: Storages) -> Content:
    """What a best.pt of kdmini says, which states all of it."""
    card = best["card"]
    names = best["names"]
    scale = card["scale"]
    sppf_act = card["sppf_act"]
    if scale not in SCALE_OF.values():
        depth, width, max_channels = map(float, scale)
        scale = (depth, width, max_channels)
    state = {key: storages.tensor(node) for key, node in best["model"].items()}
    return Content(card, names, scale, sppf_act, state)


def public_content(checkpoint: Any, storages: Storages) -> Content:
    """What a public file says, which holds a model: its modules give the scale."""
    root = None
    if type(checkpoint) is dict:
        # a file from mid-training may have both: `ema` is what is evaluated
        root = checkpoint.get("ema") or checkpoint.get("model")
    if not isinstance(root, Node) or root.name != "ultralytics.nn.tasks DetectionModel":
        raise Refused(
            "holds no YOLO11 detector: give a YOLO11 detection file, or a best.pt of kdmini"
        )
    name_of = root.state["names"]  # row -> name
    names = [name_of[row] for row in range(len(name_of))]

    tree = tree_of(root)
    state = {
        name: storages.tensor(node)
        for name, node in tree.items()
        if node.name.startswith("torch._utils ")
    }

    blocks = [name for name in tree if re.fullmatch(r"model\.2\.m\.\d+", name)]
    channels = len(state.get("model.0.conv.weight", ()))
    scale = SCALE_OF.get((channels, len(blocks)))
    if scale is None:
        raise Refused(
            "is a detector, but no YOLO11 of the scales n, s, m, l or x: give one that is"
        )

    sppf_act = tree["model.9.cv1.act"].name != "torch.nn.modules.linear Identity"
    return Content(checkpoint, names, scale, sppf_act, state)


def check(content: Content) -> None:
    """Raises Refused unless each class has a name and all numbers are finite."""
    names = content.names
    rows = len(content.state[CLASS_ROWS[0]])
    are_texts = type(names) is list and {type(name) for name in names} == {str}
    if not are_texts or not len(names) == rows <= MAX_CLASSES:
        raise Refused(f"has no list of names for its {rows} classes: give another file")
    for key, tensor in content.state.items():
        if not tensor.isfinite().all():
            raise Refused(
                f"has NaN or infinity in {quoted(key)}: "
                "give a file from before its training diverged"
            )


def stated(facts: Mapping[str, Any], key: str) -> str:
    """The text under `key`, empty where there is none."""
    text = facts.get(key)
    return text if type(text) is str else ""


# --- fitting


def fit(
    file: WeightFile,
    state: Mapping[str, Tensor],
    names: list[str],
    scale: str | Sequence[float],
    classes: str | None,
) -> dict[str, Tensor]:
    """-> the complete state_dict of a model of these names and scale, from the file.

    state: the state_dict of the freshly initialised model. classes: None or "keep"
    where the names are the file's; "by_name" carries the rows of the class branch over
    by class name, leaves those of new classes as initialised, and prints what it did.
    Raises UserError where anything is left over.
    """
    scale = scale if isinstance(scale, str) else tuple(scale)
    if classes not in (None, "by_name", "keep"):
        raise UserError(f"classes is {classes!r} and has to be by_name or keep")
    if file.scale != scale:
        raise UserError(
            f"{file.path} is {title(file.scale)}, the config says {title(scale)}: "
            "change `scale`, or name another file"
        )
    refuse_if_any(state.keys() - file.state.keys(), "lacks", file)
    refuse_if_any(file.state.keys() - state.keys(), "has unknown", file)

    result = dict(file.state)
    if classes == "by_name":
        result |= class_tensors(file, state, names)
    misfits = [key for key in state if result[key].shape != state[key].shape]
    if classes != "by_name" and names != file.names:
        raise UserError(other_classes(file, names, misfits))
    refuse_if_any(misfits, "has other shapes in", file)
    return result


def class_tensors(
    file: WeightFile, state: Mapping[str, Tensor], names: list[str]
) -> dict[str, Tensor]:
    """The tensors that depend on the classes, by key; prints what is carried over.

    They have the file's rows where it has the class, else those of `state`. Where the
    class branch of the file has another width, all of it is that of `state`.
    """
    width_of_file = file.state[CLASS_ROWS[0]].shape[1:].numel()
    width = state[CLASS_ROWS[0]].shape[1:].numel()
    if width_of_file != width:
        print(
            f"{file.path.name}: the class branch is {width_of_file} wide for "
            f"{len(file.names)} classes and {width} for {len(names)}: "
            "all of it starts anew, no class is carried over"
        )
        return {key: tensor for key, tensor in state.items() if key.startswith(CLASS_BRANCH)}

    misfits = [
        key
        for key in CLASS_ROWS
        if file.state[key].shape != (len(file.names), *state[key].shape[1:])
    ]
    refuse_if_any(misfits, "has other shapes in", file)

    source = source_rows(file.names, names)
    tensors = {key: state[key].clone() for key in CLASS_ROWS}
    for key, tensor in tensors.items():
        for row, row_of_file in source.items():
            tensor[row] = file.state[key][row_of_file]
    print(carried_over(file, names, source))
    return tensors


def source_rows(names_of_file: list[str], names: list[str]) -> dict[int, int]:
    """Row of each of `names` that the file has -> its row in the file.

    A class may stand there under its VOC or its COCO name; its own name goes first.
    """
    row_of = {COCO_NAME.get(name, name): row for row, name in enumerate(names_of_file)}
    row_of |= {name: row for row, name in enumerate(names_of_file)}
    source = {}
    for row, name in enumerate(names):
        coco_name = COCO_NAME.get(name, name)
        if name in row_of:
            source[row] = row_of[name]
        elif coco_name in row_of:
            source[row] = row_of[coco_name]
    return source


def carried_over(file: WeightFile, names: list[str], source: Mapping[int, int]) -> str:
    """The line that says what became of the classes; source: row -> row in the file."""
    renamed = [
        f"{file.names[row_of_file]} = {names[row]}"
        for row, row_of_file in source.items()
        if file.names[row_of_file] != names[row]
    ]
    new = [name for row, name in enumerate(names) if row not in source]
    return (
        f"{file.path.name}: {len(source)} of {len(file.names)} class rows carried over by name "
        f"(renamed: {listed(renamed)}); new: {listed(new)}"
    )


def other_classes(file: WeightFile, names: list[str], misfits: list[str]) -> str:
    """The message where names differ and nothing says what is to become of the rows."""
    only_file = [name for name in file.names if name not in names]
    only_data = [name for name in names if name not in file.names]
    return (
        f"{file.path} has {len(file.names)} classes, the data {len(names)} "
        f"(only in the file: {listed(only_file)}; only in the data: {listed(only_data)}; "
        f"tensors that do not fit: {listed(misfits)}): "
        "give `classes: by_name` to carry over those that both have, in the order of the data, "
        "or `classes: keep` to keep those of the file"
    )


def refuse_if_any(keys: Iterable[str], fault: str, file: WeightFile) -> None:
    if keys := sorted(keys):
        raise UserError(
            f"{file.path} {fault} {listed(keys)}, so it is no {title(file.scale)}: "
            "name another file"
        )


def listed(texts: Sequence[str], most: int = 8) -> str:
    """The first few, fit for a terminal, and how many more there are."""
    first = ", ".join(quoted(text, 40) for text in texts[:most])
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return (first or "none") + more
