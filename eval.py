"""Score weights on the validation set of a config: one table, a row for each
class.

python eval.py --config configs/voc.yaml --weights runs/voc/best.pt [--teacher]
    [--save FOLDER] [key.path=value ...]
"""

import argparse
import math
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from kdmini import config, engine, memory, output, signals
from kdmini.assemble import make_model, with_weights
from kdmini.classes import refuse_other_classes
from kdmini.contracts import UserError
from kdmini.data.loader import ValLoader
from kdmini.data.store import Store
from kdmini.defaults import no_option
from kdmini.device import pick_device, precision
from kdmini.outset import unread_classes
from kdmini.sections import Sections

WIDTH = 9  # columns of a number in the table


class Scored(NamedTuple):
    """One network, evaluated."""

    name: str  # student or teacher
    metric: Any
    scores: dict[str, float]
    cost: str


def evaluate(
    settings: dict[str, Any], source: str, weights: str | None, with_teacher: bool
) -> list[Scored]:
    """The student, and the teacher if asked for, on the validation set.

    settings: the config. source: the file it is from, for messages. weights: a file for the
    student, in place of the config's.
    """
    sections = config.call(Sections, settings, source)
    recipe = sections.recipe()
    device = pick_device(sections.device)
    autocast, _ = precision(recipe.amp, device)
    models = {"student": sections.student}
    if weights:
        models["student"] = with_weights(sections.student, weights)
    if with_teacher:
        if not sections.teacher:
            raise UserError("--teacher: the config has no teacher")
        models["teacher"] = sections.teacher
    for name, section in models.items():
        if not section.get("weights"):
            raise UserError(f"{name}: no weights to evaluate; give --weights FILE")

    sets = sections.sets()
    metrics = {name: sections.make_metric(sets.val.names) for name in models}
    networks = {
        name: folded(make_model(section, name, sets.val.names, device), name, sets.val.names)
        for name, section in models.items()
    }
    store = sets.store("val", device)
    loader = ValLoader(store, recipe.batch)
    scored = []
    for name, network in networks.items():
        metric = metrics[name]
        started = time.perf_counter()
        scores = engine.evaluate(network, loader, metric, autocast)
        seconds = (time.perf_counter() - started) / len(store)
        scored.append(Scored(name, metric, scores, cost(network, store, seconds)))
    return scored


def folded(network: Any, name: str, names: list[str]) -> Any:
    """Ready to evaluate, BatchNorm merged where it knows how. Raises UserError where its
    classes are not those of the data, or it has never learned them.
    """
    refuse_other_classes(network.names, names, f"the {name}")
    if unread := unread_classes(network):
        raise UserError(
            f"the {name}: its weights know nothing of {unread}, so scores would be those of "
            "chance; train it on them first"
        )
    network.eval()
    if hasattr(network, "fold"):
        network.fold()
    return network


@torch.no_grad()
def cost(network: Any, store: Store, seconds: float) -> str:
    """Size and speed in words. A multiply-add is two operations; seconds: of an image, from
    pixels to scores.
    """
    size = store.imgsz
    with FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 3, size, size, device=store.device))
    millions = sum(p.numel() for p in network.parameters()) / 1e6
    giga = counter.get_total_flops() / 1e9
    return (
        f"{millions:.2f} M parameters, {giga:.3g} GFLOPs at {size} px, "
        f"{1000 * seconds:.1f} ms an image"
    )


def table(scored: list[Scored]) -> str:
    """One row for all classes, the means, and one for each class; a count, and the scores that
    every row has, network by network.
    """
    tables = [rows_of(one) for one in scored]
    first = tables[0]
    columns = list(scored[0].scores)
    count = ""
    for rows in tables:
        for values in rows.values():
            columns = [column for column in columns if column in values]
            count = next((key for key in values if key not in scored[0].scores), count)

    width = max(len(label) for label in first)
    titles = [f"{one.name:^{WIDTH * len(columns)}}" for one in scored]
    heads = ["".join(f"{column:>{WIDTH}}" for column in columns) for _ in scored]
    lines = [
        " " * (width + WIDTH) + " |".join(titles),
        f"{'':{width}}{count:>{WIDTH}}" + " |".join(heads),
    ]
    for label, values in first.items():
        number = in_cell(values.get(count, math.nan), ".0f", "")
        cells = []
        for rows in tables:
            cells.append("".join(in_cell(rows[label][column], ".3f") for column in columns))
        lines.append(f"{label:{width}}{number}" + " |".join(cells))
    return "\n".join(lines)


def rows_of(one: Scored) -> dict[str, dict[str, float]]:
    """Label of a row -> scores and counts of one network."""
    per_class = getattr(one.metric, "per_class", dict)
    return {"all classes": one.scores, **per_class()}


def in_cell(value: float, form: str, nothing: str = "-") -> str:
    return f"{value:{WIDTH}{form}}" if not math.isnan(value) else f"{nothing:>{WIDTH}}"


def show(scored: list[Scored], save: str | None) -> None:
    print(table(scored))
    for one in scored:
        print(f"{one.name}: {one.cost}")
    for one in scored:
        if hasattr(one.metric, "official"):
            scores = [f"{key} {value:.4f}" for key, value in one.metric.official().items()]
            print(f"{one.name}, by {one.metric.official_by}: {', '.join(scores)}")
    if save:
        folder = Path(save)
        folder.mkdir(parents=True, exist_ok=True)
        for one in scored:
            if hasattr(one.metric, "save"):
                print(f"predictions: {one.metric.save(folder / one.name)}")


def main() -> None:
    output.guard(needed=True)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True)
    parser.add_argument(
        "--weights", help="a file for the student; without it, the config's student.weights"
    )
    parser.add_argument(
        "--teacher", action="store_true", help="score the config's teacher too, side by side"
    )
    parser.add_argument(
        "--save",
        metavar="FOLDER",
        help="write the predictions there: boxes as NAME.json, with NAME_analysis.json, masks as "
        "PNGs in a folder NAME",
    )
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    args, unknown = parser.parse_known_intermixed_args()  # overrides may stand anywhere
    if unknown:
        parser.error(no_option(unknown, sys.argv))
    signals.exit_on_signals()
    try:
        settings = config.load(args.config, args.overrides)
        with memory.bounded(memory.remedy_of(settings)):
            scored = evaluate(settings, args.config, args.weights, args.teacher)
            show(scored, args.save)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
