"""The pictures of docs/attention.md, from what bench/attention.py and bench/rows.py have kept.

attention_maps.png       where a teacher's activations are, and where its scores depend on them
attention_distance.png   how far students are from the teacher's maps, and from wrong ones
attention_gradient.png   how much of a term's gradient is the same for a wrong photograph
attention_gain.png       what the rows gained
"""

import io
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.findings import SCORE, read
from bench.protocol import ROOT
from bench.rows import Protocol, gains_of
from kdmini.files import write_whole
from kdmini.tools.compare import interval
from kdmini.tools.draw import COLOURS, DPI, SMALL, Axes, Figure, style

OUT = ROOT / "docs/pictures"
BAR = 0.38  # height of one of a pair
OF_MAPS = ("attention", "centred", "standardised")  # rows that compare attention maps, in dark


def draw(found: Mapping[str, Any], protocol: Protocol, kept: Path) -> None:
    """found: of bench/attention.py. kept: the folder of what is kept of the protocol's runs."""
    pictures = {
        "maps": maps(found["examples"], found["taps"]),
        "distance": distance(found["distances"]),
        "gradient": gradient(found["cosines"]),
        "gain": gain(gains_by_row(protocol, kept)),
    }
    for name, figure in pictures.items():
        content = io.BytesIO()
        figure.savefig(content, format="png")
        path = OUT / f"attention_{name}.png"
        write_whole(path, content.getvalue())
        print(f"picture: {path}, {len(content.getvalue()) / 1000:.0f} kB")


def maps(examples: Sequence[Mapping[str, Any]], taps: Mapping[str, Any]) -> Figure:
    """A column for each photograph, of which only the boxes are drawn."""
    figure = Figure(figsize=(9, 5), dpi=DPI, layout="constrained")
    axes = figure.subplots(2, len(examples))
    tap = next(iter(taps))
    rows = {
        "activation": "sum of squares over the channels",
        "gradient": "gradient of the teacher's scores",
    }
    for row, (kind, words) in enumerate(rows.items()):
        for axis, example in zip(axes[row], examples, strict=True):
            axis.imshow(example[kind], "viridis", vmin=0, vmax=1, extent=(0, 1, 1, 0))
            for x1, y1, x2, y2 in example["boxes"]:
                axis.plot(
                    [x1, x2, x2, x1, x1], [y1, y1, y2, y2, y1], color=COLOURS[5], linewidth=1.5
                )
            axis.set(xticks=[], yticks=[], xlim=(0, 1), ylim=(1, 0))
        auc = taps[tap][kind]["auc"]
        axes[row, 0].set_ylabel(f"{words}\n(boxes: AUC {auc:.2f})", fontsize=SMALL)
    title = f"The teacher at {tap}: where it fires, and where its scores depend on it"
    figure.suptitle(title, fontsize=SMALL + 2)
    return figure


def distance(distances: Mapping[str, Mapping[str, float]]) -> Figure:
    """Two bars for each: the teacher's maps of this photograph, and of another."""
    figure = Figure(figsize=(9, 0.9 + 0.42 * len(distances)), dpi=DPI, layout="constrained")
    axis = figure.subplots()
    names = list(distances)
    y = np.arange(len(names))
    sides = {"raw": "this photograph", "rolled": "another photograph"}
    for number, (key, words) in enumerate(sides.items()):
        values = [distances[name][key] for name in names]
        place = y + (number - 0.5) * BAR
        axis.barh(place, values, BAR, color=COLOURS[number * 4], label=words)
    axis.set_yticks(y, names)
    axis.invert_yaxis()
    figure.legend(fontsize=SMALL, frameon=False, loc="outside lower right", ncols=2)
    style(axis, "Distance to the teacher's attention maps of", "summed over three taps")
    return figure


def gradient(cosines: Mapping[str, Mapping[str, float]]) -> Figure:
    """A pair of bars for each term: of a new student, and of one trained alone."""
    figure = Figure(figsize=(9, 3.6), dpi=DPI, layout="constrained")
    axis = figure.subplots()
    names = list(next(iter(cosines.values())))
    y = np.arange(len(names))
    for number, (student, values) in enumerate(cosines.items()):
        place = y + (number - 0.5) * BAR
        bars = [values[name] for name in names]
        axis.barh(place, bars, BAR, color=COLOURS[number * 4], label=f"student {student}")
    axis.set_yticks(y, names)
    axis.invert_yaxis()
    axis.axvline(0, color="#555555", linewidth=0.8)
    figure.legend(fontsize=SMALL, frameon=False, loc="outside lower right", ncols=2)
    title = "Cosine of the gradient with the one that a wrong photograph gives"
    style(axis, title, "1: it says nothing about this photograph")
    return figure


def gains_by_row(protocol: Protocol, kept: Path) -> dict[str, list[float]]:
    """Row -> what each of its runs is above the one that it is compared with, of the same seed."""
    key = SCORE + protocol.score
    results = {name: read(kept, name) for name in protocol.rows}
    gains = {}
    for name in results:
        values = gains_of(results, name, protocol.against(name), key)
        if protocol.row(name).teacher and values:
            gains[name] = values
    return gains


def gain(gains: Mapping[str, Sequence[float]]) -> Figure:
    """Seeds as dots, their mean as a line, and the interval that holds it with 95 %."""
    figure = Figure(figsize=(9, 0.9 + 0.36 * len(gains)), dpi=DPI, layout="constrained")
    axis = figure.subplots()
    for y, (name, values) in enumerate(gains.items()):
        draw_row(axis, y, values, COLOURS[0] if name in OF_MAPS else COLOURS[4])
    axis.axvline(0, color="#555555", linewidth=0.8)
    axis.set_yticks(range(len(gains)), list(gains))
    axis.set_ylim(len(gains) - 0.5, -0.5)
    style(axis, "AP50-95 beyond the same student without a teacher", "points")
    return figure


def draw_row(axis: Axes, y: int, values: Sequence[float], colour: str) -> None:
    ends = interval(values)
    if ends:
        axis.plot(ends, [y, y], color=colour, linewidth=5, alpha=0.4, solid_capstyle="butt")
    axis.plot(statistics.mean(values), y, "|", color=colour, markersize=14, markeredgewidth=2.5)
    axis.plot(values, [y] * len(values), "o", color=colour, markersize=4)
