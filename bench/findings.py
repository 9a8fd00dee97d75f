"""What the kept texts of the evidence say: the runs of each row, how rows differ."""

import csv
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from bench.protocol import BASELINE, PEER, PEER_BASELINE

# columns of results.csv
SCORE = "score/"  # begins that of a score
AP = SCORE + "AP50-95"
SPEED = "images/s"

BOUND = 2.5  # standard errors of a difference, which two equal rows seldom exceed
RATIO = re.compile(r"KD / task gradient +([\d.]+)%")  # in what --check says


class Result(NamedTuple):
    """What is kept of a finished run."""

    last: dict[str, float]  # of the last epoch; of the best, it would be chosen
    speed: float  # images/s, median over the epochs
    ratio: float | None  # KD / task gradient, where it was measured


# row -> seed -> what came out; an empty row has no run yet
Results = Mapping[str, Mapping[int, Result]]


def read(folder: Path, row: str) -> dict[int, Result]:
    """The runs of a row, by seed."""
    results = {}
    for path in sorted(folder.glob(f"{row}-*/results.csv")):
        seed = int(path.parent.name.removeprefix(f"{row}-"))
        results[seed] = read_run(path)
    return results


def read_run(path: Path) -> Result:
    """path: of its results.csv; check.txt may be beside it."""
    with path.open(newline="") as file:
        records = [
            {key: float(value) for key, value in line.items() if value}
            for line in csv.DictReader(file)
        ]
    speeds = [record[SPEED] for record in records if SPEED in record]
    check = path.with_name("check.txt")
    match = RATIO.search(check.read_text()) if check.exists() else None
    ratio = float(match[1]) / 100 if match else None
    return Result(records[-1], statistics.median(speeds), ratio)


def points_of(runs: Mapping[int, Result]) -> list[float]:
    """AP50-95, times 100, of each run of a row."""
    return [100 * run.last[AP] for run in runs.values()]


def gains_of(results: Results, row: str) -> list[float]:
    """Points beyond the baseline, seed by seed; PEER has a baseline of its own."""
    base = results[PEER_BASELINE if row == PEER else BASELINE]
    return [
        100 * (run.last[AP] - base[seed].last[AP])
        for seed, run in results[row].items()
        if seed in base
    ]


def deviation_of(results: Results) -> float:
    """Standard deviation between the seeds of a row, in points.

    Of all rows together (the mean square within the groups of an analysis of variance),
    for two seeds say little. NaN where no row has two.
    """
    groups = [points_of(runs) for runs in results.values() if len(runs) > 1]
    freedom = sum(len(group) - 1 for group in groups)
    if not freedom:
        return math.nan
    squares = sum(statistics.variance(group) * (len(group) - 1) for group in groups)
    return math.sqrt(squares / freedom)


def bound_of(deviation: float, n: int) -> float:
    """How far the means of two equal rows of n seeds may lie apart."""
    return BOUND * deviation * math.sqrt(2 / n)


def verdict(gains: Sequence[float], deviation: float) -> str:
    """Empty where there are too few runs to tell."""
    if len(gains) < 2 or math.isnan(deviation):
        return ""
    mean = statistics.mean(gains)
    if abs(mean) <= bound_of(deviation, len(gains)):
        return "within noise"
    return "helps" if mean > 0 else "hurts"
