"""The page of the evidence, bench/evidence/PROTOCOL.md: two tables and a picture.

All is made of the texts that bench/evidence.py keeps.
"""

import io
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.findings import (
    BOUND,
    SCORE,
    Result,
    Results,
    bound_of,
    deviation_of,
    gains_of,
    read,
    verdict,
)
from bench.protocol import BASELINE, TEACHER
from kdmini.files import write_whole
from kdmini.tools.compare import OKABE_ITO, markdown, spread

SCORES = ("AP50-95", "AP50", "VOC07")
RAW = "distance/raw"
ALIGNED = "distance/aligned"
OF_CLASS = f"{SCORE}AP "  # begins the column of a class

HEADER = [
    "row",
    *SCORES,
    "beyond alone",
    "verdict",
    "KD / task gradient",
    "distance",
    "aligned",
    "images/s",
    "command",
]
LEGEND = (
    "Scores are of the last epoch, times 100: mean ± standard deviation over n seeds. "
    "`beyond alone` is the\n"
    "difference in AP50-95, seed by seed; `ultralytics` is compared with "
    "`ultralytics_alone`, whose detection loss it shares.\n"
    "`KD / task gradient` is `train.py --check` on the student trained alone, "
    "at the first lambda, which is the largest. The\n"
    "distance is of the attention maps, summed over the taps, on held-out images, "
    "after training: without the align\n"
    "modules and with them."
)
NOISE = (
    "The seeds of one row differ by {deviation:.2f} (standard deviation, all rows together); "
    "{bound} standard errors of a\n"
    "difference are the line between `helps`, `hurts` and `within noise`."
)


def table(results: Results, command: str, seeds: Sequence[int]) -> str:
    """command: what comes before the name of a row to make it, with these seeds."""
    deviation = deviation_of(results)
    body = []
    for row, runs in results.items():
        again = f"{command} {row}"
        if set(runs) - set(seeds):
            again += f" --seeds {' '.join(map(str, sorted(runs)))}"
        body.append([row, *cells_of(results, row, deviation), f"`{again}`"])
    text = f"{markdown(HEADER, body)}\n\n{LEGEND}"
    if not math.isnan(deviation):
        text += "\n" + NOISE.format(deviation=deviation, bound=BOUND)
    return text


def cells_of(results: Results, row: str, deviation: float) -> list[str]:
    """A line of the table, without the name of the row and the command."""
    runs = list(results[row].values())
    gains = gains_of(results, row) if row != BASELINE else []
    last = [run.last for run in runs]
    ratios = [f"{run.ratio:.1%}" for run in runs if run.ratio is not None]
    speed = f"{statistics.median(run.speed for run in runs):.0f}" if runs else ""
    return [
        *(spread(percents(last, SCORE + name), ".2f") for name in SCORES),
        spread(gains, "+.2f"),
        verdict(gains, deviation),
        ratios[0] if ratios else "",
        mean_of(last, RAW),
        mean_of(last, ALIGNED),
        speed,
    ]


def percents(records: Sequence[dict[str, float]], key: str) -> list[float]:
    """Of the records that have the key."""
    return [100 * record[key] for record in records if key in record]


def mean_of(records: Sequence[dict[str, float]], key: str) -> str:
    """Over the records that have the key; empty where none has."""
    values = [record[key] for record in records if key in record]
    return f"{statistics.mean(values):.2f}" if values else ""


def by_class(results: Results) -> str:
    """AP50-95 of each class that was logged."""
    logged: dict[str, None] = {}  # keys, in the order in which they come
    for runs in results.values():
        for run in runs.values():
            logged |= dict.fromkeys(run.last)
    columns = [key for key in logged if key.startswith(OF_CLASS)]

    body = []
    for row, runs in results.items():
        if runs:
            last = [run.last for run in runs.values()]
            body.append([row, *(spread(percents(last, key), ".1f") for key in columns)])
    return markdown(["AP50-95", *(key.removeprefix(OF_CLASS) for key in columns)], body)


def draw(results: Results, path: Path) -> None:
    """Each seed's gain a dot, their mean a bar, and the noise grey."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print("no picture: it takes matplotlib, `pip install -e '.[plots]'`")
    gains = {row: gains_of(results, row) for row in results if row != BASELINE}
    drawn = {row: values for row, values in gains.items() if values}
    deviation = deviation_of(results)

    figure = Figure(figsize=(8, 1.2 + 0.4 * len(drawn)), layout="constrained")
    axes = figure.subplots()
    axes.use_sticky_edges = False
    axes.axvline(0, color="0.5", linewidth=1)
    for y, values in enumerate(drawn.values()):
        draw_row(axes, y, values, deviation)
    axes.set(
        yticks=range(len(drawn)),
        yticklabels=list(drawn),
        xlabel="AP50-95 beyond the student alone, points",
    )
    axes.set_ylim(len(drawn) - 0.5, -0.5)
    axes.legend(fontsize="small")

    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150)
    write_whole(path, content.getvalue())


def draw_row(axes: Any, y: int, gains: list[float], deviation: float) -> None:
    def label(text: str) -> str | None:
        return text if y == 0 else None  # once in the legend

    if not math.isnan(deviation):
        bound = bound_of(deviation, len(gains))
        noise = label("within noise")
        axes.barh(y, 2 * bound, height=1.0, left=-bound, color="0.9", label=noise)
    seeds = label("a seed")
    axes.plot(gains, [y] * len(gains), "o", color=OKABE_ITO[0], label=seeds)
    mean = statistics.mean(gains)
    axes.plot([mean], [y], "|", color=OKABE_ITO[5], markersize=18, label=label("mean"))


def write(folder: Path, rows: Sequence[str], seeds: Sequence[int]) -> None:
    """Reads FOLDER/ROW-SEED/; writes FOLDER.md and prints it.

    And FOLDER.png, where there is something to draw.
    """
    name = folder.name
    results = {row: read(folder, row) for row in rows}
    planned = len(rows) * len(seeds)
    missing = sum(seed not in runs for runs in results.values() for seed in seeds)
    blocks = [
        f"# Evidence: {name}",
        f"Made by `python -m bench.evidence {name} --table`. What all rows share is in "
        f"[{name}.yaml]({name}.yaml), config and curve of each run in [{name}/]({name}). "
        f"{missing} of {planned} runs are yet to be made.",
    ]
    if any(gains_of(results, row) for row in rows if row != BASELINE):
        blocks.append(f"![Gains by row]({name}.png)")
        draw(results, folder.with_suffix(".png"))
    blocks.append(f"The teacher: {scores_of_teacher(read(folder, TEACHER))}.")
    blocks.append(table(results, f"python -m bench.evidence {name}", seeds))
    if any(results.values()):
        blocks += ["By class, where the set has objects enough:", by_class(results)]
    text = "\n\n".join(blocks)
    write_whole(folder.with_suffix(".md"), text + "\n")
    print(text)


def scores_of_teacher(runs: dict[int, Result]) -> str:
    if not runs:
        return "not trained yet"
    last = next(iter(runs.values())).last
    return ", ".join(f"{name} {100 * last[SCORE + name]:.2f}" for name in SCORES)
