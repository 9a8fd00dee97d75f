"""What a sweep has found: a table, a picture, and the config of the best trial."""

import csv
import io
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import optuna
from optuna.trial import FrozenTrial, TrialState

from kdmini import config
from kdmini.commands import command
from kdmini.files import write_whole
from kdmini.tools.sweep_space import Plan, Span
from kdmini.tools.sweep_study import ATTEMPT, ERROR, NUMBER, STOPPED, attempts_of, counts

COLUMNS = 3  # panels in a row of the picture
PANEL_WIDTH = 4.6  # inches
PANEL_HEIGHT = 3.6  # inches


class Row(NamedTuple):
    """A trial of the sweep."""

    number: int
    values: dict[str, Any]  # that were drawn
    score: float | None
    evaluations: int
    ended: str
    attempts: int

    def cells(self, plan: Plan) -> dict[str, Any]:
        values = {key: self.values.get(key, "") for key in plan.space}
        score = "" if self.score is None else self.score
        ends = {"evaluations": self.evaluations, "ended": self.ended, "attempts": self.attempts}
        return {"trial": self.number, **values, plan.score: score, **ends}


def row_of(attempt: FrozenTrial) -> Row:
    score = attempt.value if attempt.state == TrialState.COMPLETE else None
    evaluations = len(attempt.intermediate_values)
    ended = attempt.state.name.lower()
    if attempt.state == TrialState.COMPLETE:
        ended = "stopped" if STOPPED in attempt.user_attrs else "finished"
    if ERROR in attempt.user_attrs:
        ended = f"failed: {attempt.user_attrs[ERROR]}"
    number = attempt.user_attrs[NUMBER]
    attempts = attempt.user_attrs[ATTEMPT]
    return Row(number, attempt.params, score, evaluations, ended, attempts)


def rows_of(study: optuna.Study) -> list[Row]:
    """Of each trial the attempt that counts, in their order."""
    rows = []
    for _, attempts in sorted(attempts_of(study).items()):
        rows += [row_of(attempt) for attempt in attempts if counts(attempt)][:1]
    return rows


def line_of(row: Row, plan: Plan) -> str:
    """A trial in a line."""
    values = " ".join(f"{key}={shown(value)}" for key, value in row.values.items())
    score = "" if row.score is None else f"{plan.score} {row.score:.4f}, "
    return f"trial {row.number}: {values}: {score}{row.ended} after {row.evaluations} evaluations"


def shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def conclude(study: optuna.Study, plan: Plan) -> None:
    """Prints the table, and writes all files."""
    rows = rows_of(study)
    table = [row.cells(plan) for row in rows]
    print_table(table)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(table[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    write_whole(plan.out / "trials.csv", text.getvalue())

    scored = [row for row in rows if row.score is not None]
    if not scored:
        return print("no trial has a score, so there is no best.yaml")
    draw(scored, plan)
    best = max(scored, key=lambda row: plan.sign * (row.score or 0))
    path = plan.out / "best.yaml"
    settings = plan.with_values(best.values, plan.out / "best")
    head = f"# Trial {best.number} of a sweep: {plan.score} {best.score:.4f}.\n"
    call = f"{command('train')} --config {path}"
    write_whole(path, f"{head}# {call}\n{config.dump(settings)}")
    weights = plan.folder(best.number) / "best.pt"
    print(f"best: trial {best.number}, {plan.score} {best.score:.4f}; weights in {weights}")
    print(f"train it again: {call}")


def print_table(table: Sequence[dict[str, Any]]) -> None:
    lines = [list(table[0]), *([shown(cell) for cell in cells.values()] for cells in table)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        print("  ".join(cells).rstrip())


def draw(rows: Sequence[Row], plan: Plan) -> None:
    """Score by parameter, a panel for each, into OUT/trials.png."""
    if not find_spec("matplotlib"):
        return print("no picture, as matplotlib is not installed: pip install -e '.[plots]'")
    from kdmini.tools.draw import COLOURS, MARKERS, blank, grid, style

    columns = min(COLUMNS, len(plan.space))
    height = -(-len(plan.space) // columns) * PANEL_HEIGHT
    figure = blank(columns * PANEL_WIDTH, height + 0.6, f"{len(rows)} trials")
    axes = grid(figure, len(plan.space), columns, sharey=True)
    for axis, (key, dimension) in zip(axes, plan.space.items(), strict=True):
        style(axis, key, "", plan.score)
        if isinstance(dimension, Span):
            axis.set_xscale("log" if dimension.scale == "log" else "linear")
        for number, ended in enumerate(("finished", "stopped")):
            those = [row for row in rows if row.ended == ended]
            x = [row.values[key] for row in those]
            drawn = x if isinstance(dimension, Span) else [str(value) for value in x]
            y = [row.score for row in those if row.score is not None]
            axis.scatter(drawn, y, color=COLOURS[number], marker=MARKERS[number], label=ended)
    axes[0].legend()
    content = io.BytesIO()
    figure.savefig(content, format="png")
    write_whole(plan.out / "trials.png", content.getvalue())
