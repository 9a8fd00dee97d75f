"""Where a run stands, and the tally of its losses."""

import math
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from kdmini import distributed
from kdmini.contracts import Losses, UserError
from kdmini.signals import Stop

READ_EVERY = 10  # steps between two looks at the device's numbers; in between, nothing waits for it


MAX_SKIPPED = 20  # updates in a row without a finite gradient before the run stops


@dataclass
class Progress:
    """Where a run stands; plain numbers, saved with every checkpoint."""

    epoch: int = 0  # epochs done
    step: int = 0  # batches done of the epoch in hand
    best: float = -math.inf
    best_epoch: int = 0
    skipped: int = 0  # updates without a finite gradient, in a row until now
    # of the epoch in hand
    sums: dict[str, float] = field(default_factory=dict)  # of each loss, where finite
    counts: dict[str, int] = field(default_factory=dict)
    left_out: int = 0  # updates without a finite gradient
    seconds: float = 0.0

    def means(self) -> dict[str, float]:
        return {name: total / self.counts[name] for name, total in self.sums.items()}

    def next_epoch(self) -> None:
        self.epoch, self.step, self.sums, self.counts, self.left_out, self.seconds = (
            self.epoch + 1,
            0,
            {},
            {},
            0,
            0.0,
        )

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


class Tally:
    """Adds the losses to `progress`. Numbers wait on the device until `read` copies them all at
    once.
    """

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.waiting: list[tuple[str, Tensor, list[str]]] = []  # name, scalar, ids of the batch
        self.broken: dict[
            str, list[str]
        ] = {}  # what was not finite since the last good update, ids of the last batch
        self.since = time.perf_counter()

    def add(self, losses: Losses, skipped: Tensor | None, ids: list[str]) -> None:
        """losses: name -> scalar; skipped: 1.0 where the update was left out, None where there was
        none.
        """
        numbers = {**losses, SKIPPED: skipped} if skipped is not None else losses
        self.waiting += [(name, value.detach().float(), ids) for name, value in numbers.items()]

    def read(self, scaler: torch.amp.GradScaler, stop: Stop) -> str:
        """-> means so far, of the finite values and over the ranks, in words. Tells all ranks of a
        stop signal.
        """
        progress = self.progress
        numbers = torch.stack([value for _, value, _ in self.waiting])
        values = (distributed.total(numbers) / distributed.world()).tolist()
        stop.agreed = distributed.largest(stop.signum, numbers.device)
        for (name, _, ids), value in zip(self.waiting, values, strict=True):
            if name == SKIPPED and value:
                progress.left_out, progress.skipped = progress.left_out + 1, progress.skipped + 1
            elif name == SKIPPED:
                progress.skipped, self.broken = 0, {}
            elif math.isfinite(value):
                progress.sums[name] = progress.sums.get(name, 0.0) + value
                progress.counts[name] = progress.counts.get(name, 0) + 1
            else:
                self.broken[name] = ids
        self.waiting = []
        now = time.perf_counter()
        progress.seconds, self.since = progress.seconds + now - self.since, now

        faults = (
            f"{name} not finite, last on {', '.join(ids)}" for name, ids in self.broken.items()
        )
        what = "; ".join(faults) or "all losses finite"
        if progress.skipped >= MAX_SKIPPED:
            remedy = "lower train.lr0, or train.amp=false"
            raise UserError(
                f"{progress.skipped} updates in a row had no finite gradient ({what}): {remedy}"
            )
        if scaler.is_enabled() and scaler.get_scale() < 1:
            raise UserError(
                f"the scale of the fp16 gradients fell below 1 ({what}): use train.amp=bf16 or false"
            )
        shown = " ".join(f"{name} {value:.3f}" for name, value in progress.means().items())
        return f"{shown} | skipped {progress.left_out}" if progress.left_out else shown


SKIPPED = "skipped"
