"""Compare runs in one table and one picture.

python -m kdmini.tools.compare RUN RUN ... [--out FOLDER]

Writes compare.md, which is printed too, and compare.png. Runs whose configs
differ in `seed`, `run` and `log` alone are one row, named by the settings in
which it differs from other rows, or by its first folder where those fill a
line. Further rows are also compared with the first, seed by seed: that takes
out what a seed does to both. Which scores of a row are shown, and which of them
picks the best epoch, is up to the metric in its config.
"""

import argparse
import io
import math
import statistics
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdmini import output
from kdmini.contracts import UserError
from kdmini.files import write_whole
from kdmini.tools.rows import Row, Run, group, names_of, read_run, settings_of
from kdmini.tools.scores import SCORE, Scores, best_of, metric_of, scores_of_rows

SPEED = "images/s"
DISTANCE = "distance/raw"

OKABE_ITO = (  # colours that everybody can tell apart
    "#0072B2",  # blue
    "#E69F00",  # orange
    "#009E73",  # bluish green
    "#CC79A7",  # reddish purple
    "#56B4E9",  # sky blue
    "#D55E00",  # vermilion
    "#000000",  # black
)
LEGEND_WIDTH = 60  # characters of a line in the legend of the picture

# of Student's t, the value that 97.5 % lie below, for 1, 2, 3, ... degrees of freedom
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)

EXPLANATION = (
    "Scores are those of the best epoch by {fitness}, the one in best.pt. "
    "Mean ± standard deviation over n seeds, of which n=1\n"
    "has none. images/s is the median over the epochs, "
    "distance/raw the attention distance after the last evaluation."
)


def report(rows: list[Row], scores: list[Scores]) -> str:
    """The tables, what they mean, and what is to be known of rows and runs.

    scores: of each row.
    """
    names = names_of(rows)
    columns = list(dict.fromkeys(column for of_row in scores for column in of_row.names))
    header = ["row", *columns, "best epoch", SPEED, DISTANCE, "runs"]
    body = [
        [name, *cells_of(row, of_row, columns)]
        for name, row, of_row in zip(names, rows, scores, strict=True)
    ]
    blocks = [markdown(header, body)]

    first = scores[0]
    paired = []
    for name, row in zip(names[1:], rows[1:], strict=True):
        gains = gains_of(row, rows[0], first)
        if any(gains):
            paired.append([name, *(spread(gain, "+.4f") for gain in gains)])
    if paired:
        blocks.append("Difference from the first row, seed by seed:")
        blocks.append(markdown(["row", *first.names], paired))

    blocks.append(EXPLANATION.format(fitness=first.fitness))
    settings = settings_of(rows)
    if names != settings:
        blocks += [f"{name}: {text}" for name, text in zip(names, settings, strict=True)]
    blocks += other_metrics(rows, names, scores)
    remarks = [unfinished(run) for row in rows for run in row]
    blocks += [remark for remark in remarks if remark]
    return "\n\n".join(blocks) + "\n"


def cells_of(row: Row, scores: Scores, columns: list[str]) -> list[str]:
    """A line of the table without the name: scores, best epochs, speed, and so on."""
    evaluations = [best_of(run, scores) for run in row]
    epochs = [str(best.epoch) if best else "-" for best in evaluations]
    speeds = [list(run.series(SPEED).values()) for run in row]
    distances = [list(run.series(DISTANCE).values()) for run in row]
    folders = [f"{Path(run.path).name} (seed {run.seed})" for run in row]

    cells = []
    for name in columns:
        values = [best.scores[name] for best in evaluations if best and name in best.scores]
        cells.append(spread(values))
    return [
        *cells,
        ", ".join(epochs),
        spread([statistics.median(values) for values in speeds if values], ".1f"),
        spread([values[-1] for values in distances if values]),
        ", ".join(folders),
    ]


def gains_of(row: Row, first: Row, scores: Scores) -> list[list[float]]:
    """For each score: what runs have more than those of the first row, by seed."""
    gains: dict[str, list[float]] = {name: [] for name in scores.names}
    for other in first:
        for run in row:
            if run.seed != other.seed:
                continue
            before = best_of(other, scores)
            after = best_of(run, scores)
            if before is None or after is None:
                continue
            for name in before.scores.keys() & after.scores.keys():
                gains[name].append(after.scores[name] - before.scores[name])
    return list(gains.values())


def other_metrics(rows: list[Row], names: list[str], scores: list[Scores]) -> list[str]:
    """A line for each row that was not scored by the metric of the first one."""
    metric = metric_of(rows[0][0])
    return [
        f"{name}: scored by {metric_of(row[0])}, best epoch by {of_row.fitness}"
        for name, row, of_row in zip(names, rows, scores, strict=True)
        if metric_of(row[0]) != metric
    ]


def unfinished(run: Run) -> str:
    """A line on a run that is not at the end of its epochs; empty for one that is."""
    section = run.settings.get("train")
    planned = section.get("epochs") if isinstance(section, Mapping) else None
    done = len(run.series(SPEED))
    if done == planned:
        return ""
    reasons = "under way, stopped, or ended by train.patience"
    return f"{run.path}: {done} of {planned} epochs: {reasons}"


def spread(values: list[float], form: str = ".4f") -> str:
    """Mean ± standard deviation with n; a dash for nothing."""
    if not values:
        return "-"
    text = f"{statistics.mean(values):{form}}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values):{form.lstrip('+')}}"
    return f"{text} (n={len(values)})"


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The ends of what holds the mean with 95 %; None of one value, or of too many."""
    freedom = len(values) - 1
    if not 0 < freedom <= len(T_975):
        return None
    half = T_975[freedom - 1] * statistics.stdev(values) / math.sqrt(len(values))
    mean = statistics.mean(values)
    return mean - half, mean + half


def verdict(ends: tuple[float, float] | None) -> str:
    """Empty where there are too few runs to tell."""
    if ends is None:
        return ""
    low, high = ends
    if low > 0:
        return "helps"
    return "hurts" if high < 0 else "cannot be told"


def markdown(header: list[str], body: list[list[str]]) -> str:
    """A table whose columns are of one width."""
    table = [[cell.replace("|", r"\|") for cell in row] for row in (header, *body)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    table.insert(1, ["-" * width for width in widths])
    lines = []
    for row in table:
        cells = [f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def curves(rows: list[Row], key: str) -> dict[str, dict[int, list[float]]]:
    """Row -> epoch, counted from 1 -> the number of that key of each run that has any.

    The epochs are those that all these runs have reached.
    """
    curve_of = {}
    for name, row in zip(names_of(rows), rows, strict=True):
        logged = [run.series(key) for run in row]
        scored = [series for series in logged if series]
        if not scored:
            continue
        curve_of[name] = {
            epoch + 1: [series[epoch] for series in scored]
            for epoch in scored[0]
            if all(epoch in series for series in scored)
        }
    return curve_of


def draw(rows: list[Row], fitness: str, path: Path) -> str:
    """Writes the curves -> a line that says so, or why there is no picture."""
    drawn = curves(rows, SCORE + fitness)
    if not any(drawn.values()):
        return f"no picture: no epoch with {fitness} yet"
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        return "no picture: it takes matplotlib, `pip install -e '.[plots]'` in the checkout"

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for i, (name, curve) in enumerate(drawn.items()):
        draw_curve(axes, i, name, curve)
    several = any(len(values) > 1 for curve in drawn.values() for values in curve.values())
    title = "mean over seeds, band from lowest to highest" if several else None
    axes.set(xlabel="epoch", ylabel=fitness, title=title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")

    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150)
    write_whole(path, content.getvalue())
    return f"curves: {path}"


def draw_curve(axes: Any, i: int, name: str, curve: dict[int, list[float]]) -> None:
    """The mean over the runs of row i, and a band from the lowest to the highest.

    curve: epoch -> the fitness of each run.
    """
    epochs = list(curve)
    means = [statistics.mean(values) for values in curve.values()]
    lows = [min(values) for values in curve.values()]
    highs = [max(values) for values in curve.values()]
    n = max(map(len, curve.values()), default=0)

    colour = OKABE_ITO[i % len(OKABE_ITO)]
    style = "-" if i < len(OKABE_ITO) else "--"
    text = textwrap.fill(f"{name} (n={n})", LEGEND_WIDTH)
    # matplotlib leaves out a label that begins with _, and $ begins a formula
    label = " " + text.replace("$", r"\$")
    axes.plot(epochs, means, style, color=colour, marker=".", label=label)
    axes.fill_between(epochs, lows, highs, color=colour, alpha=0.2, linewidth=0)


def compare(runs: list[Run], out: Path) -> None:
    """Prints the report; writes it and the picture to `out`. Raises UserError."""
    rows = group(runs)
    scores = scores_of_rows(rows)
    text = report(rows, scores)
    print(text)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be made ({error.strerror}); name another --out") from error
    write_whole(out / "compare.md", text)
    print(draw(rows, scores[0].fitness, out / "compare.png"))


def main(argv: list[str] | None = None) -> None:
    output.guard(needed=True)
    parser = argparse.ArgumentParser(
        prog="python -m kdmini.tools.compare", description="Compare runs in a table and a picture."
    )
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="a run folder; the first gives the row to compare with",
    )
    parser.add_argument(
        "--out", type=Path, default=Path(), help="folder to write to (default: this one)"
    )
    args = parser.parse_args(argv)

    runs = []
    for path in args.runs:
        try:
            runs.append(read_run(path))
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
    if runs:
        try:
            compare(runs, args.out)
        except UserError as error:
            sys.exit(f"error: {error}")
    if len(runs) < len(args.runs):
        sys.exit(1)


if __name__ == "__main__":
    main()
