"""Weight files of networks of every task: where they are, and whether they fit."""

import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdmini import checkpoint
from kdmini.contracts import UserError


def read(path: str) -> dict[str, Any]:
    """The content of a file, nothing of which is run: best.pt, or torchvision's, some from before
    zip. Or UserError.
    """
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
    """The tensors of a best.pt. Raises UserError unless it is this detector, with these classes."""
    content = read(path)
    if not {"card", "names", "model"} <= content.keys():
        raise UserError(
            f"{path} is no best.pt of kdmini: name one, or give a file of torchvision as backbone_weights"
        )
    if content["card"] != card:
        raise UserError(
            f"{path} is of {content['card']}, the config says {card}: change one of them"
        )
    if content["names"] != names:
        raise UserError(
            f"{path} has the classes {content['names']}, the data {names}: name one trained on these"
        )
    return content["model"]


def fill(module: nn.Module, tensors: Mapping[str, Tensor], path: str) -> None:
    """load_state_dict, with a UserError of one line where anything is missing, left over or of
    another shape.
    """
    fresh = dict(module.state_dict())
    counters = {
        key: value for key, value in fresh.items() if key.endswith("num_batches_tracked")
    }  # not in old files
    given = counters | {
        key: value.detach() for key, value in tensors.items() if isinstance(value, Tensor)
    }
    if fault := checkpoint.misfit(fresh, given):
        raise UserError(f"{path} does not fit ({fault}); name a file of the same network")
    module.load_state_dict(given)


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
        f"or fetch the public ones with `python -m kdmini.tools.download{name}`"
    )
