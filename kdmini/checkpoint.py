"""Checkpoints: saved whole or not at all, verified when read, exact when resumed.

A checkpoint is a plain dict of tensors, numbers, strings, lists and dicts, read with
`weights_only=True`. `best.pt` is written in the same way: the student alone.
"""

import math
import os
import re
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from kdmini.contracts import UserError
from kdmini.files import check_kind
from kdmini.typed import short

KEEP = 2  # newest checkpoints kept: one may turn out to be damaged
LARGEST = 1e30  # of a number in a state; float32, which it may meet, holds it
IS_FOLDER = 0x10  # bit of a zip entry's attributes


class Stateful(Protocol):
    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


def save_atomic(content: Any, path: Path) -> None:
    """torch.save into a temporary file beside `path`, flushed to the disk, verified, and
    renamed.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        verify(temporary)
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)  # so that the new name survives a power loss too
        os.close(folder)
    except (OSError, RuntimeError) as error:
        disk = next(folder for folder in path.absolute().parents if folder.exists())
        free = shutil.disk_usage(disk).free
        raise UserError(
            f"cannot save {path} ({error}): it needs {size_of(content) / 1e6:.1f} MB, "
            f"{free / 1e6:.1f} MB are free; make room and resume"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def size_of(content: Any) -> int:
    """Bytes of all tensors."""
    if isinstance(content, torch.Tensor):
        return content.nbytes
    if isinstance(content, Mapping):
        return sum(map(size_of, content.values()))
    if isinstance(content, list | tuple):
        return sum(map(size_of, content))
    return 0


def verify(path: Path) -> None:
    """Raises UserError unless every byte of the file matches its checksum, which torch.load
    does not look at, and the entries are as torch.save writes them: stored, each by itself,
    so that they take no more memory than the file has bytes.
    """
    check_kind(path)
    try:
        size = path.stat().st_size
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            # of an entry that is a folder torch would leave memory as it finds it
            strange = [e for e in entries if e.compress_type or e.external_attr & IS_FOLDER]
            stored = sum(entry.file_size for entry in entries)
            # packed entries may unfold without end, so they are not looked at
            damaged = strange[0].filename if strange else archive.testzip()
    except Exception as error:  # one flipped byte makes zipfile raise OSError, zlib.error, ...
        raise UserError(f"{path} is not a readable checkpoint ({error})") from error
    if damaged:
        raise UserError(f"{path} is damaged, {short(damaged)} in it is not as it was written")
    if stored > size:
        raise UserError(f"{path} is damaged, it states {stored:,} bytes and has {size:,}")


def load(path: Path) -> dict[str, Any]:
    """A verified checkpoint, on the CPU. Raises UserError; runs no code of the file."""
    verify(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a strange pickle leads torch to more than UnpicklingError
        raise UserError(
            f"{path} is not a kdmini checkpoint ({type(error).__name__}); nothing in it was run"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a kdmini checkpoint (it holds a {type(content).__name__})")
    return content


def save(folder: Path, step: int, parts: Mapping[str, Stateful], config: Mapping[str, Any]) -> None:
    """Writes folder/step_NNNNNNNN.pt: the state of every part, the random numbers, the
    config.
    """
    folder.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {name: part.state_dict() for name, part in parts.items()}
    content["rng"] = torch.get_rng_state()
    content["cuda_rng"] = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    content["config"] = dict(config)
    save_atomic(content, numbered(folder, step))
    for old in [path for path in existing(folder) if path.is_file()][:-KEEP]:
        old.unlink()


def save_best(path: Path, model: Any, imgsz: int, epoch: int, fitness: float) -> None:
    """The student alone: averaged weights in float32 under public keys, and what is needed
    to load them.
    """
    tensors = {
        key: value.float() if value.is_floating_point() else value
        for key, value in model.state_dict().items()
    }
    content = {
        "format": "kdmini",
        "model": tensors,
        "card": dict(getattr(model, "card", {})),
        "names": list(model.names),
        "nc": len(model.names),
        "imgsz": imgsz,
        "epoch": epoch + 1,
        "fitness": fitness,
    }
    save_atomic(content, path)


def newest(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The newest checkpoint that verifies, and its path; those passed over are named.

    Raises UserError where there is none.
    """
    for path in reversed(existing(folder)):
        try:
            return path, load(path)
        except UserError as error:
            print(f"skipped: {error}")
    raise UserError(
        f"{folder} holds no checkpoint to resume from; delete {folder.parent} and start again"
    )


def restore(content: Mapping[str, Any], parts: Mapping[str, Stateful], path: Path) -> None:
    """Puts every part in the state of the checkpoint. Raises UserError where the two do not
    have the same form.
    """
    fresh: dict[str, Any] = {name: part.state_dict() for name, part in parts.items()}
    fresh |= {"rng": torch.get_rng_state(), "cuda_rng": [], "config": {}}
    fault = misfit(fresh, content) or regrouped(fresh, content)
    if fault:
        raise UserError(
            f"{path} is not of this run: {fault}; "
            "resume with the code and the files it was begun with"
        )
    try:
        for name, part in parts.items():
            part.load_state_dict(content[name])
        torch.set_rng_state(content["rng"])
        if torch.cuda.is_available():
            here = content["cuda_rng"][: torch.cuda.device_count()]  # fewer than there were
            torch.cuda.set_rng_state_all(here)
    except Exception as error:  # what has the right form may still be no state of anything
        raise UserError(
            f"{path} is of no run ({short(str(error))}); delete it, and an older one is taken"
        ) from error


def misfit(fresh: Any, saved: Any, where: str = "") -> str:
    """The first thing that only one of the two has, or has in another form, in words; empty
    if there is nothing.

    For load_state_dict is not always strict: an optimiser would go on without the momentum
    that is missing.
    """
    if isinstance(fresh, list | tuple) and type(saved) is type(fresh):
        fresh = dict(enumerate(fresh))
        saved = dict(enumerate(saved))
    if type(fresh) is not type(saved):
        return f"{where} is a {type(saved).__name__} and not a {type(fresh).__name__}"
    if isinstance(fresh, torch.Tensor):
        if (saved.shape, saved.dtype) != (fresh.shape, fresh.dtype):
            return f"{where} is not a {fresh.dtype} of shape {list(fresh.shape)}"
        return ""
    if type(fresh) in (int, float) and LARGEST <= abs(saved) < math.inf:
        return f"{where} is {short(saved)}"
    if not isinstance(fresh, dict):
        return ""

    missing = [key for key in fresh if key not in saved]
    if missing:
        return f"{where} lacks {short(missing[0])}".lstrip()
    more = [key for key in saved if key not in fresh]
    if fresh and more:  # an empty dict may have become fuller
        return f"{where} has {short(more[0])} too".lstrip()
    for key in fresh:
        fault = misfit(fresh[key], saved[key], f"{where}.{key}".lstrip("."))
        if fault:
            return fault
    return ""


def regrouped(fresh: Mapping[str, Any], saved: Mapping[str, Any]) -> str:
    """The first setting of an optimiser that is of other parameters, of another kind, or no
    number to compute with, in words; empty where there is none. The two have the same form.

    An optimiser finds momentum by the numbers of the parameters, the loop a learning rate
    by the name of the group. Numbers may have changed in training.
    """
    for name, state in fresh.items():
        groups = state.get("param_groups", []) if isinstance(state, dict) else []
        for number, group in enumerate(groups):
            of_file = saved[name]["param_groups"][number]
            for key, value in group.items():
                numbers = value if isinstance(value, tuple) else (value,)
                of_numbers = of_file[key] if isinstance(value, tuple) else (of_file[key],)
                if all(isinstance(one, float) or type(one) is int for one in numbers):
                    fits = all(abs(one) < LARGEST for one in of_numbers)
                else:
                    fits = of_file[key] == value
                if not fits and not isinstance(value, torch.Tensor):
                    return f"{name}.param_groups.{number}.{key} is {short(of_file[key])}"
    return ""


def numbered(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08d}.pt"


def existing(folder: Path) -> list[Path]:
    """Checkpoints of the folder, oldest first; temporary files are none."""
    paths = folder.glob("step_*.pt")
    return sorted(path for path in paths if re.fullmatch(r"step_\d{8}\.pt", path.name))
