"""Which recipe tunes public weights without making them worse.

python -m bench.recipes [NAME ...] [--seeds 0 1 2] [--jobs 2] [--record FILE] [key=value ...]

Each recipe is bench/recipes.yaml with its overrides, one run of train.py a seed, several at
a time. The table has AP50-95 of the best and of the last epoch, and, in its first row, of the
weights as they are. A run that is done is not made again.
"""

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from bench.measure import machine

ROOT = Path(__file__).parents[1]
CONFIG = "bench/recipes.yaml"
UNTOUCHED = "untouched"
SCORE = "score/AP50-95"

# the augmentation of a letterbox that is only mirrored
STILL = ["data.augment={mosaic: 0, scale: 0, translate: 0, hsv_h: 0, hsv_s: 0, hsv_v: 0}"]
NO_MOSAIC = ["data.augment={mosaic: 0}"]
ALL = [
    "data.train={build: kdmini.detection.voc:VOC, splits: [train]}",
    "train.epochs=3",
    "train.val_every=1",
]

RECIPES = {
    # on all 3,000 photographs, as many images seen
    "all, lr 0.001": [*ALL, "train.lr0=0.001"],
    "all, lr 0.0003, no mosaic": [*ALL, *NO_MOSAIC, "train.lr0=0.0003"],
    "lr 0.01": ["train.lr0=0.01"],
    "lr 0.003": ["train.lr0=0.003"],
    "lr 0.001": ["train.lr0=0.001"],
    "lr 0.0003": ["train.lr0=0.0003"],
    "lr 0.0001": ["train.lr0=0.0001"],
    "lr 0.001, no mosaic": [*NO_MOSAIC, "train.lr0=0.001"],
    "lr 0.0003, no mosaic": [*NO_MOSAIC, "train.lr0=0.0003"],
    "lr 0.0001, no mosaic": [*NO_MOSAIC, "train.lr0=0.0001"],
    "lr 0.001, mirrored alone": [*STILL, "train.lr0=0.001"],
    "lr 0.0003, mirrored alone": [*STILL, "train.lr0=0.0003"],
}


def folder_of(name: str, seed: str) -> str:
    """Of the run of a recipe. seed: a number, or a pattern of numbers."""
    return f"{name.replace(', ', '-').replace(' ', '_')}-{seed}"


def make(name: str, seed: int, runs: Path, overrides: list[str]) -> str:
    """One run; the last line it printed."""
    folder = runs / folder_of(name, str(seed))
    if (folder / "best.pt").exists():
        return "done before"
    command = [sys.executable, "train.py", "--config", CONFIG, *RECIPES[name]]
    done = subprocess.run(
        [*command, f"seed={seed}", f"run={folder}", "compile=false", *overrides],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    said = done.stdout if done.returncode == 0 else done.stderr
    return said.strip().splitlines()[-1]


def scores(name: str, runs: Path) -> tuple[list[float], list[float]]:
    """AP50-95 of the best and of the last epoch, of each seed that is there."""
    best = []
    last = []
    for folder in sorted(runs.glob(folder_of(name, "[0-9]*"))):
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        of_run = [record[SCORE] for record in records if SCORE in record]
        if of_run:
            best.append(max(of_run))
            last.append(of_run[-1])
    return best, last


def row(name: str, best: list[float], last: list[float]) -> str:
    def text(values: list[float]) -> str:
        if not values:
            return "-"
        spread = f" ± {100 * np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
        return f"{100 * np.mean(values):.2f}{spread}"

    return f"| {name} | {text(best)} | {text(last)} | {len(best)} |"


def untouched(overrides: list[str]) -> str:
    """What eval.py says of the weights as they are."""
    command = [sys.executable, "eval.py", "--config", CONFIG, *overrides]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.stdout if done.returncode == 0 else done.stderr


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("arguments", nargs="*", metavar="NAME or key=value")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--runs", type=Path, default=Path("runs/recipes"))
    parser.add_argument("--record", type=Path)
    args = parser.parse_intermixed_args()
    overrides = [argument for argument in args.arguments if "=" in argument]
    names = [argument for argument in args.arguments if "=" not in argument] or list(RECIPES)
    runs = args.runs.absolute()

    print(untouched(overrides), flush=True)
    with ThreadPoolExecutor(args.jobs) as pool:
        waiting = {
            (name, seed): pool.submit(make, name, seed, runs, overrides)
            for seed in args.seeds
            for name in names
        }
        for (name, seed), future in waiting.items():
            print(f"{name}, seed {seed}: {future.result()}", flush=True)
            table = ["| recipe | best | last | seeds |", "|---|---|---|---|"]
            table += [row(name, *scores(name, runs)) for name in names]
            if args.record:
                args.record.write_text("\n".join([machine("cpu"), *table]) + "\n")
    print("\n".join(table))


if __name__ == "__main__":
    main()
