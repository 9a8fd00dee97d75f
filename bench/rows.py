"""One thing changed a row, all else the same, for any config: which change helps, and how sure.

python -m bench.rows bench/evidence/groceries.yaml              # all that is not done yet
python -m bench.rows bench/evidence/groceries.yaml cutmix --seeds 0
python -m bench.rows bench/evidence/groceries.yaml --jobs 14    # so many processes share them
python -m bench.rows bench/evidence/groceries.yaml --table      # no run: the page alone

The file is a `Protocol`, below. Each run is one of train.py, in RUNS/ROW-SEED; a run that was
stopped goes on where it was.
Config and curve of each go to the folder that is named as the file is, and the page beside it
is made of those alone. Seeds are paired: a row's score minus that of the baseline with the same
seed, their mean, and the interval of Student's t that holds it with 95 %.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

import train
from bench.evidence import commit, keep_scores, train_peer
from bench.findings import SCORE, Results, read
from bench.measure import machine
from bench.peer_training import tune
from bench.protocol import ROOT
from kdmini import config, signals
from kdmini.assemble import make_model, with_weights
from kdmini.bounds import Count, Seed
from kdmini.contracts import UserError
from kdmini.device import pick_device
from kdmini.files import write_whole
from kdmini.sections import Sections
from kdmini.tools.compare import interval, markdown, spread, verdict
from kdmini.typed import argument


@dataclass(frozen=True)
class Row:
    """What is changed.

    overrides: of the config, as on the command line.
    config: in place of the protocol's.
    teacher: the row whose best.pt of seed 0 is the teacher.
    seeds: in place of the protocol's.
    against: the row that it is compared with, in place of the baseline.
    ultralytics: its trainer makes the row, which cannot be resumed. `distil`: as the config says,
        with its own distillation where that has a teacher. Or settings of it: the config then
        says images, student, epochs, batch and seed, and all else are its own defaults.
    """

    overrides: tuple[str, ...] = ()
    config: str | None = None
    teacher: str | None = None
    seeds: tuple[Seed, ...] | None = None
    against: str | None = None
    ultralytics: Literal["distil"] | dict[str, Any] | None = None


@dataclass(frozen=True)
class Protocol:
    """All that is to be run.

    title: of the page.
    about: what is asked, and what was decided before a row was run.
    config: of the runs.
    rows: name -> what is changed, the baseline first.
    score: that is compared, of the last epoch.
    seeds: of each row.
    overrides: the same for all rows.
    rival: a row that those of the baseline are compared with too.
    """

    title: str
    about: str
    config: str
    rows: dict[str, dict[str, Any]]
    score: str
    seeds: tuple[Seed, ...]
    overrides: tuple[str, ...] = ()
    rival: str | None = None

    def row(self, name: str) -> Row:
        return config.call(Row, self.rows[name], f"rows.{name}")

    @property
    def baseline(self) -> str:
        return next(iter(self.rows))

    def seeds_of(self, name: str) -> Sequence[int]:
        seeds = self.row(name).seeds
        return self.seeds if seeds is None else seeds

    def against(self, name: str) -> str:
        return self.row(name).against or self.baseline


def protocol_at(path: Path) -> Protocol:
    """Raises UserError."""
    return config.call(Protocol, config.load(str(path)), str(path))


def settings_of(
    protocol: Protocol, name: str, seed: int, runs: Path, root: str | None
) -> dict[str, Any]:
    """The config of a run. root: of the data, where it is not the config's."""
    row = protocol.row(name)
    overrides = [*protocol.overrides, *row.overrides]
    if root:
        overrides.append(f"data.root={root}")
    if row.teacher:
        overrides.append(f"teacher.weights={runs / f'{row.teacher}-0/best.pt'}")
    overrides += [f"run={runs / f'{name}-{seed}'}", f"seed={seed}"]
    return config.load(row.config or protocol.config, overrides)


def make(
    protocol: Protocol, name: str, seed: int, kept: Path, runs: Path, root: str | None
) -> None:
    """Trains, or goes on, or sees that nothing is left; then keeps config and curve.

    kept: the folder of what is kept of all runs. Raises UserError.
    """
    folder = runs / f"{name}-{seed}"
    teacher = protocol.row(name).teacher
    if teacher and not (runs / f"{teacher}-0/best.pt").exists():
        raise UserError(f"row {name} is taught by {runs / teacher}-0: make that row first")
    print(f"\n{name}, seed {seed}: {folder}")
    settings = settings_of(protocol, name, seed, runs, root)
    place = kept / folder.name
    place.mkdir(parents=True, exist_ok=True)
    begins = not (folder / "config.yaml").exists()
    if begins:
        device = pick_device(settings.get("device", "auto"))
        made_on = machine(device.type, torch.get_num_threads())
        write_whole(place / "made.txt", f"commit {commit()}, {made_on}\n")
    theirs = protocol.row(name).ultralytics
    if theirs is None:
        train.train(settings, str(kept), resume=not begins)
    elif begins and theirs == "distil":
        train_peer(settings)
    elif begins:
        tune_there(settings, theirs)
    # as it is everywhere, wherever runs and data are here
    usual = settings_of(protocol, name, seed, Path("runs/evidence") / kept.name, None)
    write_whole(place / "config.yaml", config.dump(usual))
    write_whole(place / "results.csv", (folder / "results.csv").read_bytes())


def tune_there(settings: dict[str, Any], arguments: dict[str, Any]) -> None:
    """A run of ultralytics' trainer, and its scores by its evaluation and by ours."""
    sections = config.call(Sections, settings, "rows")
    with tempfile.TemporaryDirectory() as scratch:
        tuned = tune(settings, arguments, Path(scratch))
        student = with_weights(sections.student, str(tuned.weights))
        names = sections.sets().val.names
        model = make_model(student, "student", names, pick_device(sections.device))
    keep_scores(settings, model, tuned.speed, tuned.scores)


def make_together(
    protocol: Protocol, runs: Sequence[tuple[str, int]], jobs: int, command: Sequence[str]
) -> None:
    """Each run in a process of its own, `jobs` at a time: those that teach others first, then
    seed by seed, so that whoever stops early has pairs.

    runs: row and seed. command: that makes the rows and seeds which are added to it. Raises
    UserError, after all others, with what a run said last that failed.
    """
    teachers = {protocol.row(name).teacher for name in protocol.rows}

    def in_order(run: tuple[str, int]) -> tuple[bool, int, bool]:
        name, seed = run
        return name not in teachers, seed, protocol.row(name).teacher is not None

    def work(name: str, seed: int) -> str:
        teacher = protocol.row(name).teacher
        if (teacher, 0) in begun:
            begun[teacher, 0].result()
        arguments = [*command, name, "--seeds", str(seed)]
        done = subprocess.run(arguments, capture_output=True, text=True)
        lines = (done.stdout + done.stderr).strip().splitlines()
        if done.returncode:
            return f"{name}, seed {seed}: {lines[-1] if lines else f'code {done.returncode}'}"
        print(f"{name}, seed {seed}: done", flush=True)
        return ""

    begun: dict[tuple[str | None, int], Future[str]] = {}
    with ThreadPoolExecutor(jobs) as pool:
        for name, seed in sorted(runs, key=in_order):
            begun[name, seed] = pool.submit(work, name, seed)
        try:
            failed = [said for said in (future.result() for future in begun.values()) if said]
        except BaseException:
            # a signal: it reaches the processes too, and no further one is begun
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if failed:
        raise UserError("; ".join(failed))


# --- the page


def cells_of(protocol: Protocol, name: str, results: Results) -> list[str]:
    """A line of the table."""
    key = SCORE + protocol.score
    runs = results[name]
    scores = [100 * run.last[key] for run in runs.values()]
    against = protocol.against(name)
    gains = gains_of(results, name, against, key)
    speed = f"{statistics.median(run.speed for run in runs.values()):.0f}" if runs else ""
    compared = "" if name == against else against
    cells = [name, spread(scores, ".2f"), compared, shown(gains), verdict(interval(gains)), speed]
    if protocol.rival:  # not of rows with another recipe, which have a baseline of their own
        beyond = gains_of(results, name, protocol.rival, key)
        cells.append(shown(beyond) if against == protocol.baseline else "")
    return cells


def gains_of(results: Results, name: str, other: str, key: str) -> list[float]:
    """What the runs of a row are above those of another, in points, seed by seed."""
    if name == other:
        return []
    runs = results[name]
    shared = [seed for seed in runs if seed in results[other]]
    return [100 * (runs[seed].last[key] - results[other][seed].last[key]) for seed in shared]


def shown(gains: Sequence[float]) -> str:
    """Their mean, and the interval that holds it."""
    if not gains:
        return ""
    mean = f"{statistics.mean(gains):+.2f}"
    ends = interval(gains)
    return f"{mean} ({ends[0]:+.2f} to {ends[1]:+.2f})" if ends else mean


def page_of(protocol: Protocol, path: Path, kept: Path) -> str:
    """path: of the protocol. kept: the folder of what is kept of all runs."""
    results = {name: read(kept, name) for name in protocol.rows}
    header = ["row", protocol.score, "compared with", "difference (95 %)", "verdict", "images/s"]
    if protocol.rival:
        header.append(f"beyond {protocol.rival} (95 %)")
    body = [cells_of(protocol, name, results) for name in protocol.rows]
    planned = sum(len(protocol.seeds_of(name)) for name in protocol.rows)
    made = sum(map(len, results.values()))
    blocks = [
        f"# {protocol.title}",
        protocol.about.strip(),
        markdown(header, body),
        f"Scores of the last epoch, times 100: mean ± standard deviation over n seeds. The "
        f"differences are\npaired by seed. {made} of {planned} runs have been made; what each "
        f"changes stands in [{path.name}]({path.name}),\nconfig and curve of each in "
        f"[{kept.name}/]({kept.name}). The page: `python -m bench.rows {path} --table`.",
    ]
    return "\n\n".join(blocks) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("protocol", type=Path, metavar="PROTOCOL.yaml")
    parser.add_argument("rows", nargs="*", metavar="ROW", help="those to run (default: all)")
    parser.add_argument("--seeds", nargs="+", type=argument(Seed), help="those to run")
    parser.add_argument("--runs", type=Path, help="default: runs/evidence/PROTOCOL")
    parser.add_argument("--root", help="folder of the data (default: that of the config)")
    parser.add_argument("--jobs", type=argument(Count), default=1, help="processes at a time")
    parser.add_argument("--table", action="store_true", help="run nothing")
    args = parser.parse_intermixed_args(argv)
    signals.exit_on_signals()
    kept = (ROOT / args.protocol).with_suffix("")
    runs = args.runs or Path("runs/evidence") / kept.name
    try:
        protocol = protocol_at(args.protocol)
        for name in args.rows:
            if name not in protocol.rows:
                parser.error(f"no row `{name}`: there are {', '.join(protocol.rows)}")
        wanted = []
        for name in [] if args.table else args.rows or protocol.rows:
            for seed in args.seeds or protocol.seeds_of(name):
                wanted.append((name, seed))
        if args.jobs > 1:
            command = [sys.executable, "-m", "bench.rows", str(args.protocol), "--runs", str(runs)]
            if args.root:
                command += ["--root", args.root]
            make_together(protocol, wanted, args.jobs, command)
        else:
            for name, seed in wanted:
                make(protocol, name, seed, kept, runs, args.root)
        text = page_of(protocol, args.protocol, kept)
        write_whole(kept.with_suffix(".md"), text)
        print(text)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
