"""The curves of a run: the numbers of metrics.jsonl, each in the panel of its group."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.ticker import MaxNLocator

from kdmini.tools.draw import COLOURS, MARKERS, SMALL, Axes, Figure, blank, grid, style
from kdmini.tools.rows import is_finite

COLUMNS = 3  # of panels
WIDTH = 15.0  # inches
ROW_HEIGHT = 3.6  # inches
MOST_MARKERS = 12  # on a line, however many points it has

Line = list[tuple[float, float]]  # epoch, value


class Panel(NamedTuple):
    """One set of axes with lines."""

    title: str
    unit: str  # of the values
    lines: Mapping[str, Line]  # by label


def curves(records: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """Of the lines of metrics.jsonl."""
    panels = panels_of(records)
    rows = math.ceil(len(panels) / COLUMNS)
    figure = blank(WIDTH, ROW_HEIGHT * rows + 0.6, title)
    axes = grid(figure, len(panels), COLUMNS, sharex=True)
    for axis, panel in zip(axes, panels, strict=True):
        draw_panel(axis, panel)
    return figure


def panels_of(records: Sequence[Mapping[str, Any]]) -> list[Panel]:
    """Those that there are lines for. A loss whose name has a lambda is a term."""
    lines = lines_of(records)
    losses = group(lines, "loss/")
    lambdas = group(lines, "lambda/")
    of_model = {name: line for name, line in losses.items() if name not in lambdas}
    of_terms = {name: line for name, line in losses.items() if name in lambdas}
    distances = group(lines, "distance/")
    raw = group(distances, "raw/")
    aligned = group(distances, "aligned/")
    scores = group(lines, "score/")
    shares = {name: line for name, line in scores.items() if max(y for _, y in line) <= 1}
    counts = {name: line for name, line in scores.items() if name not in shares}
    mean = "mean over the epoch"
    panels = [
        Panel("Losses of the model, with their gains", mean, of_model),
        Panel("Losses of distillation, with weight and lambda", mean, of_terms),
        Panel("Lambda: how strongly a term counts", "lambda", lambdas),
        Panel(
            "Attention distance to the teacher, held-out images",
            "sum over the taps",
            named(distances, "aligned", "raw", "rolled", "constant"),
        ),
        Panel("Distance at each tap, student as it is (raw)", "distance", raw),
        Panel("Distance at each tap, after the align modules", "distance", aligned),
        Panel("Scores on the validation set", "score", shares),
        Panel("Scores above 1, such as counts", "score", counts),
        Panel("Learning rate", "", named(lines, "lr")),
        Panel("Speed of training", "", named(lines, "images/s")),
    ]
    return [panel for panel in panels if panel.lines]


def lines_of(records: Sequence[Mapping[str, Any]]) -> dict[str, Line]:
    """-> key: (epoch, finite number) of every record that has it; epoch 0 is before training."""
    lines: dict[str, Line] = {}
    for record in records:
        epoch = record["epoch"] + 1
        for key, value in record.items():
            if is_finite(value):
                lines.setdefault(key, []).append((epoch, value))
    return lines


def group(lines: Mapping[str, Line], prefix: str) -> dict[str, Line]:
    """The lines of a group of keys, by what follows the prefix."""
    return {key.removeprefix(prefix): line for key, line in lines.items() if key.startswith(prefix)}


def named(lines: Mapping[str, Line], *names: str) -> dict[str, Line]:
    """The lines of these names, where they are there."""
    return {name: lines[name] for name in names if name in lines}


def draw_panel(axis: Axes, panel: Panel) -> None:
    """A line that is alone is named beside its axis, others in a legend."""
    for number, (label, points) in enumerate(panel.lines.items()):
        x, y = zip(*points, strict=True)
        axis.plot(
            x,
            y,
            label=label,
            color=COLOURS[number % len(COLOURS)],
            marker=MARKERS[number % len(MARKERS)],
            markersize=4,
            markevery=math.ceil(len(points) / MOST_MARKERS),
        )
    labels = list(panel.lines)
    alone = len(labels) == 1
    words = [*labels, panel.unit] if alone else [panel.unit]
    ylabel = ", ".join(word for word in words if word)
    style(axis, panel.title, "epoch (0: before training)", ylabel)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.tick_params(labelbottom=True)
    if all(y >= 0 for points in panel.lines.values() for _, y in points):
        axis.set_ylim(bottom=0)
    if not alone:
        axis.legend(fontsize=SMALL, frameon=False, ncols=2 if len(labels) > 3 else 1)
