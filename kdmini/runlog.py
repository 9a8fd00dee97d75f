"""The run folder: config.yaml, metrics.jsonl, results.csv, log.txt, ckpt/, best.pt, a lock; and
val.txt, where the images to validate on were drawn.
"""

import csv
import fcntl
import io
import json
import os
import weakref
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from kdmini import output
from kdmini.commands import command
from kdmini.contracts import UserError
from kdmini.files import check_kind, write_whole
from kdmini.typed import short

LONGEST_NAME = 255  # bytes of a file's name, on nearly every file system


class FolderLost(UserError):
    """The run folder was deleted, renamed or emptied while the run was on."""


class RunFolder:
    """A folder for one run, locked as long as the process lives.

    metrics.jsonl has one line an epoch, results.csv the same as a table; both are rewritten
    whole after every epoch. log.txt grows by every line that is printed. Nothing is written
    before `begin`, so that a mistake found while building leaves nothing behind.
    lead: whether this process writes; of several, one does.
    loggers: what is called with every record that is logged; one that fails is called no more.

    Raises UserError where it holds a run already that is not to be resumed, is in use,
    cannot be written, or is no name of a folder.
    """

    def __init__(
        self, path: str | Path, resume: bool = False, lead: bool = True, loggers: Sequence[Any] = ()
    ):
        check_name(path)
        self.path = Path(path)
        self.lead = lead
        self.loggers = list(loggers)
        self.config = self.path / "config.yaml"
        self.checkpoints = self.path / "ckpt"
        self.best = self.path / "best.pt"
        self._lines = self.path / "metrics.jsonl"
        if not lead:
            return
        self._refuse_read_only()
        if resume:
            self._lock()
            self.records()  # before the images are decoded
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
                f"{self.path} holds a run already; continue it with `{command('train')} --resume "
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
        # open, so that no later folder can have the number of this one
        self._descriptor = os.open(self.path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)
        output.log_to(self.path / "log.txt")
        for stale in [*self.path.glob("*.tmp"), *self.checkpoints.glob("*.tmp")]:
            stale.unlink()
            print(f"removed {stale}, left half-written by a run that was killed")

    def begin(self, config: str, more: Mapping[str, bytes] | None = None) -> None:
        """Creates the folder with the resolved config, and more files: name -> content."""
        if not self.lead:
            return
        self._lock()
        self._refuse_another()  # again, now that nobody else can begin one
        for name, content in (more or {}).items():
            write_whole(self.path / name, content)
        write_whole(self.config, config)

    def check(self) -> None:
        """Raises FolderLost unless what is locked still has its name, and a run in it. To be
        called before anything is written there.
        """
        if not self.lead:
            return
        try:
            there = os.path.samestat(os.stat(self.path), os.fstat(self._descriptor))
        except OSError:
            there = False
        if not there or not self.config.exists():
            raise FolderLost(f"{self.path} was deleted, renamed or emptied while training")

    def beside(self) -> "RunFolder":
        """A folder for the same run, for want of this one: `<name>_rescued`."""
        names = (f"{self.path.name}_rescued{number or ''}" for number in count())
        return RunFolder(next(p for p in map(self.path.with_name, names) if not p.exists()))

    def records(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; one that was cut off by a kill is left out.

        Raises UserError for one that is whole and no record of an epoch.
        """
        if not self._lines.exists():
            return []
        check_kind(self._lines)
        try:
            text = self._lines.read_text("utf-8")
        except (OSError, ValueError) as error:
            raise UserError(
                f"{self._lines}: cannot be read ({error}); "
                "take it away, the checkpoints do not need it"
            ) from error
        numbered = enumerate(text.split("\n"), 1)
        records = [read_record(line, f"{self._lines}:{number}") for number, line in numbered]
        return [record for record in records if record is not None]

    def rewind(self, epoch: int) -> None:
        """Forgets what was logged from `epoch` on, since a resumed run goes through it
        again.
        """
        if self.lead:
            self._write([record for record in self.records() if record["epoch"] < epoch])

    def log(self, record: dict[str, Any]) -> None:
        if not self.lead:
            return
        self._write([*self.records(), record])
        for logger in list(self.loggers):
            try:
                logger(dict(record))
            except Exception as error:  # it is anybody's, and must not stop the run
                self.loggers.remove(logger)
                name = type(logger).__name__
                print(f"warning: log: {name} failed, and the run goes on without: {short(error)}")

    def _write(self, records: list[dict[str, Any]]) -> None:
        self.check()
        # whole, and not appended: a line that a kill cut off would swallow the next
        lines = [json.dumps(record, default=float) + "\n" for record in records]
        write_whole(self._lines, "".join(lines))
        columns = list(dict.fromkeys(name for record in records for name in record))
        table = io.StringIO()
        writer = csv.DictWriter(table, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
        write_whole(self.path / "results.csv", table.getvalue())


def read_record(line: str, where: str) -> dict[str, Any] | None:
    """A line of metrics.jsonl; None for one that is no JSON.

    where: file and line. Raises UserError for JSON that is no record of an epoch.
    """
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return None
    except (ValueError, RecursionError):  # of 5,000 digits, or as many brackets
        record = None
    if not isinstance(record, dict) or type(record.get("epoch")) is not int:
        raise UserError(f"{where}: {short(line)} is no record of an epoch; delete that line")
    return record


def check_name(path: str | Path) -> None:
    """Raises UserError for what no folder can be called."""
    try:
        longest = max(len(os.fsencode(part)) for part in str(path).split("/"))
    except UnicodeEncodeError:
        longest = 0
    if not str(path).strip() or "\0" in str(path) or not 0 < longest <= LONGEST_NAME:
        raise UserError(
            f"run: {short(str(path))} cannot be a folder; give a name that is not empty and of "
            f"at most {LONGEST_NAME} bytes"
        )
