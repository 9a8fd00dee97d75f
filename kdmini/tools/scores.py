"""By which scores a row of runs is judged: its metric says so."""

import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

from kdmini import config
from kdmini.contracts import UserError
from kdmini.tools.rows import Row, Run

SCORE = "score/"  # begins the key of a score in metrics.jsonl


class Scores(NamedTuple):
    """The scores of a metric, by the names that it gives them."""

    fitness: str  # picks the best epoch
    names: tuple[str, ...]  # of the columns


class Best(NamedTuple):
    """The evaluation of a run that its best.pt is from."""

    epoch: int  # counted from 1
    scores: dict[str, float]  # name -> value, of those that were logged


def metric_of(run: Run) -> Any:
    """What the config says that the metric is, such as "package.module:Name"."""
    section = run.settings.get("metric")
    return section.get("build") if isinstance(section, Mapping) else section


def scores_of(row: Row) -> Scores:
    """By the metric of the row; raises UserError where that cannot be had.

    A metric without a `summary` has all scores shown that any of the runs has logged.
    """
    first = row[0]
    where = f"{first.path}/config.yaml: metric.build"
    metric = config.locate(metric_of(first), where)
    if not isinstance(getattr(metric, "fitness", None), str):
        # its constructor may be what sets it
        metric = config.build(first.settings["metric"], where, names=first.names())
    fitness = getattr(metric, "fitness", None)
    if not isinstance(fitness, str):
        raise UserError(
            f"{where}: {metric_of(first)} has no `fitness`, the name of the score "
            "that picks the best epoch; give the class one"
        )

    summary = getattr(metric, "summary", None)
    if summary is not None:
        return Scores(fitness, tuple(summary))
    keys = [key for run in row for key in run.keys_logged()]
    logged = dict.fromkeys(key for key in keys if key.startswith(SCORE))
    return Scores(fitness, tuple(key.removeprefix(SCORE) for key in logged))


def scores_of_rows(rows: list[Row]) -> list[Scores]:
    """Each by its own metric; by that of the first row where it cannot be had.

    Raises UserError where that of the first row cannot be had.
    """
    first = scores_of(rows[0])
    scores = [first]
    for row in rows[1:]:
        try:
            scores.append(scores_of(row))
        except UserError as error:
            print(error, file=sys.stderr)
            scores.append(first)
    return scores


def best_of(run: Run, scores: Scores) -> Best | None:
    """The first epoch of the highest fitness, as in training; None without any."""
    fitness = run.series(SCORE + scores.fitness)
    if not fitness:
        return None
    epoch = max(fitness, key=lambda epoch: fitness[epoch])
    values = {}
    for name in scores.names:
        series = run.series(SCORE + name)
        if epoch in series:
            values[name] = series[epoch]
    return Best(epoch + 1, values)
