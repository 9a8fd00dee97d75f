"""The run folder: config.yaml, metrics.jsonl, results.csv, ckpt/, best.pt, and a lock."""

import csv
import fcntl
import io
import json
import os
from pathlib import Path
from typing import Any

from kdmini.contracts import UserError
from kdmini.files import write_whole


class RunFolder:
    """A folder for one run, locked as long as the process lives.

    metrics.jsonl has one line an epoch, results.csv the same as a table; both are rewritten
    whole after every epoch. Nothing is written before `begin`, so that a mistake found while
    building leaves nothing behind.
    lead: whether this process writes; of several, one does.

    Raises UserError where it holds a run already that is not to be resumed, is in use, or
    cannot be written.
    """

    def __init__(self, path: str | Path, resume: bool = False, lead: bool = True):
        self.path = Path(path)
        self.lead = lead
        self.config = self.path / "config.yaml"
        self.checkpoints = self.path / "ckpt"
        self.best = self.path / "best.pt"
        self._lines = self.path / "metrics.jsonl"
        if not lead:
            return
        self._refuse_read_only()
        if resume:
            self._lock()
        else:
            self._refuse_another()

    def _refuse_read_only(self) -> None:
        folders = (self.path.absolute(), *self.path.absolute().parents)
        nearest = next(folder for folder in folders if folder.exists())
        if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
            raise UserError(
                f"cannot write the run folder {self.path} ({nearest} is read-only); "
                "name another `run:`"
            )

    def _refuse_another(self) -> None:
        if any(path.exists() for path in (self.config, self.checkpoints, self.best)):
            raise UserError(
                f"{self.path} holds a run already; continue it with `python train.py --resume "
                f"{self.path}` or name another `run:`"
            )

    def _lock(self) -> None:
        """Takes the lock, which goes with the process however that ends, and clears away what
        a killed one left.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lockfile = (self.path / "lock").open("a+")
        except OSError as error:
            raise UserError(
                f"cannot write the run folder {self.path} ({error.strerror}); name another `run:`"
            ) from error
        try:
            fcntl.flock(self._lockfile, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lockfile.seek(0)
            owner = self._lockfile.read() or "unknown"
            raise UserError(
                f"{self.path} is locked by pid {owner}, which trains there; "
                "wait for it, or name another `run:`"
            ) from None
        self._lockfile.truncate(0)
        print(os.getpid(), end="", file=self._lockfile, flush=True)
        for stale in [*self.path.glob("*.tmp"), *self.checkpoints.glob("*.tmp")]:
            stale.unlink()
            print(f"removed {stale}, left half-written by a run that was killed")

    def begin(self, config: str) -> None:
        """Creates the folder with the resolved config."""
        if not self.lead:
            return
        self._lock()
        self._refuse_another()  # again, now that nobody else can begin one
        write_whole(self.config, config)

    def records(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; one that was cut off by a kill is left out."""
        if not self._lines.exists():
            return []
        records = []
        for line in self._lines.read_text().splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return records

    def rewind(self, epoch: int) -> None:
        """Forgets what was logged from `epoch` on, since a resumed run goes through it
        again.
        """
        if self.lead:
            self._write([record for record in self.records() if record["epoch"] < epoch])

    def log(self, record: dict[str, Any]) -> None:
        if self.lead:
            self._write([*self.records(), record])

    def _write(self, records: list[dict[str, Any]]) -> None:
        # whole, and not appended: a line that a kill cut off would swallow the next
        lines = [json.dumps(record, default=float) + "\n" for record in records]
        write_whole(self._lines, "".join(lines))
        columns = list(dict.fromkeys(name for record in records for name in record))
        table = io.StringIO()
        writer = csv.DictWriter(table, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
        write_whole(self.path / "results.csv", table.getvalue())
