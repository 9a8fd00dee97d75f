"""What a resumed run may have otherwise than when it began."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdmini import checkpoint, config, distributed
from kdmini.commands import command
from kdmini.contracts import UserError
from kdmini.defaults import defaults, filled
from kdmini.inputs import differences, in_few_words
from kdmini.progress import Progress, implausible

# these may change, and the run still comes out bit for bit as if it had never stopped; `root`
# of a set too, and of `log` every setting
FREE = {
    "run",
    "log",
    "timeout",
    "allow_void",
    "allow_changed",
    "data.workers",
    "data.storage",
    "train.save_every",
}
# these measure, and change nothing that is learned; of `metric` every setting
MEASURING = {"metric", "train.val_every", "train.patience"}
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
    fault = fault or implausible(saved["progress"])
    if fault:
        raise UserError(f"{path} is no checkpoint of a run: {fault}; delete it")

    before = filled(saved["config"], defaults(settings))
    now = with_processes(settings)
    changes = config.changed(before, now)
    exact = {key for key in changes if key in FREE or key.split(".")[-1] == "root"}
    exact |= {key for key in changes if key.split(".")[0] == "log"}
    measuring = {key for key in changes if key in MEASURING or key.split(".")[0] == "metric"}
    inexact = INEXACT | ({"train.epochs"} if epochs_of(now) > epochs_of(before) > 0 else set())
    refused = [changes[key] for key in changes if key not in exact | measuring | inexact]
    if refused:
        raise UserError(f"{path}: {'; '.join(refused[:LISTED])}: {ways_out(path)}")
    for key, change in changes.items():
        if key == "run":
            continue
        more = "" if key in exact else "; not bit for bit what the run would have been"
        if key in measuring:
            more = "; what is learned stays the same"
        if key == "train.epochs":
            more = f"; it goes on as a run of {epochs_of(now)} epochs: learning rate, mosaic"
        print(f"warning: {change}{more}")
    if any(key.split(".")[0] == "metric" for key in changes):
        seek_anew(saved["progress"])


def epochs_of(settings: Mapping[str, Any]) -> int:
    """0 where they are not stated, or no number."""
    train = settings.get("train")
    epochs = train.get("epochs") if isinstance(train, Mapping) else None
    return epochs if isinstance(epochs, int) else 0


def ways_out(path: Path) -> str:
    """What to do about a change that is refused. path: of the checkpoint."""
    run = path.parent.parent
    best = run / "best.pt"
    ways = "set it back, or begin another run"
    if not best.exists():
        return ways
    words = ["--config", run / "config.yaml", f"run={run}-2", f"student.weights={best}"]
    call = f"{command('train')} {shlex.join(map(str, words))}"
    return f"{ways} from what this one has learned: {call} and the change"


def seek_anew(progress: dict[str, Any]) -> None:
    """Forgets the best score, which another metric gave. progress: of a checkpoint."""
    fresh = Progress()
    progress["best"] = fresh.best
    progress["best_epoch"] = progress["epoch"]
    print("the best score is sought anew, as the metric is another; best.pt stays until then")


def check_inputs(
    path: Path, saved: dict[str, Any], inputs: Mapping[str, str], allowed: bool
) -> None:
    """Raises UserError where what the run reads is not what it read when the checkpoint was
    written; warns instead where that is allowed. Takes that record out of `saved`.
    """
    was = saved.pop("inputs", None)
    if not isinstance(was, dict) or not all(type(text) is str for text in [*was, *was.values()]):
        raise UserError(f"{path} lacks 'inputs', a record of what the run has read; delete it")
    changes = differences(was, inputs)
    if not changes:
        return
    if not allowed:
        raise UserError(
            f"{path}: {in_few_words(changes)}: restore what the run was begun with, or go on "
            "all the same with allow_changed=true"
        )
    print(f"warning: {in_few_words(changes)}; not what the run would have been")


def run_of(path: str) -> str:
    """The folder of the run that --resume names, by itself or by a file in it."""
    named = Path(path)
    folder = named
    if named.is_file() or named.suffix in (".pt", ".yaml"):
        folder = named.parent
    if folder.name == "ckpt" and not (folder / "config.yaml").exists():
        folder = folder.parent
    if folder == named:
        return path
    print(f"{path}: its run is {folder}, which goes on from its newest checkpoint")
    return str(folder)
