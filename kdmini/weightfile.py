"""Weight files of any network: where they are, what they hold, whether they fit."""

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdmini import checkpoint
from kdmini.contracts import UserError
from kdmini.files import check_kind
from kdmini.typed import short

# what kdmini.tools.download has to offer
PUBLIC = ("yolo11n.pt", "yolo11s.pt", "yolo11m.pt")


def find(path: str | Path) -> Path:
    """Where a weight file is.

    A name without a folder is also looked for in ./weights and in the cache
    (KDMINI_CACHE, else ~/.cache/kdmini). Raises UserError.
    """
    wanted = Path(path).expanduser()
    if wanted.is_dir():
        raise UserError(
            f"weights {str(path)!r} is a folder: name a file in it (an exported model is not "
            "read, name the .pt file it was exported from)"
        )
    check_kind(wanted)

    candidates = [wanted]
    if wanted.name == str(wanted):
        cache = Path(os.environ.get("KDMINI_CACHE") or "~/.cache/kdmini").expanduser()
        candidates += [Path("weights") / wanted, cache / wanted]
    for candidate in candidates:
        if candidate.is_file():
            return candidate

    looked_in = ", ".join(map(str, candidates))
    option = f" --weights {wanted}" if str(wanted) in PUBLIC else ""
    raise UserError(
        f"weights {str(path)!r} are not there ({looked_in}): name a file that exists, "
        f"or fetch the public ones with `python -m kdmini.tools.download{option}`"
    )


def read(path: str) -> dict[str, Any]:
    """The content of a best.pt or of a file of torchvision's. Nothing in it is run.

    Some of torchvision's are from before torch.save wrote zips. Raises UserError.
    """
    check_kind(path)
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; nothing is downloaded, name one that is here")
    if zipfile.is_zipfile(path):
        return checkpoint.load(Path(path))
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # whatever strange bytes lead torch to
        raise UserError(
            f"{path} is no file of weights ({type(error).__name__}); nothing in it was run"
        ) from error


def trained_tensors(path: str, names: list[str], card: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of a best.pt.

    Raises UserError unless it is of the network of this card, with these classes.
    """
    content = read(path)
    if not {"card", "names", "model"} <= content.keys():
        raise UserError(
            f"{path} is no best.pt of kdmini: "
            "name one, or give a file of torchvision as backbone_weights"
        )
    # misfit first, for a tensor in the place of a number has no single answer to `!=`
    if checkpoint.misfit(card, content["card"]) or content["card"] != card:
        raise UserError(
            f"{path} is of {short(content['card'])}, the config says {card}: change one of them"
        )
    if checkpoint.misfit(names, content["names"]) or content["names"] != names:
        raise UserError(
            f"{path} has the classes {short(content['names'])}, "
            f"the data {short(names)}: name one trained on these"
        )
    return content["model"]


def fill(module: nn.Module, tensors: Mapping[str, Tensor], path: str) -> None:
    """load_state_dict of tensors that were read from `path`; a counter may be missing.

    Raises UserError where another tensor is missing, left over or of another shape.
    """
    fresh = dict(module.state_dict())
    counters = [key for key in fresh if key.endswith("num_batches_tracked")]
    state = {key: fresh[key] for key in counters}
    if not isinstance(tensors, Mapping):
        raise UserError(f"{path} holds {short(tensors)} for tensors; name a file of weights")
    for key, value in tensors.items():
        if isinstance(value, Tensor):
            state[key] = value.detach()
    if fault := checkpoint.misfit(fresh, state):
        raise UserError(f"{path} does not fit ({fault}); name a file of the same network")
    module.load_state_dict(state)
