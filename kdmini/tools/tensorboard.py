"""A run in TensorBoard: the scalars of metrics.jsonl, and the pictures that visualize made.

python -m kdmini.tools.tensorboard RUN [RUN ...] [--follow]
tensorboard --logdir RUN

Writes an event file, RUN/tensorboard/events.out.tfevents.*, anew and whole whenever the run has
changed, and empties
the one before: nothing is there twice, a resumed run takes back what it forgot, and a TensorBoard
that is open follows.
The step is the epoch as train.py prints it: 0 is before training. Groups: loss/, score/, lambda/,
distance/, lr, images/s.
"""

import argparse
import hashlib
import io
import os
import re
import struct
import sys
import time
from pathlib import Path

from kdmini import signals
from kdmini.contracts import UserError
from kdmini.runlog import RunFolder

try:
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.record_writer import RecordWriter
except ImportError:
    sys.exit(
        "error: event files are written by tensorboard, which is not installed: pip install 'kdmini[tb]'"
    )

SECONDS = 5.0  # between two looks of --follow
SCORES = r"AP.*|VOC.*"
ALONE = {"lr", "images/s", "skipped"}
PNG = b"\x89PNG\r\n\x1a\n"


def write_events(run: Path) -> Path | None:
    """Brings RUN/tensorboard up to date -> its event file, or None where the run has nothing to
    show yet.
    """
    events = [*scalars(run), *pictures(run)]
    if not events:
        return None
    # the first two: what the reader asks of a file, and that it may forget what an earlier file
    # said
    head = [
        Event(file_version="brain.Event:2"),
        Event(step=0, session_log=SessionLog(status=SessionLog.START)),
    ]
    lines = [event.SerializeToString(deterministic=True) for event in [*head, *events]]
    digest = hashlib.sha256(b"".join(lines)).hexdigest()[:16]
    folder = run / "tensorboard"
    present = sorted(folder.glob("events.out.tfevents.*"))
    if not present or present[-1].suffix != f".{digest}":
        numbers = [
            int(found[1]) for path in present if (found := re.search(r"tfevents\.(\d+)", path.name))
        ]
        # readers take files in the order of their names, and go on to a later one
        number = max([int(time.time()), *(n + 1 for n in numbers)])
        content = io.BytesIO()
        for line in lines:
            RecordWriter(content).write(line)
        write_whole(folder / f"events.out.tfevents.{number}.{digest}", content.getvalue())
    *old, path = sorted(folder.glob("events.out.tfevents.*"))
    for other in old:
        if (
            other.stat().st_size
        ):  # not deleted: a TensorBoard that has it open would never get past it
            write_whole(other, b"")
    return path


def scalars(run: Path) -> list[Event]:
    """The numbers of metrics.jsonl, one event an epoch."""
    path = run / "metrics.jsonl"
    try:
        records = RunFolder(run, lead=False).records()
        moment = path.stat().st_mtime if records else 0.0
        rows = [(int(record["epoch"]) + 1, record) for record in records]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path}: cannot be read ({error!r}); repair it or leave the run out"
        ) from error
    return [
        Event(
            wall_time=moment,
            step=step,
            summary=Summary(
                value=[
                    Summary.Value(tag=tag_of(name), simple_value=value)
                    for name, value in record.items()
                    if name != "epoch" and isinstance(value, int | float)
                ]
            ),
        )
        for step, record in rows
    ]


def tag_of(name: str) -> str:
    """A name in metrics.jsonl -> group/name."""
    if name in ALONE or "/" in name:
        return name
    return f"score/{name}" if re.fullmatch(SCORES, name) else f"loss/{name}"


def pictures(run: Path) -> list[Event]:
    """RUN/pictures/*.png as they are; the step is the last epoch that is logged."""
    step = max((event.step for event in scalars(run)), default=0)
    events = []
    for path in sorted((run / "pictures").glob("*.png")):
        try:
            content, moment = path.read_bytes(), path.stat().st_mtime
        except OSError as error:
            raise UserError(
                f"{path}: cannot be read ({error.strerror}); delete it, or let it be read"
            ) from error
        if not content.startswith(PNG) or len(content) < 24:
            raise UserError(
                f"{path}: is no PNG; delete it, and make it again with kdmini.tools.visualize"
            )
        width, height = struct.unpack(">II", content[16:24])
        image = Summary.Image(
            width=width, height=height, colorspace=4, encoded_image_string=content
        )
        value = Summary.Value(tag=f"pictures/{path.stem}", image=image)
        events.append(Event(wall_time=moment, step=step, summary=Summary(value=[value])))
    return events


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all. The temporary name is none that TensorBoard would open."""
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


def changed(run: Path) -> list[tuple[Path, int, int]]:
    """What says whether a run has changed, without reading it."""
    files = [
        path
        for path in (run / "metrics.jsonl", *(run / "pictures").glob("*.png"))
        if path.is_file()
    ]
    return sorted((path, path.stat().st_mtime_ns, path.stat().st_size) for path in files)


def main(argv: list[str] | None = None) -> None:
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
                    f"{run}: has no config.yaml, so it is no run; name a folder that train.py has written"
                )
        print(
            f"look: tensorboard --logdir {os.path.commonpath([run.absolute() for run in args.runs])}"
        )
        seen: dict[Path, list] = {}
        while True:
            for run in args.runs:
                if (now := changed(run)) != seen.get(run):
                    print(
                        f"events: {write_events(run) or f'none, as {run} has no epoch to show yet'}",
                        flush=True,
                    )
                    seen[run] = now
            if not args.follow:
                return
            time.sleep(SECONDS)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
