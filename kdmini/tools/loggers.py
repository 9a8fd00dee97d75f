"""Where the records of a run can go besides metrics.jsonl, by the key `log` of a config.

log: {build: kdmini.tools.loggers:TensorBoard}

A logger is called with each record, a mapping of metrics.jsonl's keys, when that is written;
on resume with the new ones alone. What it needs is imported when it is built, and its files
begin with its first record. A table is there without one: results.csv.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from kdmini import config
from kdmini.contracts import UserError


class TensorBoard:
    """Event files that grow with the run: `tensorboard --logdir RUN`.

    A tag is the key in metrics.jsonl, and the step is the epoch as train.py prints it: 0 is
    before training. What a resumed run goes through again takes the place of what was there.
    """

    def __init__(self, run: str):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise missing("tensorboard", "pip install tensorboard") from None
        self.open = SummaryWriter
        self.folder = Path(run) / "events"
        self.writer: Any = None

    def __call__(self, record: Mapping[str, Any]) -> None:
        if self.writer is None:
            self.writer = self.open(str(self.folder), purge_step=step_of(record))
        for key, value in scalars(record).items():
            self.writer.add_scalar(key, value, step_of(record))
        self.writer.flush()


class WandB:
    """A run of Weights & Biases, with the config of the run.

    project: it belongs to.
    name: of the run there; null for that of the run folder.
    mode: offline writes into the run folder alone, for `wandb sync`; online opens connections,
        to the account that `wandb login` has set.
    """

    def __init__(
        self,
        run: str,
        project: str = "kdmini",
        name: str | None = None,
        mode: Literal["online", "offline"] = "offline",
    ):
        try:
            import wandb
        except ImportError:
            raise missing("wandb", "pip install wandb") from None
        self.wandb = wandb
        self.folder = Path(run)
        self.project = project
        self.name = name or self.folder.absolute().name
        self.mode = mode
        self.run: Any = None

    def __call__(self, record: Mapping[str, Any]) -> None:
        if self.run is None:
            self.run = self.begun()
        self.run.log(scalars(record), step=step_of(record))

    def begun(self) -> Any:
        """Of a run that is resumed, the same one there."""
        known = self.folder / "wandb" / "id.txt"
        run = self.wandb.init(
            project=self.project,
            name=self.name,
            mode=self.mode,
            dir=str(self.folder),
            id=known.read_text() if known.exists() else None,
            resume="allow",
            reinit="finish_previous",  # of this process, as in a sweep
            config=config.load(self.folder / "config.yaml"),
            settings=self.wandb.Settings(console="off"),
        )
        known.write_text(run.id)
        return run


def missing(package: str, remedy: str) -> UserError:
    return UserError(f"log: {package} is not installed; {remedy}, or take the logger out")


def step_of(record: Mapping[str, Any]) -> int:
    return int(record["epoch"]) + 1


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """All numbers of a record but its epoch."""
    numbers = {}
    for key, value in record.items():
        if key != "epoch":
            numbers[key] = float(value)
    return numbers
