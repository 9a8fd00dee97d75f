"""The run folder: config.yaml, metrics.jsonl, results.csv, ckpt/, best.pt."""

import csv
import io
import json
import os
from pathlib import Path
from typing import Any

from kdmini.contracts import UserError


class RunFolder:
    """A folder for one run. Raises UserError where it holds one already, and it is not to be resumed.

    metrics.jsonl has one line an epoch, results.csv the same as a table; both are rewritten whole after every epoch.
    Nothing is written before `begin`, so that a mistake found while building leaves nothing behind.
    """

    def __init__(self, path: str | Path, resume: bool = False):
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.checkpoints = self.path / "ckpt"
        self.best = self.path / "best.pt"
        self._lines = self.path / "metrics.jsonl"
        if self.config.exists() and not resume:
            raise UserError(
                f"{path} holds a run already; continue it with `python train.py --resume {path}` or name another `run:`"
            )

    def begin(self, config: str) -> None:
        """Creates the folder with the resolved config."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot write the run folder {self.path} ({error.strerror}); name another `run:`"
            ) from error
        replace_text(self.config, config)

    def records(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; one that was cut off by a kill is left out."""
        records = []
        for line in self._lines.read_text().splitlines() if self._lines.exists() else []:
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return records

    def rewind(self, epoch: int) -> None:
        """Forgets what was logged from `epoch` on, since a resumed run goes through it again."""
        self._write([record for record in self.records() if record["epoch"] < epoch])

    def log(self, record: dict[str, Any]) -> None:
        self._write([*self.records(), record])

    def _write(self, records: list[dict[str, Any]]) -> None:
        # whole, and not appended: a line that a kill cut off would swallow the next
        replace_text(self._lines, "".join(json.dumps(record) + "\n" for record in records))
        columns = list(dict.fromkeys(name for record in records for name in record))
        table = io.StringIO()
        writer = csv.DictWriter(table, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
        replace_text(self.path / "results.csv", table.getvalue())


def replace_text(path: Path, text: str) -> None:
    """Writes a text file whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path} ({error.strerror}); make room, or write elsewhere") from error
