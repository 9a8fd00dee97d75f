"""What a resumed run may have otherwise than when it began."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdmini import checkpoint, config, distributed
from kdmini.contracts import UserError
from kdmini.progress import Progress

# these may change, and the run still comes out bit for bit as if it had never stopped; `root`
# of a set too
FREE = {
    "run",
    "timeout",
    "data.workers",
    "data.storage",
    "train.save_every",
    "train.val_every",
    "train.patience",
}
# these may change, though then it is not bit for bit what it would have been
INEXACT = {"device", "compile", "deterministic", "processes"}

LISTED = 5  # changes named in one message


def with_processes(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The config as a checkpoint keeps it: with the number of ranks."""
    return {**settings, "processes": distributed.world()}


def check_resumable(path: Path, saved: dict[str, Any], settings: dict[str, Any]) -> None:
    """Raises UserError where the config has changed since in a way that changes what is
    computed; warns of other changes.
    """
    fresh = {"config": {}, "progress": Progress().state_dict()}
    fault = checkpoint.misfit(fresh, {key: saved[key] for key in fresh if key in saved})
    if fault:
        raise UserError(f"{path} is no checkpoint of a run: {fault}; delete it")

    changes = config.changed(saved["config"], with_processes(settings))
    exact = {key for key in changes if key in FREE or key.split(".")[-1] == "root"}
    refused = [changes[key] for key in changes if key not in exact | INEXACT]
    if refused:
        raise UserError(f"{path}: {'; '.join(refused[:LISTED])}: set it back, or begin another run")
    for key, change in changes.items():
        if key == "run":
            continue
        more = "" if key in exact else "; not bit for bit what the run would have been"
        print(f"warning: {change}{more}")
