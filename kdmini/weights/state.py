"""A weight file of any network: its tensors, and what it says beside them."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_type_hints

from torch import Tensor

from kdmini.contracts import UserError
from kdmini.typed import fit, nearest
from kdmini.weightfile import find
from kdmini.weights.archive import Refused, content_of, refusals, unzip
from kdmini.weights.pickled import interpret, refuse_names
from kdmini.weights.safetensors import is_safetensors, read_safetensors
from kdmini.weights.tensors import (
    Storages,
    check_finite,
    entries_of,
    is_state_dict,
    tensors_of,
)

Source = TypeVar("Source")


class State(NamedTuple):
    """What has been read from a file."""

    path: Path
    sha256: str
    tensors: dict[str, Tensor]  # float32, counters int64; finite
    best: dict[str, Any]  # all else in a best.pt of kdmini, unchecked; empty of other files


def source_of(weights: str | Mapping[str, Any], kind: type[Source]) -> Source:
    """The `weights` of a config as a dataclass, whose first field is `path`.

    Raises UserError for a setting that is none.
    """
    given = {"path": weights} if isinstance(weights, str) else dict(weights)
    kinds = get_type_hints(kind)
    for key, value in given.items():
        if key not in kinds:
            raise UserError(f"weights: unknown key `{key}`; {nearest(key, kinds)}")
        given[key] = fit(value, kinds[key], f"weights: {key}")
    if "path" not in given:
        raise UserError("weights: no `path`; name a file")
    return kind(**given)


def read_state(path: str | Path) -> State:
    """Finds and reads a best.pt, a state_dict, by itself or under `state_dict`, or a
    safetensors file. Nothing in it is run. Raises UserError.
    """
    found = find(path)
    with refusals(found):
        data = content_of(found)
        best: dict[str, Any] = {}
        if is_safetensors(data):
            tensors = read_safetensors(data).state
        else:
            tensors, best = unpacked(data)
        check_finite(tensors)
    return State(found, hashlib.sha256(data).hexdigest(), tensors, best)


def unpacked(data: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """-> the tensors of a .pt file, and what stands beside them in a best.pt."""
    entries = unzip(data)
    storages = Storages(entries)
    pickled = interpret(entries["data.pkl"])
    value = entries_of(pickled.value)
    if value.get("format") == "kdmini":
        refuse_names(pickled.names)
        return tensors_of(value["model"], storages), value

    for candidate in (entries_of(value.get("state_dict")), value):
        if is_state_dict(candidate):
            return tensors_of(candidate, storages), {}
    raise Refused("holds no tensors by name: give a best.pt, or the state_dict of a network")
