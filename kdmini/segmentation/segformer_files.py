"""Weight files of SegFormer: what they hold, and how they fit.

Beside a best.pt, files of transformers and of the authors (encoder or whole network) are
read, and timm's PVTv2, which is the same encoder. Whatever does not fit is refused in one
line that names the file.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from kdmini.classes import difference, listed, source_rows
from kdmini.contracts import UserError
from kdmini.segmentation.segformer_names import NAMINGS, OURS, Naming
from kdmini.weights.archive import quoted, refusals
from kdmini.weights.state import State, read_state, source_of

# size -> blocks and channels of the four stages, width of the decoder
SIZES = {
    "b0": ((2, 2, 2, 2), (32, 64, 160, 256), 256),
    "b1": ((2, 2, 2, 2), (64, 128, 320, 512), 256),
    "b2": ((3, 4, 6, 3), (64, 128, 320, 512), 768),
    "b3": ((3, 4, 18, 3), (64, 128, 320, 512), 768),
    "b4": ((3, 8, 27, 3), (64, 128, 320, 512), 768),
    "b5": ((3, 6, 40, 3), (64, 128, 320, 512), 768),
}
STAGES = range(4)
CLASS_ROWS = ("classifier.weight", "classifier.bias")


@dataclass(frozen=True)
class Source:
    """The `weights` of a config. names: of a file that does not state them."""

    path: str
    classes: Literal["by_name", "keep"] | None = None
    names: list[str] | None = None


@dataclass(frozen=True)
class WeightFile:
    """What has been read; the tensors stand under the file's own keys."""

    path: Path
    tensors: dict[str, Tensor]
    naming: Naming
    names: list[str] | None  # of its classes; None where nothing states them
    license: str
    classes: str | None  # as in Source

    @property
    def rows(self) -> int:
        """Of the class head; 0 of an encoder by itself."""
        return len(self.tensors.get(self.naming.keys_of(CLASS_ROWS[0])[0], ()))

    def named(self, key: str) -> Tensor:
        """By our key. Raises UserError where the file lacks it."""
        (theirs,) = self.naming.keys_of(key)
        refuse_if_any([] if theirs in self.tensors else [theirs], "lacks", self.path)
        return self.tensors[theirs]


# --- reading


def read(weights: str | Mapping[str, Any], size: str, ratios: Sequence[int]) -> WeightFile:
    """The file of a config, found to be of this size; prints one line that says what it is.

    Raises UserError.
    """
    source = source_of(weights, Source)
    state = read_state(source.path)
    tensors = {key.removeprefix("backbone."): value for key, value in state.tensors.items()}
    naming = naming_of(tensors, state)
    with refusals(state.path):
        license_text = str(state.best["card"]["license"]) if state.best else naming.license
        file = WeightFile(state.path, tensors, naming, None, license_text, source.classes)
        check_size(file, size, list(ratios))
        names = checked(state.best.get("names"), file.rows) or names_beside(file) or source.names
    if names and file.rows and file.rows != len(names):
        raise UserError(
            f"{file.path} has {file.rows} classes, `names` of weights has {len(names)}: "
            "give one for each, in order"
        )
    file = replace(file, names=names)
    held = f"{file.rows} classes" if file.rows else "encoder only"
    license_text = quoted(license_text) if license_text else "not stated"
    print(
        f"{file.path}: SegFormer {size}, a {naming.title}, {held}, "
        f"license {license_text}, sha256 {state.sha256[:12]}"
    )
    return file


def naming_of(tensors: Mapping[str, Tensor], state: State) -> Naming:
    """By the name of the first tensor."""
    for naming in NAMINGS:
        if naming.keys_of("stages.0.embed.proj.weight")[0] in tensors:
            return naming
    kind = "the best.pt of another network" if state.best else "no SegFormer by its names"
    raise UserError(
        f"{state.path} is {kind}: give a best.pt of a SegFormer, or a file of transformers, "
        "of the authors or of timm's pvt_v2"
    )


def check_size(file: WeightFile, size: str, ratios: list[int]) -> None:
    """Raises UserError unless the file has the blocks, channels and ratios of the config."""
    depths = []
    dims = []
    ratios_of_file = []
    for i in STAGES:
        blocks = f"stages.{i}.blocks"
        dims.append(len(file.named(f"stages.{i}.embed.proj.weight")))
        hidden = len(file.named(f"{blocks}.0.mlp.fc1.weight"))
        ratios_of_file.append(hidden // dims[i])
        depth = 1
        while file.naming.keys_of(f"{blocks}.{depth}.norm1.weight")[0] in file.tensors:
            depth += 1
        depths.append(depth)

    found = [name for name, sizes in SIZES.items() if sizes[:2] == (tuple(depths), tuple(dims))]
    if not found:
        raise UserError(
            f"{file.path} has {depths} blocks of {dims} channels, so it is no SegFormer b0 to b5: "
            "name another file"
        )
    if found != [size]:
        raise UserError(
            f"{file.path} is a {found[0]}, the config says {size}: "
            "change `size`, or name another file"
        )
    if ratios_of_file != ratios:
        raise UserError(
            f"{file.path} has MLPs of the ratios {ratios_of_file}, the config says {ratios}: "
            "change `ratios`, or name another file"
        )


def checked(names: Any, rows: int) -> list[str] | None:
    """The names, if they are texts, one a row."""
    are_texts = type(names) is list and all(type(name) is str for name in names)
    return names if are_texts and rows and len(names) == rows else None


def names_beside(file: WeightFile) -> list[str] | None:
    """Those in a config.json of transformers in the same folder; None where it has none that
    mean anything.
    """
    config = file.path.with_name("config.json")
    if file.naming is OURS or not config.is_file():
        return None
    with refusals(config):
        name_of = json.loads(config.read_bytes()).get("id2label", {})
        names = [name_of.get(str(row)) for row in range(file.rows)]
    if all(re.fullmatch(r"LABEL_\d+", str(name)) for name in names):
        return None
    return checked(names, file.rows)


def kept_names(file: WeightFile) -> list[str]:
    """For `classes: keep`. Raises UserError where the file has no classes, or no names."""
    if not file.rows:
        raise UserError(f"{file.path} is an encoder without classes to keep: leave out `classes`")
    if not file.names:
        raise UserError(nameless(file))
    return file.names


# --- fitting


def fit(
    file: WeightFile, fresh: Mapping[str, Tensor], names: list[str]
) -> tuple[dict[str, Tensor], list[str]]:
    """-> the complete state_dict of a network with these names, and those of its classes of
    which the file has no row.

    fresh: as initialised, of the size and ratios for which the file was read. Prints a line
    where a row stays so. Raises UserError where something is missing, left over or of
    another shape.
    """
    row_of = rows_carried_over(file, names)
    state = dict(fresh)
    used = set()
    lacking = []
    misfits = []
    for key, initial in fresh.items():
        if not file.rows and not key.startswith("stages."):
            continue
        theirs = file.naming.keys_of(key)
        used |= set(theirs)
        absent = [name for name in theirs if name not in file.tensors]
        if absent:
            lacking += [] if key.endswith("num_batches_tracked") else absent
            continue

        pieces = [file.tensors[name] for name in theirs]
        if not fitting(pieces, initial.shape, file.rows if key in CLASS_ROWS else None):
            misfits += theirs
        elif key in CLASS_ROWS:
            state[key] = initial.clone()
            state[key][list(row_of)] = pieces[0][list(row_of.values())]
        else:
            state[key] = torch.cat(pieces) if len(pieces) > 1 else pieces[0]

    left = [key for key in file.tensors.keys() - used if not re.match(file.naming.ignored, key)]
    refuse_if_any(lacking, "lacks", file.path)
    refuse_if_any(left, "has unknown", file.path)
    refuse_if_any(misfits, "has other shapes in", file.path)
    return state, [name for row, name in enumerate(names) if row not in row_of]


def fitting(pieces: Sequence[Tensor], shape: Sequence[int], rows: int | None) -> bool:
    """Whether the pieces, all of one size, make a tensor of this shape, or of so many rows."""
    whole = [rows or shape[0], *shape[1:]] if shape else []
    piece = [whole[0] // len(pieces), *whole[1:]] if whole else []
    return all(list(tensor.shape) == piece for tensor in pieces)


def rows_carried_over(file: WeightFile, names: list[str]) -> dict[int, int]:
    """Row of the class head -> row in the file; the others stay as initialised.

    Raises UserError where that is for the config to decide.
    """
    if not file.rows:
        print(f"{file.path.name}: an encoder only, so decoder and classes begin as initialised")
        return {}
    if file.names is None:
        if file.classes != "by_name":
            raise UserError(nameless(file))
        print(
            f"{file.path.name}: names none of its {file.rows} classes, so all begin as initialised"
        )
        return {}
    if file.classes != "by_name" and file.names != names:
        raise UserError(
            f"{file.path}: {difference(file.names, names, 'the file', 'the data')}: "
            "give `classes: by_name` to carry over those that both have, or, for a teacher, "
            "`classes: keep` to keep those of the file"
        )

    row_of = source_rows(file.names, names)
    new = [name for row, name in enumerate(names) if row not in row_of]
    if file.names != names:
        print(
            f"{file.path.name}: {len(row_of)} of {file.rows} classes carried over by name; "
            f"new: {listed(new)}"
        )
    return row_of


def nameless(file: WeightFile) -> str:
    return (
        f"{file.path} names none of its {file.rows} classes: put its config.json beside it, "
        "give `weights: {path: ..., names: [...]}`, or `classes: by_name` to begin them anew"
    )


def refuse_if_any(keys: Iterable[str], fault: str, path: Path) -> None:
    if keys := sorted(keys):
        more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
        raise UserError(
            f"{path} {fault} {', '.join(map(quoted, keys[:3]))}{more}, "
            "so it is no SegFormer of this size: name another file"
        )
