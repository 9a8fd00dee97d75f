"""One table and one picture over several runs: `python -m kdmini.tools.compare RUN RUN ... [--out
FOLDER]`.

Writes compare.md, which is printed too, and compare.png. Runs whose configs differ in `seed` and
`run` alone are one row, named by the settings in which it differs from other rows, or by its first
folder where those fill a line. Further rows are also compared with the first, seed by seed: that
takes out what a seed does to both."""

import argparse
import io
import statistics
import sys
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from kdmini import config
from kdmini.contracts import UserError
from kdmini.runlog import RunFolder, write_whole

SCORES = ("VOC07", "VOC", "AP50-95")
FITNESS = "AP50-95"  # picks the best epoch, as kdmini.detection.average_precision does
SPEED, DISTANCE = "images/s", "distance/raw"
LONGEST = 80  # name of a row
OKABE_ITO = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#D55E00",
    "#000000",
)  # told apart by everybody
LEGEND = """
Scores are those of the best epoch by AP50-95, the one in best.pt. Mean ± standard deviation over n seeds, of which n=1
has none. images/s is the median over the epochs, distance/raw the attention distance after the last evaluation."""


class Run(NamedTuple):
    """One run folder, finished or not."""

    path: str
    settings: dict[Any, Any]
    records: list[Any]

    @property
    def seed(self) -> str:
        return str(self.settings.get("seed", 0))

    @property
    def setup(self) -> dict[Any, Any]:
        return {key: value for key, value in self.settings.items() if key not in ("seed", "run")}

    def series(self, key: str) -> dict[int, float]:
        """epoch -> value, in order, where it is a finite number."""
        logged = (
            record
            for record in self.records
            if isinstance(record, dict) and type(record.get("epoch")) is int
        )
        found = {record["epoch"]: record.get(key) for record in logged if record["epoch"] >= 0}
        return {
            e: v for e, v in sorted(found.items()) if isinstance(v, int | float) and abs(v) < 1e300
        }

    def best(self) -> dict[str, float]:
        """The epoch, counted from 1, with the highest FITNESS, and the scores there; {} before the
        first evaluation.
        """
        fitness = self.series(FITNESS)
        if not fitness:
            return {}
        epoch = max(fitness, key=lambda e: fitness[e])  # the first of equals, as in training
        scores = {key: self.series(key).get(epoch) for key in SCORES}
        return {
            "epoch": epoch + 1,
            **{key: value for key, value in scores.items() if value is not None},
        }


def read_run(path: str) -> Run:
    """Raises UserError for a folder that is none of a run; a run without an evaluated epoch is
    fine.
    """
    if not (Path(path) / "config.yaml").is_file():
        raise UserError(
            f"{path}: has no config.yaml, so it is not a run; name a folder that train.py has written"
        )
    try:
        records = RunFolder(path, lead=False).records()
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path}/metrics.jsonl: cannot be read ({error}); repair it or leave the run out"
        ) from error
    return Run(path, config.load(Path(path) / "config.yaml"), records)


def group(runs: list[Run]) -> list[list[Run]]:
    """Rows in the order of their first runs. Raises UserError for two runs with one config and one
    seed.
    """
    rows: list[list[Run]] = []
    for run in runs:
        for row in rows:
            if not list(differences({0: row[0].setup, 1: run.setup})):
                if twin := next((other for other in row if other.seed == run.seed), None):
                    raise UserError(
                        f"{run.path}: same config and seed as {twin.path}; name one of the two"
                    )
                row.append(run)
                break
        else:
            rows.append([run])
    return rows


def differences(values: dict[int, Any], path: tuple = ()) -> Iterator[tuple[tuple, dict[int, Any]]]:
    """values: number of the config -> a section of it. -> the paths at which those are not all the
    same, and what is there, None for nothing; a config that ends above a path has no value there.
    """
    sections = {i: value for i, value in values.items() if isinstance(value, Mapping)}
    first = next(iter(values.values()))
    if len(sections) < len(values) and any(value != first for value in values.values()):
        yield path, values
    for key in dict.fromkeys(key for section in sections.values() for key in section):
        yield from differences(
            {i: section.get(key) for i, section in sections.items()}, (*path, key)
        )


def label(rows: list[list[Run]]) -> list[str]:
    """A name for each row: the settings in which it differs from others, or the folder of the only
    row.
    """
    found = list(differences({i: row[0].setup for i, row in enumerate(rows)}))
    parts: list[list[str]] = [[] for _ in rows]
    for path, values in found:
        # the end of the path that is no other path's
        lengths = (
            n
            for n in range(1, len(path))
            if sum(other[-n:] == path[-n:] for other, _ in found) == 1
        )
        key = ".".join(map(str, path[-next(lengths, len(path)) :]))
        for i, value in values.items():
            parts[i].append(f"{key} unset" if value is None else f"{key}={told(value)}")
    return [
        ", ".join(part) or Path(row[0].path).name for part, row in zip(parts, rows, strict=True)
    ]


def name_of(rows: list[list[Run]]) -> list[str]:
    """Labels, or folders if one of the labels is too long for a table."""
    labels = label(rows)
    return labels if max(map(len, labels)) <= LONGEST else [row[0].path for row in rows]


def told(value: Any) -> str:
    """A section by what it builds, or by the sections in it."""
    if isinstance(value, Mapping):
        inner = "+".join(str(key) for key, section in value.items() if isinstance(section, Mapping))
        return str(value.get("build", "")).rpartition(":")[2] or inner or "given"
    return str(value).lower() if isinstance(value, bool) else " ".join(str(value).split())


def spread(values: list[float], form: str = ".4f") -> str:
    """Mean ± standard deviation with n; a dash for nothing."""
    if not values:
        return "-"
    more = f" ± {statistics.stdev(values):{form.lstrip('+')}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{more} (n={len(values)})"


def markdown(header: list[str], body: list[list[str]]) -> str:
    table = [[cell.replace("|", r"\|") for cell in row] for row in (header, *body)]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    table.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "| " + " | ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)) + " |"
        for row in table
    )


def report(rows: list[list[Run]]) -> str:
    """The tables, what they mean, and which runs are not at their end."""
    body, paired, names = [], [], name_of(rows)
    for name, row in zip(names, rows, strict=True):
        best = [run.best() for run in row]
        scores = [spread([b[key] for b in best if key in b]) for key in SCORES]
        epochs = ", ".join(f"{b['epoch']:.0f}" if b else "-" for b in best)
        speeds = [statistics.median(speed.values()) for run in row if (speed := run.series(SPEED))]
        last = [list(distance.values())[-1] for run in row if (distance := run.series(DISTANCE))]
        folders = ", ".join(f"{Path(run.path).name} (seed {run.seed})" for run in row)
        body.append([name, *scores, epochs, spread(speeds, ".1f"), spread(last), folders])

        pairs = [
            (other.best(), run.best()) for other in rows[0] for run in row if other.seed == run.seed
        ]
        gains = [[b[key] - a[key] for a, b in pairs if key in a and key in b] for key in SCORES]
        if row is not rows[0] and any(gains):
            paired.append([name, *(spread(gain, "+.4f") for gain in gains)])

    text = markdown(["row", *SCORES, "best epoch", SPEED, DISTANCE, "runs"], body) + "\n"
    if paired:
        text += f"\nDifference from the first row, seed by seed:\n\n{markdown(['row', *SCORES], paired)}\n"
    text += LEGEND + "\n"
    if names != (labels := label(rows)):
        text += "".join(f"\n{name}: {full}\n" for name, full in zip(names, labels, strict=True))
    for run in (run for row in rows for run in row):
        section = run.settings.get("train")
        planned = section.get("epochs") if isinstance(section, Mapping) else None
        done = len(run.series(SPEED))
        if done != planned:
            text += f"\n{run.path}: {done} of {planned} epochs: under way, stopped, or ended by train.patience\n"
    return text


def curves(rows: list[list[Run]]) -> dict[str, dict[int, list[float]]]:
    """Row -> epoch, counted from 1 -> FITNESS of each run, at the epochs that all runs of the row
    have reached.
    """
    found = {}
    for name, row in zip(name_of(rows), rows, strict=True):
        if scored := [series for run in row if (series := run.series(FITNESS))]:
            shared = [epoch for epoch in scored[0] if all(epoch in series for series in scored)]
            found[name] = {epoch + 1: [series[epoch] for series in scored] for epoch in shared}
    return found


def draw(rows: list[list[Run]], path: Path) -> str:
    """Writes the curves, and says so; without matplotlib, or anything to draw, says why not."""
    drawn = curves(rows)
    if not any(drawn.values()):
        return f"no picture: no epoch with {FITNESS} yet"
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        return "no picture: it takes matplotlib, `pip install 'kdmini[plots]'`"
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for i, (name, curve) in enumerate(drawn.items()):
        n = max(map(len, curve.values()), default=0)
        legend = " " + textwrap.fill(f"{name} (n={n})", 60).replace(
            "$", r"\$"
        )  # _ would hide it, $ begin a formula
        colour, style = OKABE_ITO[i % len(OKABE_ITO)], "-" if i < len(OKABE_ITO) else "--"
        means = [statistics.mean(values) for values in curve.values()]
        axes.plot(list(curve), means, style, color=colour, marker=".", label=legend)
        lows, highs = (
            [min(values) for values in curve.values()],
            [max(values) for values in curve.values()],
        )
        axes.fill_between(list(curve), lows, highs, color=colour, alpha=0.2, linewidth=0)
    several = any(len(values) > 1 for curve in drawn.values() for values in curve.values())
    axes.set(
        xlabel="epoch",
        ylabel=FITNESS,
        title="mean over seeds, band from lowest to highest" if several else None,
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150)
    write_whole(path, content.getvalue())
    return f"curves: {path}"


def main(argv: list[str] | None = None) -> None:
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
    arguments = parser.parse_args(argv)
    runs, faulty = [], False
    for path in arguments.runs:
        try:
            runs.append(read_run(path))
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            faulty = True
    if runs:
        try:
            rows = group(runs)
            text = report(rows)
            print(text)
            arguments.out.mkdir(parents=True, exist_ok=True)
            write_whole(arguments.out / "compare.md", text)
            print(draw(rows, arguments.out / "compare.png"))
        except UserError as error:
            sys.exit(f"error: {error}")
        except OSError as error:
            sys.exit(
                f"error: {arguments.out}: cannot be made ({error.strerror}); name another --out"
            )
    if faulty:
        sys.exit(1)


if __name__ == "__main__":
    main()
