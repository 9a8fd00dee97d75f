"""Where a run stands, in numbers and in words, and the tally of its losses."""

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from textwrap import wrap
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.amp import GradScaler

from kdmini import distributed
from kdmini.contracts import Losses, UserError
from kdmini.signals import Stop
from kdmini.typed import short

# steps between two looks at the device's numbers; in between, nothing waits for it
READ_EVERY = 10
# updates in a row without a finite gradient before the run stops
MAX_SKIPPED = 20
COLUMNS = 80  # of a terminal
INDENT = "    "
MOST_STEPS = 2**53  # no run is as long; beyond, a float holds no count

SKIPPED = "skipped"  # beside the names of the losses: 1.0 where an update was left out


@dataclass
class Progress:
    """Where a run stands; plain numbers, saved with every checkpoint."""

    epoch: int = 0  # epochs done
    step: int = 0  # batches done of the epoch in hand
    best: float = -math.inf
    best_epoch: int = 0
    skipped_in_a_row: int = 0  # updates without a finite gradient, until now
    # of the epoch in hand
    sums: dict[str, float] = field(default_factory=dict)  # of each loss, where finite
    counts: dict[str, int] = field(default_factory=dict)
    skipped: int = 0  # updates without a finite gradient
    seconds: float = 0.0

    def means(self) -> dict[str, float]:
        return {name: total / self.counts[name] for name, total in self.sums.items()}

    def next_epoch(self) -> None:
        self.epoch += 1
        self.step = 0
        self.sums = {}
        self.counts = {}
        self.skipped = 0
        self.seconds = 0.0

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


def implausible(state: Mapping[str, Any]) -> str:
    """The first number of a saved Progress that no run has, in words; empty where there is
    none. The state has the form of a Progress.
    """
    saved = Progress(**state)
    counts = {**vars(saved), **saved.counts}
    names = ("epoch", "step", "best_epoch", "skipped_in_a_row", "skipped", *saved.counts)
    for name in names:
        if type(counts[name]) is not int or not 0 <= counts[name] < MOST_STEPS:
            return f"{short(name)} is {short(counts[name])}"
    for name, total in saved.sums.items():
        if type(total) is not float or not math.isfinite(total) or not saved.counts.get(name):
            return f"the sum of {short(name)} is {short(total)}"
    if math.isnan(saved.best) or saved.best_epoch > saved.epoch:
        return f"best is {saved.best} of epoch {saved.best_epoch}"
    if not 0 <= saved.seconds < math.inf or (saved.step and not saved.seconds):
        return f"seconds is {saved.seconds}"
    return ""


def text_of_epoch(record: dict[str, Any], progress: Progress) -> str:
    """Losses and their lambdas; below, where it was evaluated, scores and attention distance.

    For a terminal of 80 columns. What the distance is at each tap is in results.csv.
    """
    trained = f"epoch {progress.epoch + 1}: {of_group(record, 'loss/', '.3f')}"
    lambdas = of_group(record, "lambda/", ".3g")
    if lambdas:
        trained += f" | lambda {lambdas}"
    if progress.skipped:
        trained += f" | skipped {progress.skipped}"

    evaluated = of_group(record, "score/", ".3f")
    is_best = progress.best_epoch == progress.epoch and not math.isinf(progress.best)
    if "distance/raw" in record:
        evaluated += f" distance/raw {record['distance/raw']:.3f}"
    if "distance/rolled" in record:
        evaluated += f" rolled {record['distance/rolled']:.3f}"
    if evaluated and is_best:
        evaluated += " best"

    lines = wrap(trained, COLUMNS, subsequent_indent=INDENT)
    lines += wrap(evaluated, COLUMNS, initial_indent=INDENT, subsequent_indent=INDENT)
    return "\n".join(lines)


def of_group(record: dict[str, Any], group: str, form: str) -> str:
    """Names and numbers of those keys of a record that begin with `group`."""
    return " ".join(
        f"{name.removeprefix(group)} {value:{form}}"
        for name, value in record.items()
        if name.startswith(group)
    )


class Waiting(NamedTuple):
    """A number that is still on the device."""

    name: str
    value: Tensor  # scalar
    ids: list[str]  # of the images of its batch


class Tally:
    """Adds the losses to `progress`. Numbers wait on the device until `read` copies them all
    at once.
    """

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.waiting: list[Waiting] = []
        # what was not finite since the last good update -> ids of the last such batch
        self.broken: dict[str, list[str]] = {}
        self.last_read = time.perf_counter()

    def add(self, losses: Losses, skipped: Tensor | None, ids: list[str]) -> None:
        """losses: name -> scalar; skipped: 1.0 where the update was left out, 0.0 where it
        was made, None where there was none.
        """
        numbers = dict(losses)
        if skipped is not None:
            numbers[SKIPPED] = skipped
        for name, value in numbers.items():
            self.waiting.append(Waiting(name, value.detach().float(), ids))

    def read(self, scaler: GradScaler, stop: Stop) -> str:
        """-> means so far, of the finite values and over the ranks, in words. Tells all ranks
        of a stop signal.

        Raises UserError when MAX_SKIPPED updates in a row were left out, or when fp16 cannot
        go on.
        """
        numbers = torch.stack([waiting.value for waiting in self.waiting])
        values = (distributed.total(numbers) / distributed.world()).tolist()
        stop.agreed = distributed.largest(stop.signum, numbers.device)
        for waiting, value in zip(self.waiting, values, strict=True):
            self._count(waiting, value)
        self.waiting = []

        now = time.perf_counter()
        self.progress.seconds += now - self.last_read
        self.last_read = now

        self._refuse_to_go_on(scaler)
        text = " ".join(f"{name} {value:.3g}" for name, value in self.progress.means().items())
        if self.progress.skipped:
            text += f" | skipped {self.progress.skipped}"
        return text

    def _count(self, waiting: Waiting, value: float) -> None:
        progress = self.progress
        name = waiting.name
        if name != SKIPPED:
            if math.isfinite(value):
                progress.sums[name] = progress.sums.get(name, 0.0) + value
                progress.counts[name] = progress.counts.get(name, 0) + 1
            else:
                self.broken[name] = waiting.ids
        elif value:
            progress.skipped += 1
            progress.skipped_in_a_row += 1
        else:
            progress.skipped_in_a_row = 0
            self.broken = {}

    def _refuse_to_go_on(self, scaler: GradScaler) -> None:
        faults = [
            f"{name} not finite, last on {', '.join(ids)}" for name, ids in self.broken.items()
        ]
        cause = "; ".join(faults) or "all losses finite"
        in_a_row = self.progress.skipped_in_a_row
        if in_a_row >= MAX_SKIPPED:
            raise UserError(
                f"{in_a_row} updates in a row had no finite gradient ({cause}): "
                "lower train.lr0, or train.amp=false"
            )
        if scaler.is_enabled() and scaler.get_scale() < 1:
            raise UserError(
                f"the scale of the fp16 gradients fell below 1 ({cause}): "
                "use train.amp=bf16 or false"
            )
