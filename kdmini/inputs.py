"""What a run reads, in a few letters a piece: classes, images, ground truth, the teacher, the
code of the networks and terms.

A checkpoint keeps this record. So a resumed run can name what has changed since it began,
and several ranks what one of them sees otherwise.
"""

import hashlib
import inspect
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdmini import distributed
from kdmini.contracts import UserError
from kdmini.typed import short

LISTED = 3  # differences named in one message


class Inputs(dict[str, str]):
    """Piece -> what it is: "data.train, image '000012'": "size 320x213, pixels ..., truth ...".

    The order of classes and images is that of the data sets.
    """

    def state_dict(self) -> dict[str, str]:
        return dict(self)

    def add_set(self, where: str, store: Any) -> None:
        """The classes and images of a kdmini.data.store.Store.

        Without the folder, where all images lie in one, for it may be moved.
        """
        for label, name in enumerate(store.names):
            self[f"{where}, class {label}"] = name
        ids = [str(target["id"]) for target in store.targets]
        if len({name.rpartition("/")[0] for name in ids}) == 1:
            ids = [name.rpartition("/")[2] for name in ids]
        for name, code in zip(ids, store.digests, strict=True):
            self[f"{where}, image {name!r}"] = code

    def add_weights(self, where: str, network: Any) -> None:
        self[f"{where}, weights"] = digest([*network.state_dict().values()])[:12]

    def add_code(self, objects: Iterable[Any]) -> None:
        """The files in which the classes of these objects are written, in the order of their
        names. Of what was typed in or is built in there is none.
        """
        kinds = {type(thing).__module__: type(thing) for thing in objects}
        for module, kind in sorted(kinds.items()):
            try:
                source = inspect.getsourcefile(kind)
            except (OSError, TypeError):
                source = None
            if source:
                text = Path(source).read_bytes()
                self[f"code of {module}"] = hashlib.sha256(text).hexdigest()[:12]

    def check_ranks(self) -> None:
        """Raises UserError, in all ranks, where one of them has read something else than rank 0."""
        own = hashlib.sha256(json.dumps(list(self.items())).encode()).hexdigest()
        everybody = distributed.gather(own)
        if len(set(everybody)) == 1:
            return
        first, *others = distributed.gather(dict(self))
        faults = []
        for rank, other in enumerate(others, 1):
            if changes := differences(first, other, "on rank 0", f"on rank {rank}"):
                faults.append(in_few_words(changes))
        raise UserError(
            f"the ranks have not read the same: {'; '.join(faults)}; "
            "give all of them the same files"
        )


def digest(tensors: Sequence[Tensor]) -> str:
    """SHA-256 of the numbers."""
    sha256 = hashlib.sha256()
    for tensor in tensors:
        flat = tensor.detach().cpu().reshape(-1)
        sha256.update(flat.view(torch.uint8).numpy().tobytes())
    return sha256.hexdigest()


def differences(
    was: Mapping[str, str], now: Mapping[str, str], then: str = "was", here: str = "is"
) -> list[str]:
    """What only one of the two has, or has otherwise, a line each. then, here: words for the
    two.
    """
    lines = []
    for piece in dict.fromkeys([*now, *was]):
        name = short(piece)[1:-1]
        if piece not in now:
            lines.append(f"{name} {then} there, {here} not there")
        elif piece not in was:
            lines.append(f"{name} {then} not there, {here} there")
        elif was[piece] != now[piece]:
            old = parts(was[piece], now[piece])
            lines.append(f"{name} {then} {old}, {here} {parts(now[piece], was[piece])}")
    if not lines and list(was) != list(now):
        first = next(piece for piece, other in zip(was, now, strict=True) if piece != other)
        lines.append(f"{short(first)[1:-1]} {then} at another place in the order")
    return lines


def parts(ours: str, other: str) -> str:
    """Of "size ..., pixels ..., truth ..." those that are not the same in both."""
    theirs = other.split(", ")
    mine = [part for part in ours.split(", ") if part not in theirs]
    return short(", ".join(mine) or ours)[1:-1]


def in_few_words(changes: Sequence[str]) -> str:
    more = len(changes) - LISTED
    return "; ".join(changes[:LISTED]) + (f"; and {more:,} more" if more > 0 else "")
