"""The rows of a report: their runs, read and evaluated anew."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdmini import config, engine
from kdmini.assemble import make_model, with_weights
from kdmini.data.loader import ValLoader
from kdmini.data.store import Store
from kdmini.device import pick_device, precision
from kdmini.sections import Sections
from kdmini.tools.report_page import Table
from kdmini.tools.rows import Row, Run, group, names_of
from kdmini.tools.scores import Scores, scores_of_rows


@dataclass
class Told:
    """One row, and what is known of its runs."""

    name: str  # short
    settings: str  # in which it differs from others, as in compare
    row: Row
    scores: Scores
    run: Any = None  # the first Run that has a best.pt
    metric: Any = None  # which has seen the validation set with that, or None
    tables: list[dict[str, Table]] = field(default_factory=list)  # by title, of every such run


class Reader:
    """Networks and validation sets of runs; a set is decoded once for runs that share it."""

    def __init__(self) -> None:
        self.data: Any = None
        self.store: Store | None = None

    def sections(self, run: Run) -> Sections:
        return config.call(Sections, run.settings, f"{run.path}/config.yaml")

    def store_of(self, run: Run) -> Store:
        sections = self.sections(run)
        if self.store is None or self.data != sections.data:
            self.store = sections.sets().store("val", pick_device(sections.device))
            self.data = sections.data
        return self.store

    def student(self, run: Run) -> Any:
        """As in best.pt."""
        trained = with_weights(self.sections(run).student, str(Path(run.path) / "best.pt"))
        return self.network(run, trained, "student")

    def teacher(self, run: Run) -> Any:
        return self.network(run, self.sections(run).teacher, "teacher")

    def network(self, run: Run, section: Any, name: str) -> Any:
        store = self.store_of(run)
        return make_model(section, name, store.names, store.device).eval()

    def evaluate(self, run: Run) -> Any:
        """-> the metric, which has seen the validation set."""
        sections = self.sections(run)
        store = self.store_of(run)
        recipe = sections.recipe()
        metric = sections.make_metric(store.names)
        autocast, _ = precision(recipe.amp, store.device)
        engine.evaluate(self.student(run), ValLoader(store, recipe.batch), metric, autocast)
        return metric


def tell(runs: Sequence[Run], reader: Reader) -> list[Told]:
    """The rows, first what the others are compared with. Raises UserError."""
    rows = sorted(group([*runs]), key=lambda row: bool(row[0].settings.get("distill")))
    columns = (short_names(rows), names_of(rows), rows, scores_of_rows(rows))
    told = [Told(*of_row) for of_row in zip(*columns, strict=True)]
    for one in told:
        for run in one.row:
            if not (Path(run.path) / "best.pt").exists():
                continue
            metric = reader.evaluate(run)
            one.tables.append(tables_of(metric, one.scores.fitness))
            if one.run is None:
                one.run = run
                one.metric = metric
    return told


def short_names(rows: Sequence[Row]) -> list[str]:
    """The first folder of each, without its parents where all differ without."""
    paths = [row[0].path for row in rows]
    names = [Path(path).name for path in paths]
    return names if len(set(names)) == len(names) else paths


def tables_of(metric: Any, fitness: str) -> dict[str, Table]:
    """What the metric has of its scores, by title."""
    tables: dict[str, Table] = {}
    if hasattr(metric, "per_class"):
        rows = metric.per_class()
        scores = {label: {fitness: row[fitness]} for label, row in rows.items() if fitness in row}
        tables.update({"class": scores} if scores else {})
    if hasattr(metric, "analysis"):
        tables.update(metric.analysis())
    return tables


def mean_of(tables: Sequence[Table]) -> Table:
    """Over the seeds; without those that have no such number. Counts are rounded."""
    first = tables[0]
    if len(tables) == 1:
        return first
    means: dict[str, dict[str, float]] = {}
    for label, columns in first.items():
        means[label] = {}
        for column in columns:
            values = [table[label][column] for table in tables]
            numbers = [value for value in values if not math.isnan(value)]
            mean = statistics.mean(numbers) if numbers else math.nan
            is_count = all(isinstance(value, int) for value in values)
            means[label][column] = round(mean) if is_count else mean
    return means
