"""YOLO11 weight files: read, checked, and fitted to a model.

Nothing in a file is run: kdmini/weights opens it, interprets its pickle and makes the
tensors, contents.py finds the detector in what it says, and that is checked here. Whatever
does not serve is refused in one line that names the file.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from kdmini.classes import difference, source_rows
from kdmini.contracts import UserError
from kdmini.detection.yolo11.class_rows import CLASS_ROWS, class_tensors
from kdmini.detection.yolo11.contents import (
    GIVE,
    Content,
    content_of,
    safetensors_content,
)
from kdmini.detection.yolo11.sizes import Scale, sizes_of
from kdmini.weightfile import find
from kdmini.weights.archive import Refused, quoted, refusals, unzip
from kdmini.weights.archive import content_of as file_content
from kdmini.weights.pickled import interpret
from kdmini.weights.safetensors import is_safetensors, read_safetensors
from kdmini.weights.tensors import Storages, check_finite

MAX_CLASSES = 10_000


@dataclass(frozen=True)
class Source:
    """The `weights` of a config.

    names, sppf_act: of a file that does not state them.
    """

    path: str
    classes: Literal["by_name", "keep"] | None = None
    names: list[str] | None = None
    sppf_act: bool = True


@dataclass(frozen=True)
class WeightFile:
    """What has been read from a file, and checked."""

    path: Path
    sha256: str
    state: dict[str, Tensor]  # under public keys; float32, counters int64
    names: list[str]  # of the classes, in the order of their rows
    scale: Scale | None  # None where the file does not say
    sppf_act: bool  # False: trained without the SiLU of the first convolution in SPPF
    license: str  # as the file states it; empty where it does not
    version: str  # likewise
    imgsz: Any = None  # that the file states, unchecked

    @property
    def cls_width(self) -> int:
        """Channels of the class branch: as many as it was trained with, whatever the
        rule says for so many classes.
        """
        return self.state[CLASS_ROWS[0]].shape[1]


# --- reading


def read(path: str | Path, names: list[str] | None = None, sppf_act: bool = True) -> WeightFile:
    """Find, check and read a weight file, and print one line that says what it is.

    names, sppf_act: of a file that does not state them. Raises UserError.
    """
    path = find(path)
    with refusals(path):
        file = parse(path, names, sppf_act)
    print(description(file))
    return file


def description(file: WeightFile) -> str:
    """The line that says what has been read."""
    act = "" if file.sppf_act else " (no SiLU in SPPF)"
    if file.scale is None and file.sppf_act:  # tensors alone
        act = ", taken for one with SiLU in SPPF (else give `sppf_act: false`)"
    version = quoted(file.version) if file.version else "not stated"
    license_text = quoted(file.license) if file.license else "not stated"
    return (
        f"{file.path}: {title(file.scale)}{act}, {len(file.names)} classes, "
        f"version {version}, license {license_text}, sha256 {file.sha256[:12]}"
    )


def title(scale: str | Sequence[float] | None) -> str:
    if scale is None:
        return "a YOLO11"
    return f"YOLO11{scale}" if isinstance(scale, str) else f"YOLO11 {list(scale)}"


def parse(path: Path, names: list[str] | None, sppf_act: bool) -> WeightFile:
    """The content of the file, checked.

    Raises Refused with the reason, or whatever else a damaged file leads to.
    """
    data = file_content(path)
    if is_safetensors(data):
        content = safetensors_content(read_safetensors(data))
    else:
        entries = unzip(data)
        content = content_of(interpret(entries["data.pkl"]), Storages(entries))
    check(content)

    return WeightFile(
        path=path,
        sha256=hashlib.sha256(data).hexdigest(),
        state=content.state,
        names=checked_names(content, names),
        scale=content.scale,
        sppf_act=sppf_act if content.sppf_act is None else content.sppf_act is not False,
        license=stated(content.facts, "license"),
        version=stated(content.facts, "version"),
        imgsz=content.imgsz,
    )


def check(content: Content) -> None:
    """Raises Refused unless it is a detector that can be trained, and all numbers are finite."""
    state = content.state
    if "model.0.conv.bias" in state:
        raise Refused(
            "is fused: BatchNorm is merged into its convolutions, so that it cannot be trained; "
            "give the file from before, such as the best.pt of its training"
        )
    if CLASS_ROWS[0] not in state:
        raise Refused(f"is {content.kind} without {CLASS_ROWS[0]!r}, so no YOLO11: {GIVE}")
    check_finite(state)


def checked_names(content: Content, given: list[str] | None) -> list[str]:
    """A name for each class: the file's, else those that were given.

    Raises Refused where there are none, or not one for each row.
    """
    rows = len(content.state[CLASS_ROWS[0]])
    names = given if content.names is None else content.names
    if names is None:
        raise Refused(
            f"is {content.kind}, which names no classes: give a best.pt, or "
            f"`weights: {{path: ..., names: [...]}}` with its {rows} classes in order"
        )
    are_texts = type(names) is list and {type(name) for name in names} == {str}
    if not are_texts or not len(names) == rows <= MAX_CLASSES:
        raise Refused(f"has no list of names for its {rows} classes: give another file")
    return names


def stated(facts: Mapping[str, Any], key: str) -> str:
    """The text under `key`, empty where there is none."""
    text = facts.get(key)
    return text if type(text) is str else ""


# --- fitting


def check_scale(file: WeightFile, scale: str | Sequence[float]) -> None:
    """Raises UserError unless the file is of this scale, and its tensors bear that out.

    They are as large as any in the model, so that none is built that the file could not
    fill.
    """
    scale = scale if isinstance(scale, str) else tuple(scale)
    if file.scale not in (None, scale):
        raise UserError(
            f"{file.path} is {title(file.scale)}, the config says {title(scale)}: "
            "change `scale`, or name another file"
        )
    sizes = sizes_of(scale)
    expected = {
        "model.0.conv.weight": (sizes.c64, 3, 3, 3),
        "model.7.conv.weight": (sizes.c1024, sizes.c512, 3, 3),
    }
    refuse_if_any(expected.keys() - file.state.keys(), "lacks", file, scale)
    misfits = [key for key, shape in expected.items() if file.state[key].shape != shape]
    refuse_if_any(misfits, "has other shapes in", file, scale)

    blocks = {key.split(".")[3] for key in file.state if key.startswith("model.2.m.")}
    if len(blocks) != sizes.repeats:
        raise UserError(
            f"{file.path} has {len(blocks)} blocks in 'model.2', so it is no {title(scale)}: "
            "change `scale`, or name another file"
        )


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
    refuse_if_any(state.keys() - file.state.keys(), "lacks", file, scale)
    refuse_if_any(file.state.keys() - state.keys(), "has unknown", file, scale)

    result = dict(file.state)
    if classes == "by_name":
        misfits = [
            key
            for key in CLASS_ROWS
            if file.state[key].shape != (len(file.names), *state[key].shape[1:])
        ]
        refuse_if_any(misfits, "has other shapes in", file, scale)
        source = source_rows(file.names, names)
        result |= class_tensors(file.state, state, source)
        print(carried_over(file, names, source))

    misfits = [key for key in state if result[key].shape != state[key].shape]
    if classes != "by_name" and names != file.names:
        raise UserError(other_classes(file, names, misfits))
    refuse_if_any(misfits, "has other shapes in", file, scale)
    return result


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
    return (
        f"{file.path}: {difference(file.names, names, 'the file', 'the data')}; "
        f"tensors that do not fit: {listed(misfits)}: "
        "give `classes: by_name` to carry over those that both have, in the order of the data, "
        "or, for a teacher, `classes: keep` to keep those of the file"
    )


def refuse_if_any(
    keys: Iterable[str], fault: str, file: WeightFile, scale: str | Sequence[float]
) -> None:
    if keys := sorted(keys):
        raise UserError(
            f"{file.path} {fault} {listed(keys)}, so it is no {title(scale)}: "
            "change `scale`, or name another file"
        )


def listed(texts: Sequence[str], most: int = 8) -> str:
    """The first few, fit for a terminal, and how many more there are."""
    first = ", ".join(quoted(text, 40) for text in texts[:most])
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return (first or "none") + more
