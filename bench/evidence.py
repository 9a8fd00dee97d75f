"""Does distillation help, and by how much: the same photographs, schedule and seeds, one thing
changed a row.

python -m bench.evidence cpu                     # every run that is not done yet, then the table and the picture
python -m bench.evidence cpu notes --seeds 0     # one of them
python -m bench.evidence gpu --table             # no training: the table of what bench/evidence/gpu/ holds

The photographs are those of bench/voc320, which `python -m bench.make_voc320` takes out of VOC;
--root says where they are. Each run is one of train.py, in RUNS/ROW-SEED; a run that was stopped
goes on where it was. Its config and results.csv go to bench/evidence/PROTOCOL/ROW-SEED/, and the
table is made of those alone. Two processes may share the work by --seeds, once the teacher is
there. ultralytics' own trainer makes two rows: PYTHONPATH=.oracle/newest, where `make parity`
installs it.
"""

import argparse
import contextlib
import io
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch

import train
from bench.findings import BASELINE, PEER, PEER_BASELINE, TEACHER, write
from bench.measure import machine
from bench.peer_training import distil
from kdmini import config, engine, signals
from kdmini.contracts import UserError
from kdmini.data.loader import Augment, ValLoader
from kdmini.data.store import Store
from kdmini.detection.average_precision import DetectionMetric
from kdmini.detection.voc import VOC
from kdmini.device import pick_device, precision
from kdmini.optim import Recipe
from kdmini.runlog import RunFolder, write_whole

ROOT = Path(__file__).parents[1]
LEAST_OBJECTS = 50  # of a class, for its AP to say anything
WEIGHTS = {  # by which a term's gradient was about 0.3 of the task's, on YOLO11n trained alone for four epochs
    "logits": 0.1,
    "localisation": 0.2,
    "channelwise": 0.5,
    "masked": 8,
    "pearson": 2,
    "spatial": 2,
    "frequency": 4.5,
    "affinity": 1.2,
}


class Sample(VOC):
    """Evenly spaced photographs of the splits, `count` of them: always the same."""

    def __init__(self, root: str, splits: list[str], count: int, names: list[str] | None = None):
        self.count = count
        super().__init__(root, splits, names)

    def _choose(self, root: Path, splits: list[str], exclude: list[str]) -> list[tuple[Path, str]]:
        chosen = super()._choose(root, splits, exclude)
        if not 0 < self.count <= len(chosen):
            raise UserError(
                f"data.train.count: {self.count} photographs are asked for; there are {len(chosen):,}"
            )
        return [chosen[i * len(chosen) // self.count] for i in range(self.count)]


class ByClass(DetectionMetric):
    """Beside the means, AP50-95 of each class that has LEAST_OBJECTS."""

    def compute(self) -> dict[str, float]:
        classes = {
            name: scores
            for name, scores in self.per_class().items()
            if scores["objects"] >= LEAST_OBJECTS
        }
        return {
            **super().compute(),
            **{f"AP {name}": scores["AP50-95"] for name, scores in classes.items()},
        }


class Protocol(NamedTuple):
    teacher: list[str]  # the overrides of bench/evidence/PROTOCOL.yaml that make the teacher
    rows: dict[str, list[str]]  # and each row; the others are compared with the first
    seeds: tuple[int, ...]


def protocol_of(name: str) -> Protocol:
    settings = config.load(ROOT / f"bench/evidence/{name}.yaml")
    photographs = "data.train={build: kdmini.detection.voc:VOC, splits: [train]}"  # all of them
    teacher = [
        f"student.scale={settings['teacher']['scale']}",
        "teacher=null",
        "distill=null",
        photographs,
    ]
    teacher.append("metric.build=kdmini.detection.average_precision:DetectionMetric")
    rows = rows_of(settings["train"]["epochs"])
    if name == "gpu":
        return Protocol(teacher, rows, (0, 1, 2))
    few = [
        BASELINE,
        "notes",
        "notes_batch",
        "sample",
        "sample_strong",
        "score_weighted",
        PEER_BASELINE,
        PEER,
    ]
    few += ["score_weighted_strong", "sample_strongest", "logits", "lambda_constant"]
    return Protocol(
        [*teacher, "train.epochs=40", "train.val_every=10"], {row: rows[row] for row in few}, (0, 1)
    )


def rows_of(epochs: int) -> dict[str, list[str]]:
    """The overrides of each row, most informative first."""
    strong = [
        "distill.attention.reduction=sample",
        "distill.kd_scale=batch",
        "distill.attention.weight=0.25",
    ]
    rows = {
        BASELINE: ["distill.attention.weight=0"],
        "notes": [],
        "notes_batch": ["distill.kd_scale=batch"],
        "sample": ["distill.attention.reduction=sample"],
        "sample_strong": strong,
        "score_weighted": [*extra("score_weighted"), "distill.score_weighted.weight=0.5"],
        PEER_BASELINE: ["teacher=null", "distill=null"],
        PEER: ["distill=null"],  # it has its own
        "score_weighted_strong": [
            *extra("score_weighted"),
            "distill.score_weighted.weight=6",
        ],  # the weight of PEER
        "sample_strongest": [
            *strong,
            "distill.attention.weight=3",
        ],  # 12 times that of `strong`, as the row before
    }
    rows |= {
        f"align_{mode}": [*strong, f"distill.align={mode}"]
        for mode in ("none", "frozen", "unequal")
    }
    for name, segments in schedules(epochs).items():
        rows[f"lambda_{name}"] = [*strong, f"distill.attention.schedule={segments}"]
    rows["taps_neck"] = [*strong, "distill.taps=[model.13, model.16, model.19, model.22]"]
    rows["taps_p3"] = [*strong, "distill.taps=[model.16]"]
    rows |= {
        term: [*extra(term), f"distill.{term}.weight={weight}"] for term, weight in WEIGHTS.items()
    }
    return rows | {"self_teacher": ["teacher=null", *extra("self_teacher")]}


def extra(term: str) -> list[str]:
    """The term in place of attention transfer, with taps and settings of configs/terms/TERM.yaml."""
    return [f"distill={json.dumps(config.load(ROOT / f'configs/terms/{term}.yaml')['distill'])}"]


def schedules(epochs: int) -> dict[str, list[list[float]]]:
    """Lambdas with the mean of the notes': (40 * 1.0 + 60 * 0.15 + 50 * 0.05) / 150."""
    mean, closing = 0.343, epochs - Augment.close_mosaic
    falling = [(epochs * i / 10, mean * (1 + math.cos(math.pi * i / 10))) for i in range(11)]
    until_closing = mean * epochs / closing
    return {
        "constant": [[0, mean, epochs, mean]],
        "cosine": [[*start, *end] for start, end in pairwise(falling)],
        "mosaic": [[0, until_closing, closing, until_closing]],  # and none while the mosaic is off
    }


def settings_of(
    name: str, overrides: Sequence[str], row: str, seed: int, runs: Path
) -> dict[str, Any]:
    """The config of a run."""
    path = ROOT / f"bench/evidence/{name}.yaml"
    places = [f"run={runs / f'{row}-{seed}'}", f"seed={seed}"]
    if config.load(path, overrides)["teacher"]:
        places.append(f"teacher.weights={runs / f'{TEACHER}-0/best.pt'}")
    return config.load(path, [*overrides, *places])


def run(
    name: str, overrides: Sequence[str], row: str, seed: int, runs: Path, root: Path | None = None
) -> None:
    """Trains, or goes on, or sees that nothing is left to do; then keeps config and curve.

    root: of the photographs, where it is not the protocol's.
    """
    folder, kept = runs / f"{row}-{seed}", texts(name) / f"{row}-{seed}"
    print(f"\n{name}, {row}, seed {seed}: {folder}")
    if row.startswith(PEER) and not find_spec(PEER):
        return print(f"{PEER} is not installed: PYTHONPATH=.oracle/newest, after `make parity`")
    settings = settings_of(
        name, [*overrides, f"data.root={root}"] if root else overrides, row, seed, runs
    )
    begins = not (folder / "config.yaml").exists()
    checked = begins and seed == 0 and settings["distill"] and row != BASELINE
    for needed, is_needed in ((TEACHER, settings["teacher"]), (BASELINE, checked)):
        if is_needed and not (runs / f"{needed}-0/best.pt").exists():
            raise UserError(
                f"{row} needs {runs / needed}-0: `python -m bench.evidence {name} {needed} --seeds 0` first"
            )
    kept.mkdir(parents=True, exist_ok=True)
    if begins:
        if checked:
            write_whole(kept / "check.txt", check(settings, runs / f"{BASELINE}-0/best.pt"))
        place = pick_device(settings.get("device", "auto")).type
        write_whole(
            kept / "made.txt", f"commit {commit()}, {machine(place, torch.get_num_threads())}\n"
        )
    if not row.startswith(PEER):
        start(settings, resume=not begins)
    elif begins:
        compete(settings)
    usual = settings_of(
        name, overrides, row, seed, Path(f"runs/evidence/{name}")
    )  # wherever runs and photographs are
    write_whole(kept / "config.yaml", config.dump(usual))
    write_whole(kept / "results.csv", (folder / "results.csv").read_bytes())


def compete(settings: dict[str, Any]) -> None:
    """A run of ultralytics' own trainer, with one record, of its student after the last epoch. It
    cannot be resumed.
    """
    with tempfile.TemporaryDirectory() as scratch:
        state, speed = distil(settings, Path(scratch))
    sets, recipe = (
        config.call(train.make_sets, settings["data"], "data"),
        Recipe(**settings["train"]),
    )
    place = pick_device(settings.get("device", "auto"))
    autocast, _ = precision(recipe.amp, place)
    student = config.build(settings["student"], "student", names=sets.val.names)
    student.load_state_dict(state)
    student.to(place, memory_format=torch.channels_last)
    loader = ValLoader(Store(sets.val, sets.imgsz, place, name="val", **sets.store), recipe.batch)
    score = config.build(settings["metric"], "metric", names=sets.val.names)
    record = {
        "epoch": recipe.epochs - 1,
        "images/s": speed,
        **engine.evaluate(student, loader, score, autocast),
    }
    folder = RunFolder(settings["run"])
    folder.begin(config.dump(settings))
    train.save_best(
        folder.best, student, sets.val.names, sets.imgsz, recipe.epochs - 1, record[score.fitness]
    )
    folder.log(record)


def check(settings: dict[str, Any], weights: Path) -> str:
    """What `train.py --check` says, of a student that has been trained: before that, features are
    so small that their attention maps say nothing, nor do the gradients.
    """
    student = {**settings["student"], "weights": str(weights)}
    with contextlib.redirect_stdout(io.StringIO()) as told:
        try:
            start({**settings, "student": student}, check=True)
        except UserError as error:
            raise UserError(f"{error}:\n{told.getvalue()}") from error
    return told.getvalue()


def start(settings: dict[str, Any], resume: bool = False, check: bool = False) -> None:
    config.call(
        train.train_detector, settings, "evidence", settings=settings, resume=resume, check=check
    )


def texts(name: str) -> Path:
    return ROOT / "bench/evidence" / name


def commit() -> str:
    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        # what this writes is no change; the configs there are kept with each run
        changed = git(
            "status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)bench/evidence"
        )
        return git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("protocol", choices=["gpu", "cpu"])
    parser.add_argument(
        "rows", nargs="*", metavar="ROW", help="those to run (default: all, and the teacher)"
    )
    parser.add_argument(
        "--seeds", nargs="+", type=int, help="those to run (default: all of the protocol)"
    )
    parser.add_argument(
        "--runs", type=Path, help="folder of the run folders (default: runs/evidence/PROTOCOL)"
    )
    parser.add_argument(
        "--root", type=Path, help="folder of the photographs (default: data.root of PROTOCOL.yaml)"
    )
    parser.add_argument("--table", action="store_true", help="run nothing")
    args = parser.parse_intermixed_args(argv)
    signals.exit_on_signals()
    name, protocol = args.protocol, protocol_of(args.protocol)
    if unknown := [row for row in args.rows if row not in (TEACHER, *protocol.rows)]:
        parser.error(f"no row `{unknown[0]}`: there are {', '.join([TEACHER, *protocol.rows])}")
    runs = args.runs or Path(f"runs/evidence/{name}")
    try:
        for row, overrides in (
            {TEACHER: protocol.teacher, **protocol.rows}.items() if not args.table else ()
        ):
            for seed in (args.seeds or protocol.seeds) if row != TEACHER else (0,):
                if row in (args.rows or (TEACHER, *protocol.rows)):
                    run(name, overrides, row, seed, runs, args.root)
        write(texts(name), list(protocol.rows), protocol.seeds)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
