"""Search settings with Optuna, which ends a trial that falls behind the median of others.

python -m examples.sweep configs/demo.yaml --trials 20 --out runs/sweep \\
    train.lr0=1e-3..1e-1 train.weight_decay=1e-5..1e-2 distill.attention.weight=0.05..5

Ranges are searched by the logarithm. Each trial is a run of train.py in OUT/trial_NNN;
the study is kept in OUT/study.db, and the same command goes on from there. It needs
`pip install -e '.[sweep]'`.
"""

import argparse
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from kdmini import config, memory, output, signals
from kdmini.bounds import Count
from kdmini.contracts import UserError
from kdmini.typed import argument
from train import train

try:
    import optuna
except ImportError:
    sys.exit("error: a sweep takes Optuna, which is not installed: pip install -e '.[sweep]'")

RANGE = re.compile(r"([\w.]+)=([\d.eE+-]+?)\.\.([\d.eE+-]+)")


class Range(NamedTuple):
    """The settings that are tried for a key of the config; both ends are above 0."""

    key: str
    low: float
    high: float


def read_range(text: str) -> Range:
    """key.path=low..high; raises UserError where it is not that."""
    match = RANGE.fullmatch(text)
    if not match or not 0 < float(match[2]) < float(match[3]):
        raise UserError(f"{text}: write a range as key.path=low..high, both above 0")
    return Range(match[1], float(match[2]), float(match[3]))


@contextmanager
def reported(metric: Any, trial: optuna.Trial) -> Iterator[list[float]]:
    """Within it, `metric` tells the study the fitness of every evaluation of the trial.

    metric: the class that the config names. It is changed in place, so that the config,
    and with it the run folder, is that of any run. Yields the fitnesses so far; raises
    optuna.TrialPruned where the study gives the trial up.
    """
    compute = metric.compute
    fitnesses: list[float] = []

    def compute_and_report(self: Any) -> dict[str, float]:
        scores = compute(self)
        fitness = scores[self.fitness]
        fitnesses.append(fitness)
        trial.report(fitness, len(fitnesses))
        if trial.should_prune():
            raise optuna.TrialPruned
        return scores

    metric.compute = compute_and_report
    try:
        yield fitnesses
    finally:
        metric.compute = compute


def sweep(path: str, ranges: list[Range], trials: int, out: Path) -> optuna.Study:
    """Runs that many more trials. Raises UserError for a wrong config or key."""

    def objective(trial: optuna.Trial) -> float:
        overrides = [f"run={out / f'trial_{trial.number:03d}'}"]
        for key, low, high in ranges:
            overrides.append(f"{key}={trial.suggest_float(key, low, high, log=True)!r}")
        settings = config.load(path, overrides)
        metric = config.locate(settings["metric"]["build"], f"{path}: metric.build")
        with reported(metric, trial) as fitnesses:
            train(settings, path)
        return max(fitnesses)

    out.mkdir(parents=True, exist_ok=True)
    storage = f"sqlite:///{out / 'study.db'}"
    study = optuna.create_study(
        storage=storage, study_name="sweep", load_if_exists=True, direction="maximize"
    )
    study.optimize(objective, trials)
    return study


def main(argv: list[str] | None = None) -> None:
    output.guard()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config")
    parser.add_argument("ranges", nargs="+", metavar="key.path=low..high")
    parser.add_argument("--trials", type=argument(Count), default=20)
    parser.add_argument("--out", type=Path, default=Path("runs/sweep"))
    args = parser.parse_intermixed_args(argv)
    signals.exit_on_signals()
    try:
        ranges = [read_range(text) for text in args.ranges]
        with memory.bounded(
            "lower train.batch or data.imgsz, or set data.storage=mapped, in CONFIG"
        ):
            study = sweep(args.config, ranges, args.trials, args.out)
    except UserError as error:
        sys.exit(f"error: {error}")
    best = study.best_trial
    folder = f"{args.out}/trial_{best.number:03d}"
    print(f"best: {folder}, {study.best_value:.4f} with {study.best_params}")


if __name__ == "__main__":
    main()
