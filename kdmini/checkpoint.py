"""Checkpoints: saved whole or not at all, verified when read, exact when resumed.

A checkpoint is a plain dict of tensors, numbers, strings, lists and dicts, read with `weights_only=True`.
"""

import os
import re
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from kdmini.contracts import UserError

KEEP = 2  # newest checkpoints kept: one may turn out to be damaged


class Stateful(Protocol):
    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


def save_atomic(content: Any, path: Path) -> None:
    """torch.save into a temporary file beside `path`, flushed to the disk, verified, and renamed."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        verify(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        disk = next(folder for folder in path.absolute().parents if folder.exists())
        raise UserError(
            f"cannot save {path} ({error}); {shutil.disk_usage(disk).free / 1e6:.0f} MB are free"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)  # so that the new name survives a power loss too
    os.close(folder)


def verify(path: Path) -> None:
    """Raises UserError unless every byte of the file matches its checksum, which torch.load does not look at."""
    try:
        with zipfile.ZipFile(path) as archive:
            folders = [file.filename for file in archive.infolist() if file.external_attr & 0x10]
            damaged = archive.testzip() or "".join(folders[:1])  # of a folder torch would leave memory as it finds it
    except Exception as error:  # one flipped byte makes zipfile raise OSError, NotImplementedError, zlib.error, ...
        raise UserError(f"{path} is not a readable checkpoint ({error})") from error
    if damaged:
        raise UserError(f"{path} is damaged, {damaged} in it is not as it was written")


def load(path: Path) -> dict[str, Any]:
    """A verified checkpoint, on the CPU. Raises UserError; runs no code of the file."""
    verify(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a strange pickle leads torch to, UnpicklingError being the least of it
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"{path} is not a kdmini checkpoint ({reason})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a kdmini checkpoint (it holds a {type(content).__name__})")
    return content


def save(folder: Path, step: int, parts: Mapping[str, Stateful], config: str) -> None:
    """Writes folder/step_NNNNNNNN.pt with the state of every part, the random numbers and the config's text."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {name: part.state_dict() for name, part in parts.items()}
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    save_atomic({**content, "rng": torch.get_rng_state(), "cuda_rng": cuda, "config": config}, numbered(folder, step))
    for old in existing(folder)[:-KEEP]:
        old.unlink()


def resume(folder: Path, parts: Mapping[str, Stateful], config: str) -> Path:
    """Restores every part from the newest checkpoint that verifies, in place -> its path.

    Raises UserError when there is none, when it belongs to another config, or when a part is missing.
    """
    for path in reversed(existing(folder)):
        try:
            content = load(path)
        except UserError as error:
            print(f"skipped: {error}")
            continue
        if content.get("config") != config:
            raise UserError(f"{path} was saved under another config than {folder.parent / 'config.yaml'}")
        missing = [name for name in (*parts, "rng", "cuda_rng") if name not in content]
        if missing:
            raise UserError(f"{path} lacks {', '.join(missing)}")
        for name, part in parts.items():
            part.load_state_dict(content[name])
        torch.set_rng_state(content["rng"])
        if content["cuda_rng"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(content["cuda_rng"])
        return path
    raise UserError(f"{folder} holds no checkpoint to resume from; delete {folder.parent} and start again")


def numbered(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08d}.pt"


def existing(folder: Path) -> list[Path]:
    """Checkpoints of the folder, oldest first; temporary files are none."""
    return sorted(path for path in folder.glob("step_*.pt") if re.fullmatch(r"step_\d{8}\.pt", path.name))
