"""What has changed: a page about a distilled student beside the student alone.

python -m kdmini.tools.report RUN [RUN ...] [--out report.html]

Runs whose configs differ in `seed` and `run` alone are one row, as in compare.
The first row without distillation, or the first of all, is what the others are
compared with. The best.pt of every run is evaluated anew on the validation set
of its config. One file of HTML is written, whole or not at all, which any
browser shows without a connection:

    the scores of each row, and their differences with the interval that holds
        them with 95 %
    the curves
    where the difference is: by class, and as the metric knows it by size, by
        IoU, by kind of error, by score
    what each class is taken for
    where teacher and student look, under a slider
    the images that are the worst, and those that have changed most
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from kdmini import config, memory, output, signals
from kdmini.assemble import tap_pairs
from kdmini.contracts import UserError
from kdmini.files import check_kind, write_whole
from kdmini.tools import draw_confusion
from kdmini.tools import report_page as html
from kdmini.tools.compare import DISTANCE, curves, gains_of, interval, unfinished, verdict
from kdmini.tools.report_pictures import IMAGES, curve, drawn, looks, most_changed, worst
from kdmini.tools.report_rows import Reader, Told, mean_of, tell
from kdmini.tools.rows import read_run
from kdmini.tools.scenes import spread_scenes
from kdmini.tools.scores import SCORE, best_of
from kdmini.tools.visualize import taps_of

NOTHING = "nothing"  # in place of a class, in a confusion
WIDEST = 1000  # pixels of a picture
REMEDY = "put CUDA_VISIBLE_DEVICES= before the command to evaluate on the CPU"

COLOURS = "Blue is better, orange is worse."


class Words(NamedTuple):
    """How a table of numbers is read."""

    heading: str
    meaning: str
    less_is_better: bool = False


WORDS = {  # of the tables that are known, by title
    "class": Words("By class", ""),
    "size": Words("By size", "COCO's areas of boxes in pixels of files: to 32², to 96², above."),
    "IoU": Words("By IoU", "Average precision, where a detection is a hit from that overlap on."),
    "kinds of error": Words(
        "Kinds of error",
        "What AP50 would gain if that kind were mended, and how many there are.",
        True,
    ),
    "calibration": Words(
        "Calibration",
        "How far the scores of detections are apart from the share of them that is right. The "
        "last row is the expected calibration error.",
        True,
    ),
}


# --- sections of the page


def scores_section(told: Sequence[Told]) -> str:
    first = told[0]
    names = list(dict.fromkeys(name for one in told for name in one.scores.names))
    body = []
    for one in told:
        bests = [best for run in one.row if (best := best_of(run, one.scores))]
        gains = dict(
            zip(first.scores.names, gains_of(one.row, first.row, first.scores), strict=True)
        )
        cells = [html.text(one.name) + html.small(one.settings if len(told) > 1 else "")]
        for name in names:
            values = [best.scores[name] for best in bests if name in best.scores]
            cell = with_interval(values, "")
            if one is not first and gains.get(name):
                cell += with_interval(gains[name], "+")
            cells.append(cell)
        cells.append("".join(html.small(f"{run.path} (seed {run.seed})") for run in one.row))
        body.append(cells)
    words = (
        "The best epoch of each run, as logged: the mean over seeds and the interval of "
        "Student's t that holds it with 95 %. Below, what a row has more than the first one, "
        "seed by seed."
    )
    remarks = [unfinished(run) for one in told for run in one.row]
    table = html.table(["", *names, "runs"], body)
    return html.section("Scores", words, table, *map(html.small, remarks))


def with_interval(values: Sequence[float], sign: str) -> str:
    """sign: "+" for differences, which are also judged."""
    if not values:
        return "-"
    ends = interval(values)
    cell = html.text(html.number(statistics.mean(values), sign))
    if ends:
        low, high = (html.number(end, sign) for end in ends)
        cell += html.small(f"{low} to {high}")
        cell += html.small(verdict(ends) if sign else "")
    return f"<div>{cell}</div>"


def curves_section(told: Sequence[Told]) -> str:
    """Empty where no epoch has been evaluated."""
    rows = [one.row for one in told]
    keys = {
        SCORE + told[0].scores.fitness: told[0].scores.fitness,
        DISTANCE: "attention distance to the teacher",
    }
    of_keys = {key: curves(rows, key) for key in keys}
    of_keys = {key: drawn for key, drawn in of_keys.items() if any(drawn.values())}
    if not of_keys:
        return ""
    sources = []
    for key, of_rows in of_keys.items():
        figure = curve(keys[key], {one.name: of_rows.get(one.settings, {}) for one in told})
        picture = html.picture(html.source_of_figure(figure, "png"), f"curves of {keys[key]}")
        sources.append(html.captioned(picture, ""))
    words = "The mean over the seeds of a row, in a band from the lowest to the highest."
    return html.section("Curves", words, html.in_pairs(sources))


def difference_sections(told: Sequence[Told]) -> list[str]:
    """A table of each title."""
    sections = []
    for title in told[0].tables[0]:
        words = WORDS.get(title, Words(title, ""))
        means = {one.name: mean_of([tables[title] for tables in one.tables]) for one in told}
        meaning = f"{words.meaning} {COLOURS if len(told) > 1 else ''}".strip()
        table = html.compared(means, words.less_is_better)
        sections.append(html.section(words.heading, meaning, table))
    return sections


def confusion_section(told: Sequence[Told]) -> str:
    """Of the first run of each row; empty where the metric has none."""
    pictures = []
    for one in told:
        if not hasattr(one.metric, "confusion"):
            return ""
        matrix = one.metric.confusion()
        names = [*one.metric.names, NOTHING][: len(matrix)]
        figure = draw_confusion.confusion(matrix, names, names, one.name, "total")
        dpi = min(html.DPI, WIDEST / figure.get_figwidth())
        source = html.source_of_figure(figure, "png", dpi)
        picture = html.picture(source, f"confusion of {one.name}")
        pictures.append(html.captioned(picture, "", "wide"))
    words = "A row for each true class, a column for each answer: shares of the row."
    return html.section("What is taken for what", words, html.in_pairs(pictures))


def attention_section(told: Sequence[Told], reader: Reader) -> str:
    """Of the first row that has a teacher, at the taps that visualize shows; empty where none
    has.
    """
    for one in told:
        sections = reader.sections(one.run)
        if not sections.teacher:
            continue
        teacher = reader.teacher(one.run)
        student = reader.student(one.run)
        pairs = tap_pairs(taps_of(sections, student, teacher))
        if not pairs:
            continue
        scenes = spread_scenes(reader.store_of(one.run), IMAGES)
        shown = [*looks(teacher, student, scenes, pairs)]
        words = (
            f"Attention maps of {one.run.path}: the sum of squares over the channels at each tap, "
            "dark for little. Move the slider from the teacher to the student."
        )
        slider = html.slider(shown, "teacher", "student")
        return html.section("Where teacher and student look", words, slider)
    return ""


def image_sections(told: Sequence[Told], reader: Reader) -> list[str]:
    """Of the first run of the second row, or of the only one, and of the first row beside it."""
    first = told[0]
    last = told[min(1, len(told) - 1)]
    figures = getattr(last.metric, "figures", None)
    if not figures or not hasattr(last.metric, "per_image"):
        return []
    draw = config.locate(figures, "metric: figures")
    scores = {one.name: one.metric.per_image() for one in (first, last)}
    networks = {one.name: reader.student(one.run) for one in (first, last)}
    store = reader.store_of(last.run)
    words = "By a score of the single image, which stands below it; "
    chosen = {f"the lowest of {last.name}.": worst(scores[last.name])}
    if first is not last:
        changed = most_changed(scores[first.name], scores[last.name])
        chosen[f"where {last.name} differs most from {first.name}."] = changed
    titles = ("The worst images", "The most changed images")
    sections = []
    for title, (which, ids) in zip(titles, chosen.items(), strict=False):
        pictures = drawn(draw, networks, store, ids, scores)
        sections.append(html.section(title, words + which, html.in_pairs(pictures)))
    return sections


def report(told: Sequence[Told], reader: Reader) -> str:
    """-> the page."""
    sections = [scores_section(told), curves_section(told)]
    evaluated = [one for one in told if one.run]
    alike = [one for one in evaluated if type(one.metric) is type(evaluated[0].metric)]
    if alike:
        sections += difference_sections(alike)
        sections.append(confusion_section(alike))
        sections.append(attention_section(alike, reader))
        sections += image_sections(alike, reader)
    for one in told:
        if one not in alike:
            why = "it is scored by another metric" if one.run else "it has no best.pt yet"
            sections.append(html.section(one.name, f"Not in what stands above: {why}."))
    title = "What has changed" if len(told) > 1 else f"The run {told[0].name}"
    return html.page(title, [section for section in sections if section])


def prepare(out: Path) -> None:
    """Makes the folder of the page, before minutes of evaluation. Raises UserError."""
    check_kind(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be made ({error.strerror}); name another") from error


def main(argv: list[str] | None = None) -> None:
    output.guard(needed=True)
    parser = argparse.ArgumentParser(
        prog="python -m kdmini.tools.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run folder")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        default=Path("report.html"),
        help="the page (default: report.html in this folder)",
    )
    args = parser.parse_args(argv)
    signals.exit_on_signals()
    try:
        prepare(args.out)
        with memory.bounded(REMEDY):
            reader = Reader()
            told = tell([read_run(path) for path in args.runs], reader)
            write_whole(args.out, report(told, reader))
    except UserError as error:
        sys.exit(f"error: {error}")
    print(f"report: {args.out}")


if __name__ == "__main__":
    main()
