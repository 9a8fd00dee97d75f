"""A run in TensorBoard: the scalars of metrics.jsonl, and the pictures of
visualize.

python -m kdmini.tools.tensorboard RUN [RUN ...] [--follow]
tensorboard --logdir RUN

Writes an event file, RUN/tensorboard/events.out.tfevents.*, anew and whole
whenever the run has changed, and empties the one before: nothing is there
twice, a resumed run takes back what it forgot, and a TensorBoard that is open
follows. A tag is the key in metrics.jsonl, such as loss/box or lr. The step is
the epoch as train.py prints it: 0 is before training.
"""

import argparse
import hashlib
import io
import math
import os
import re
import struct
import sys
import time
from pathlib import Path
from typing import Any

from kdmini import output, signals
from kdmini.contracts import UserError
from kdmini.files import check_kind
from kdmini.runlog import RunFolder
from kdmini.tools.rows import LARGEST
from kdmini.typed import short

try:
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.record_writer import RecordWriter
except ImportError:
    sys.exit(
        "error: event files are written by tensorboard, which is not installed: "
        "pip install -e '.[tb]' in the checkout"
    )

SECONDS = 5.0  # between two looks of --follow

EVENT_FILES = "events.out.tfevents.*"  # a number, a dot, and a digest of what is in it
DIGEST_CHARACTERS = 16

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_SIDES = slice(16, 24)  # width and height, four bytes each
RGBA = 4  # Summary.Image's number of it


def write_events(run: Path) -> Path | None:
    """Brings RUN/tensorboard up to date -> its event file, None with nothing to show."""
    events = [*scalars(run), *pictures(run)]
    if not events:
        return None

    head = [
        # what the reader asks of a file
        Event(file_version="brain.Event:2"),
        # it may forget what an earlier file said
        Event(step=0, session_log=SessionLog(status=SessionLog.START)),
    ]
    records = [event.SerializeToString(deterministic=True) for event in head + events]
    digest = hashlib.sha256(b"".join(records)).hexdigest()[:DIGEST_CHARACTERS]

    folder = run / "tensorboard"
    earlier = sorted(folder.glob(EVENT_FILES))
    if not earlier or earlier[-1].suffix != f".{digest}":
        content = io.BytesIO()
        writer = RecordWriter(content)
        for record in records:
            writer.write(record)
        name = f"events.out.tfevents.{next_number(earlier)}.{digest}"
        write_whole(folder / name, content.getvalue())

    *outdated, newest = sorted(folder.glob(EVENT_FILES))
    for path in outdated:
        if path.stat().st_size > 0:
            # not deleted: a TensorBoard that has it open would never get past it
            write_whole(path, b"")
    return newest


def next_number(earlier: list[Path]) -> int:
    """The time in seconds, or the number after the highest of the earlier event files.

    Readers take the files in the order of their names, and go on to a later one.
    """
    matches = [re.search(r"tfevents\.(\d+)", path.name) for path in earlier]
    numbers = [int(match[1]) for match in matches if match]
    return max([int(time.time()), *(number + 1 for number in numbers)])


def scalars(run: Path) -> list[Event]:
    """The numbers of metrics.jsonl, one event an epoch."""
    path = run / "metrics.jsonl"
    try:
        records = RunFolder(run, lead=False).records()
        written_at = path.stat().st_mtime if records else 0.0
        steps = [int(record["epoch"]) + 1 for record in records]
    except (OSError, ValueError, TypeError, KeyError, OverflowError) as error:
        raise UserError(
            f"{path}: cannot be read ({short(error)}); repair it or leave the run out"
        ) from error
    return [
        Event(wall_time=written_at, step=step, summary=summary_of(record))
        for step, record in zip(steps, records, strict=True)
    ]


def summary_of(record: dict[str, Any]) -> Summary:
    """A line of metrics.jsonl, whose keys are the tags."""
    values = [
        Summary.Value(tag=key, simple_value=value)
        for key, value in record.items()
        if key != "epoch" and is_number(value)
    ]
    return Summary(value=values)


def is_number(value: Any) -> bool:
    """Also infinity and NaN, which TensorBoard shows, but nothing that is no float."""
    return type(value) in (int, float) and not LARGEST < abs(value) < math.inf


def pictures(run: Path) -> list[Event]:
    """RUN/pictures/*.png as they are; the step is the last epoch that is logged."""
    step = max((event.step for event in scalars(run)), default=0)
    events = []
    for path in sorted((run / "pictures").glob("*.png")):
        check_kind(path)
        try:
            content = path.read_bytes()
            written_at = path.stat().st_mtime
        except OSError as error:
            raise UserError(
                f"{path}: cannot be read ({error.strerror}); delete it, or let it be read"
            ) from error
        sides = content[PNG_SIDES]
        if not content.startswith(PNG_SIGNATURE) or len(sides) < 8:
            raise UserError(
                f"{path}: is no PNG; delete it, and make it again with kdmini.tools.visualize"
            )

        width, height = struct.unpack(">II", sides)
        image = Summary.Image(
            width=width, height=height, colorspace=RGBA, encoded_image_string=content
        )
        summary = Summary(value=[Summary.Value(tag=f"pictures/{path.stem}", image=image)])
        events.append(Event(wall_time=written_at, step=step, summary=summary))
    return events


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all. Raises UserError.

    Not files.write_whole: its temporary file is called like the whole one, with .tmp
    after it, and TensorBoard opens whatever has `tfevents` in its name.
    """
    temporary = path.with_name("part.tmp")
    try:
        path.parent.mkdir(exist_ok=True)
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(
            f"cannot write {path} ({error.strerror}); make room, or make the folder writable"
        ) from error
    finally:
        if temporary.is_file():  # a signal came between
            temporary.unlink()


def state_of(run: Path) -> list[tuple[Path, int, int]]:
    """Path, time and size of each file: by these a change is seen without reading."""
    paths = [run / "metrics.jsonl", *(run / "pictures").glob("*.png")]
    stats = {path: path.stat() for path in paths if path.is_file()}
    return sorted((path, stat.st_mtime_ns, stat.st_size) for path, stat in stats.items())


def watch(runs: list[Path], follow: bool) -> None:
    """Writes the events of each run; with `follow`, again whenever it has changed."""
    states: dict[Path, list] = {}
    while True:
        for run in runs:
            state = state_of(run)
            if state == states.get(run):
                continue
            states[run] = state
            events = write_events(run) or f"none, as {run} has no epoch to show yet"
            print(f"events: {events}", flush=True)
        if not follow:
            return
        time.sleep(SECONDS)


def main(argv: list[str] | None = None) -> None:
    output.guard(needed=True)
    parser = argparse.ArgumentParser(
        prog="python -m kdmini.tools.tensorboard",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "runs", metavar="RUN", type=Path, nargs="+", help="a folder that train.py has written"
    )
    parser.add_argument(
        "--follow", action="store_true", help=f"look again every {SECONDS:g} s, until interrupted"
    )
    args = parser.parse_args(argv)
    signals.exit_on_signals()
    try:
        for run in args.runs:
            if not (run / "config.yaml").is_file():
                raise UserError(
                    f"{run}: has no config.yaml, so it is no run; "
                    "name a folder that train.py has written"
                )
        logdir = os.path.commonpath([run.absolute() for run in args.runs])
        print(f"look: tensorboard --logdir {logdir}")
        watch(args.runs, args.follow)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
