"""Does distillation help, and by how much: one thing changed a row, all else the same.

python -m bench.evidence cpu                  # all that is not done yet, then the page
python -m bench.evidence cpu notes --seeds 0  # one run
python -m bench.evidence gpu --table          # no run: the page of those that are kept

The rows stand in bench/protocol.py. The photographs are those of bench/voc320, which
`python -m bench.make_voc320` takes out of VOC; --root says where they are. Each run is
one of train.py, in RUNS/ROW-SEED; a run that was stopped goes on where it was. Its
config and results.csv go to bench/evidence/PROTOCOL/ROW-SEED/, and the page, with a
table and a picture, is made of those alone. Two processes may share the work by --seeds,
once the teacher is there. ultralytics' own trainer makes two rows:
PYTHONPATH=.oracle/newest, where `make parity` installs it.
"""

import argparse
import contextlib
import io
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import train
from bench.measure import machine
from bench.page import write
from bench.peer_training import distil
from bench.protocol import BASELINE, PEER, ROOT, TEACHER, Run, protocol_of, records_of
from kdmini import checkpoint, config, engine, signals
from kdmini.assemble import make_model, with_weights
from kdmini.bounds import Seed
from kdmini.contracts import UserError
from kdmini.data.loader import ValLoader
from kdmini.data.voc import Entry
from kdmini.detection.average_precision import DetectionMetric
from kdmini.detection.voc import VOC
from kdmini.device import pick_device, precision
from kdmini.files import write_whole
from kdmini.runlog import RunFolder
from kdmini.sections import Sections
from kdmini.typed import argument

LEAST_OBJECTS = 50  # of a class, for its AP to say anything


class Sample(VOC):
    """Evenly spaced photographs of the splits, `count` of them: always the same."""

    def __init__(self, root: str, splits: list[str], count: int, names: list[str] | None = None):
        self.count = count
        super().__init__(root, splits, names)

    def _choose(self, root: Path, splits: list[str], exclude: list[str]) -> list[Entry]:
        entries = super()._choose(root, splits, exclude)
        total = len(entries)
        if not 0 < self.count <= total:
            raise UserError(
                f"data.train.count: {self.count} photographs are asked for; there are {total:,}"
            )
        return [entries[i * total // self.count] for i in range(self.count)]


class Rest(Sample):
    """The photographs of the splits that Sample leaves out."""

    def _choose(self, root: Path, splits: list[str], exclude: list[str]) -> list[Entry]:
        taken = set(super()._choose(root, splits, exclude))
        entries = VOC._choose(self, root, splits, exclude)
        return [entry for entry in entries if entry not in taken]


class ByClass(DetectionMetric):
    """Beside the means, AP50-95 of each class that has LEAST_OBJECTS."""

    def compute(self) -> dict[str, float]:
        scores = super().compute()
        for name, of_class in self.per_class().items():
            if of_class["objects"] >= LEAST_OBJECTS:
                scores[f"AP {name}"] = of_class["AP50-95"]
        return scores


def make(run: Run, runs: Path, root: Path | None = None) -> None:
    """Trains, or goes on, or sees that nothing is left; then keeps config and curve.

    runs: the folder of the run folders.
    root: of the photographs, where it is not the protocol's.
    """
    folder = runs / run.name
    kept = records_of(run.protocol) / run.name
    is_peer = run.row.startswith(PEER)
    print(f"\n{run.protocol}, {run.row}, seed {run.seed}: {folder}")
    if is_peer and not find_spec(PEER):
        return print(f"{PEER} is not installed: PYTHONPATH=.oracle/newest, after `make parity`")

    settings = run.settings(runs, root)
    begins = not (folder / "config.yaml").exists()
    distils = settings["distill"] and run.row != BASELINE
    is_checked = begins and distils and run.seed == 0
    if settings["teacher"]:
        require(TEACHER, run, runs)
    if is_checked:
        require(BASELINE, run, runs)

    kept.mkdir(parents=True, exist_ok=True)
    if begins:
        if is_checked:
            text = check(settings, weights=runs / f"{BASELINE}-0/best.pt")
            write_whole(kept / "check.txt", text)
        device = pick_device(settings.get("device", "auto"))
        made_on = machine(device.type, torch.get_num_threads())
        write_whole(kept / "made.txt", f"commit {commit()}, {made_on}\n")
    if not is_peer:
        train.train(settings, "evidence", resume=not begins)
    elif begins:
        train_peer(settings)

    # as it is everywhere, wherever runs and photographs are here
    usual = run.settings(Path(f"runs/evidence/{run.protocol}"))
    write_whole(kept / "config.yaml", config.dump(usual))
    write_whole(kept / "results.csv", (folder / "results.csv").read_bytes())


def require(row: str, run: Run, runs: Path) -> None:
    """Raises UserError unless the row that the run needs has been made."""
    if not (runs / f"{row}-0/best.pt").exists():
        command = f"python -m bench.evidence {run.protocol} {row} --seeds 0"
        raise UserError(f"{run.row} needs {runs / row}-0: `{command}` first")


def train_peer(settings: dict[str, Any]) -> None:
    """A run of ultralytics' own trainer; it cannot be resumed.

    It has one record, of the student after the last epoch.
    """
    with tempfile.TemporaryDirectory() as scratch:
        trained = distil(settings, Path(scratch))
    sections = config.call(Sections, settings, "evidence")
    names = sections.sets().val.names
    student = make_model(sections.student, "student", names, pick_device(sections.device))
    student.load_state_dict(trained.state)
    keep_scores(settings, student, trained.speed, {})


def keep_scores(
    settings: dict[str, Any], student: Any, speed: float, more: dict[str, float]
) -> None:
    """Evaluates what another trainer made, and writes the run folder of its last epoch.

    speed: images/s. more: scores beside ours.
    """
    sections = config.call(Sections, settings, "evidence")
    recipe = sections.recipe()
    sets = sections.sets()
    device = pick_device(sections.device)
    autocast, _ = precision(recipe.amp, device)
    loader = ValLoader(sets.store("val", device), recipe.batch)
    metric = sections.make_metric(sets.val.names)
    scores = engine.evaluate(student, loader, metric, autocast)

    epoch = recipe.epochs - 1
    record = {"epoch": epoch, "images/s": speed}
    for name, value in {**scores, **more}.items():
        record[f"score/{name}"] = value
    folder = RunFolder(sections.run)
    folder.begin(config.dump(settings))
    checkpoint.save_best(folder.best, student, sets.imgsz, epoch, scores[metric.fitness])
    folder.log(record)


def check(settings: dict[str, Any], weights: Path) -> str:
    """What `train.py --check` says, of a student that has been trained.

    Before that, features are so small that their attention maps say nothing, nor do the
    gradients.
    """
    student = with_weights(settings["student"], str(weights))
    with contextlib.redirect_stdout(io.StringIO()) as output:
        try:
            train.train({**settings, "student": student}, "evidence", check=True)
        except UserError as error:
            raise UserError(f"{error}:\n{output.getvalue()}") from error
    return output.getvalue()


def commit() -> str:
    """The short hash of the code, with `-dirty` where it is not quite that."""
    try:
        # what this program writes is no change; its configs are kept with each run
        code = (".", ":(exclude)bench/evidence")
        changes = git("status", "--porcelain", "--untracked-files=no", "--", *code)
        head = git("rev-parse", "--short", "HEAD")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{head}-dirty" if changes else head


def git(*words: str) -> str:
    command = ["git", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("protocol", choices=["gpu", "cpu"])
    parser.add_argument(
        "rows",
        nargs="*",
        metavar="ROW",
        help="those to run (default: all, and the teacher)",
    )
    parser.add_argument(
        "--seeds",
        nargs="+",
        type=argument(Seed),
        help="those to run (default: all of the protocol)",
    )
    parser.add_argument(
        "--runs",
        type=Path,
        help="folder of the run folders (default: runs/evidence/PROTOCOL)",
    )
    parser.add_argument(
        "--root",
        type=Path,
        help="folder of the photographs (default: data.root of PROTOCOL.yaml)",
    )
    parser.add_argument("--table", action="store_true", help="run nothing")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_intermixed_args(argv)
    signals.exit_on_signals()
    protocol = protocol_of(args.protocol)
    known = [TEACHER, *protocol.rows]
    unknown = [row for row in args.rows if row not in known]
    if unknown:
        parser.error(f"no row `{unknown[0]}`: there are {', '.join(known)}")

    folder = args.runs or Path(f"runs/evidence/{protocol.name}")
    runs = [] if args.table else protocol.runs(args.rows, args.seeds or ())
    try:
        for run in runs:
            make(run, folder, args.root)
        write(records_of(protocol.name), list(protocol.rows), protocol.seeds)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
