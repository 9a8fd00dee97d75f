"""Training and evaluation from Python. Paths are those of the folder of whoever calls.

import kdmini

run = kdmini.train("mine/config.yaml", device="cpu", **{"train.epochs": 30})
scored = kdmini.evaluate(run / "config.yaml", run / "best.pt")
print(scored["student"].scores["AP50-95"])
"""

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdmini import config as configs
from kdmini import memory
from kdmini.resume import run_of
from kdmini.signals import SIGNALS
from kdmini.tools import eval as eval_script
from kdmini.tools import train as train_script
from kdmini.tools.eval import Scored

Config = str | Path | Mapping[str, Any]
INTERRUPTED = 128 + signal.SIGINT


def train(config: Config, resume: bool = False, **overrides: Any) -> Path:
    """What `train.py --config` does -> the run folder.

    config: a YAML file, or what such a file holds; to resume, the run folder. overrides: key
    paths and values, as on the command line: `seed=1, **{"train.epochs": 3}`.

    Raises UserError, and KeyboardInterrupt once a step that Ctrl-C interrupted is saved.
    """
    folder = run_of(str(config)) if resume else ""
    settings, source = settings_of(Path(folder) / "config.yaml" if folder else config, overrides)
    if folder:
        settings["run"] = folder
    handlers = {signum: signal.getsignal(signum) for signum in SIGNALS}
    try:
        with memory.bounded(memory.remedy_of(settings)):
            train_script.train(settings, source, resume)
        return Path(settings["run"])
    except SystemExit as left:
        if left.code != INTERRUPTED:
            raise
    # the program that was to end goes on; raised here, for the frames of the run hold its lock
    for signum, handler in handlers.items():
        signal.signal(signum, handler)
    raise KeyboardInterrupt


def evaluate(
    config: Config,
    weights: str | Path | None = None,
    with_teacher: bool = False,
    **overrides: Any,
) -> dict[str, Scored]:
    """What `eval.py` does -> by `student`, and `teacher` if asked for: `scores`, `metric` with
    those of the classes in `per_class()`, and `cost` in words.

    weights: a file for the student, in place of the config's. overrides: as of `train`.
    Raises UserError.
    """
    settings, source = settings_of(config, overrides)
    file = str(weights) if weights else None
    with memory.bounded(memory.remedy_of(settings)):
        scored = eval_script.evaluate(settings, source, file, with_teacher)
    return {one.name: one for one in scored}


def settings_of(config: Config, overrides: Mapping[str, Any]) -> tuple[dict[Any, Any], str]:
    """-> the config with the overrides in it, and where it is from, for messages."""
    source = "config" if isinstance(config, Mapping) else str(config)
    settings = dict(config) if isinstance(config, Mapping) else configs.load(config)
    for key, value in overrides.items():
        plain = os.fspath(value) if isinstance(value, os.PathLike) else value
        settings = configs.replaced(settings, key.split("."), plain, f"override `{key}`")
    return settings, source
