"""Search settings with Optuna; a trial that falls behind the median of the others is ended early.

python -m examples.sweep configs/demo.yaml --trials 20 --out runs/sweep \\
    train.lr0=1e-3..1e-1 train.weight_decay=1e-5..1e-2 distill.attention.weight=0.05..5

Ranges are searched by the logarithm. Each trial is a run of train.py in OUT/trial_NNN; the study is
kept in OUT/study.db, and the same command goes on from there. It needs `pip install
'kdmini[sweep]'`. """

import argparse
import re
import sys
from pathlib import Path
from typing import Any

import train
from kdmini import config, signals
from kdmini.contracts import Detections, Target, UserError

try:
    import optuna
except ImportError:
    sys.exit("error: a sweep takes Optuna, which is not installed: pip install 'kdmini[sweep]'")

RANGE = re.compile(r"([\w.]+)=([\d.eE+-]+?)\.\.([\d.eE+-]+)")


class Watched:
    """The config's metric. It tells the study of every score, and ends a trial that the study gives
    up.
    """

    trial: optuna.Trial  # the one that runs
    scores: list[float]  # of its evaluations so far

    def __init__(self, names: list[str], of: dict[str, Any]):
        self.metric = config.build(of, "metric", names=names)
        self.fitness = self.metric.fitness

    def update(self, detections: list[Detections], targets: list[Target]) -> None:
        self.metric.update(detections, targets)

    def compute(self) -> dict[str, float]:
        found = self.metric.compute()
        self.scores.append(found[self.fitness])
        self.trial.report(found[self.fitness], len(self.scores))
        if self.trial.should_prune():
            raise optuna.TrialPruned
        return found


def sweep(
    path: str, ranges: dict[str, tuple[float, float]], trials: int, out: Path
) -> optuna.Study:
    """Runs that many more trials. Raises UserError for a config or a key that is wrong."""

    def objective(trial: optuna.Trial) -> float:
        chosen = [
            f"{key}={trial.suggest_float(key, *ends, log=True)!r}" for key, ends in ranges.items()
        ]
        settings = config.load(path, [*chosen, f"run={out / f'trial_{trial.number:03d}'}"])
        settings["metric"] = {"build": f"{__name__}:Watched", "of": settings["metric"]}
        Watched.trial, Watched.scores = trial, []
        config.call(
            train.train_detector, settings, path, settings=settings, resume=False, check=False
        )
        return max(Watched.scores)

    out.mkdir(parents=True, exist_ok=True)
    storage = f"sqlite:///{out / 'study.db'}"
    study = optuna.create_study(
        storage=storage, study_name="sweep", load_if_exists=True, direction="maximize"
    )
    study.optimize(objective, trials)
    return study


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config")
    parser.add_argument("ranges", nargs="+", metavar="key.path=low..high")
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("runs/sweep"))
    args = parser.parse_intermixed_args(argv)
    signals.exit_on_signals()
    try:
        found = {text: RANGE.fullmatch(text) for text in args.ranges}
        if wrong := [
            text
            for text, match in found.items()
            if not match or not 0 < float(match[2]) < float(match[3])
        ]:
            raise UserError(f"{wrong[0]}: write a range as key.path=low..high, both above 0")
        study = sweep(
            args.config,
            {m[1]: (float(m[2]), float(m[3])) for m in found.values() if m},
            args.trials,
            args.out,
        )
    except UserError as error:
        sys.exit(f"error: {error}")
    print(
        f"best: {args.out}/trial_{study.best_trial.number:03d}, {study.best_value:.4f} with {study.best_params}"
    )


if __name__ == "__main__":
    main()
