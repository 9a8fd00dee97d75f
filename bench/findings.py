"""The table and the picture of bench/evidence.py, made of the texts that it keeps."""

import csv
import io
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from kdmini.runlog import write_whole
from kdmini.tools.compare import OKABE_ITO, markdown, spread

TEACHER, BASELINE, PEER = "teacher", "alone", "ultralytics"  # the rows that have names everywhere
PEER_BASELINE = f"{PEER}_{BASELINE}"
SCORES = ("AP50-95", "AP50", "VOC07")
RAW, ALIGNED = "distance/raw", "distance/aligned"
BOUND = 2.5  # standard errors of a difference: what two rows of equal worth seldom exceed
RATIO = re.compile(r"KD / task gradient +([\d.]+)%")
LEGEND = """Scores are of the last epoch, times 100: mean ± standard deviation over n seeds. `beyond alone` is the
difference in AP50-95, seed by seed; `ultralytics` is compared with `ultralytics_alone`, whose detection loss it shares.
`KD / task gradient` is `train.py --check` on the student trained alone, at the first lambda, which is the largest. The
distance is of the attention maps, summed over the taps, on held-out images: before training and after it, the latter
without the align modules and with them."""
NOISE = """
The seeds of one row differ by {deviation:.2f} (standard deviation, all rows together); {bound} standard errors of a
difference are the line between `helps`, `hurts` and `within noise`."""


class Result(NamedTuple):
    """What is kept of a finished run."""

    first: dict[str, float]  # the record from before training
    last: dict[str, float]  # of the last epoch: not of the best, so that nothing is chosen
    speed: float  # images/s, median over the epochs
    ratio: float | None  # KD / task gradient, where it was measured


Results = Mapping[
    str, Mapping[int, Result]
]  # row -> seed -> what came out; an empty row has no run yet


def read(folder: Path, row: str) -> dict[int, Result]:
    """The runs of a row, by seed."""
    found = {}
    for path in sorted(folder.glob(f"{row}-*/results.csv")):
        with path.open(newline="") as file:
            records = [
                {key: float(value) for key, value in line.items() if value}
                for line in csv.DictReader(file)
            ]
        check = path.with_name("check.txt")
        ratio = RATIO.search(check.read_text()) if check.exists() else None
        speed = statistics.median(record["images/s"] for record in records if "images/s" in record)
        seed = int(path.parent.name.removeprefix(f"{row}-"))
        found[seed] = Result(
            records[0], records[-1], speed, float(ratio[1]) / 100 if ratio else None
        )
    return found


def gain(results: Results, row: str, key: str = SCORES[0]) -> list[float]:
    """Points beyond the baseline, seed by seed."""
    base = results[PEER_BASELINE if row == PEER else BASELINE]
    return [
        100 * (run.last[key] - base[seed].last[key])
        for seed, run in results[row].items()
        if seed in base
    ]


def deviation_of(results: Results, key: str = SCORES[0]) -> float:
    """Standard deviation between the seeds of a row, in points; of all rows, for two seeds say
    little.
    """
    groups = [
        [100 * run.last[key] for run in runs.values()] for runs in results.values() if len(runs) > 1
    ]
    freedom = sum(len(group) - 1 for group in groups)
    return (
        math.sqrt(sum(statistics.variance(g) * (len(g) - 1) for g in groups) / freedom)
        if freedom
        else math.nan
    )


def bound_of(deviation: float, n: int) -> float:
    """How far the means of two equal rows of n seeds may lie apart."""
    return BOUND * deviation * math.sqrt(2 / n)


def verdict(gained: Sequence[float], deviation: float) -> str:
    if len(gained) < 2 or math.isnan(deviation):
        return ""
    mean = statistics.mean(gained)
    return (
        "within noise"
        if abs(mean) <= bound_of(deviation, len(gained))
        else "helps"
        if mean > 0
        else "hurts"
    )


def table(results: Results, commands: str, seeds: Sequence[int]) -> str:
    """commands: what comes before the name of a row to make it, with these seeds."""
    deviation, body = deviation_of(results), []
    for row, runs in results.items():
        gained = gain(results, row) if row != BASELINE else []
        scores = [[100 * run.last[key] for run in runs.values()] for key in SCORES]
        distances = [[run.first[RAW] for run in runs.values() if RAW in run.first]]
        distances += [
            [run.last[key] for run in runs.values() if key in run.last] for key in (RAW, ALIGNED)
        ]
        cells = [
            *(spread(values, ".2f") for values in scores),
            spread(gained, "+.2f"),
            verdict(gained, deviation),
        ]
        cells.append(
            next((f"{run.ratio:.1%}" for run in runs.values() if run.ratio is not None), "")
        )
        cells += [f"{statistics.mean(values):.2f}" if values else "" for values in distances]
        cells.append(f"{statistics.median(run.speed for run in runs.values()):.0f}" if runs else "")
        named = f" --seeds {' '.join(map(str, sorted(runs)))}" if set(runs) - set(seeds) else ""
        body.append([row, *cells, f"`{commands} {row}{named}`"])
    header = ["row", *SCORES, "beyond alone", "verdict", "KD / task gradient"]
    header += ["distance before", "after", "after, aligned", "images/s", "command"]
    noise = "" if math.isnan(deviation) else NOISE.format(deviation=deviation, bound=BOUND)
    return f"{markdown(header, body)}\n\n{LEGEND}{noise}"


def by_class(results: Results) -> str:
    records = {row: [run.last for run in runs.values()] for row, runs in results.items() if runs}
    columns = list(
        dict.fromkeys(
            key for row in records.values() for last in row for key in last if key[:3] == "AP "
        )
    )
    body = [
        [
            row,
            *(spread([100 * last[key] for last in lasts if key in last], ".1f") for key in columns),
        ]
        for row, lasts in records.items()
    ]
    return markdown(["AP50-95", *(column[3:] for column in columns)], body)


def draw(results: Results, path: Path) -> None:
    """Each seed's gain a dot, their mean a bar, and the noise grey."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print("no picture: it takes matplotlib, `pip install 'kdmini[plots]'`")
    shown = {row: gained for row in results if row != BASELINE and (gained := gain(results, row))}
    deviation = deviation_of(results)
    figure = Figure(figsize=(8, 1.2 + 0.4 * len(shown)), layout="constrained")
    axes = figure.subplots()
    axes.use_sticky_edges = False
    axes.axvline(0, color="0.5", linewidth=1)
    for place, gained in enumerate(shown.values()):
        if not math.isnan(deviation):
            bound = bound_of(deviation, len(gained))
            axes.barh(
                place,
                2 * bound,
                1.0,
                -bound,
                color="0.9",
                label="within noise" if place == 0 else None,
            )
        axes.plot(
            gained,
            [place] * len(gained),
            "o",
            color=OKABE_ITO[0],
            label="a seed" if place == 0 else None,
        )
        mean = statistics.mean(gained)
        axes.plot(
            [mean],
            [place],
            "|",
            color=OKABE_ITO[5],
            markersize=18,
            label="mean" if place == 0 else None,
        )
    axes.set(
        yticks=range(len(shown)),
        yticklabels=list(shown),
        xlabel=f"{SCORES[0]} beyond the student alone, points",
    )
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.legend(fontsize="small")
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150)
    write_whole(path, content.getvalue())


def write(folder: Path, rows: Sequence[str], seeds: Sequence[int]) -> None:
    """Reads FOLDER/ROW-SEED/; writes FOLDER.md, prints it, and FOLDER.png where there is something
    to draw.
    """
    name = folder.name
    results = {row: read(folder, row) for row in rows}
    missing = f"{sum(seed not in runs for runs in results.values() for seed in seeds)} of {len(rows) * len(seeds)}"
    told = [
        ", ".join(f"{key} {100 * run.last[key]:.2f}" for key in SCORES)
        for run in read(folder, TEACHER).values()
    ]
    text = [
        f"# Evidence: {name}",
        f"Made by `python -m bench.evidence {name} --table`. What all rows share is in [{name}.yaml]({name}.yaml), "
        f"config and curve of each run in [{name}/]({name}). {missing} runs are yet to be made.",
        f"The teacher: {told[0] if told else 'not trained yet'}.",
        table(results, f"python -m bench.evidence {name}", seeds),
    ]
    if any(results.values()):
        text += ["By class, where the set has objects enough:", by_class(results)]
    if any(gain(results, row) for row in rows if row != BASELINE):
        text.insert(2, f"![Gains by row]({name}.png)")
        draw(results, folder.with_suffix(".png"))
    write_whole(folder.with_suffix(".md"), "\n\n".join(text) + "\n")
    print("\n\n".join(text))
