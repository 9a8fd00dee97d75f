"""The pictures of docs/ideas.md, drawn by the code that they explain.

make demo                       a teacher and its student, on generated shapes
python -m bench.pictures runs/demo [--config configs/voc.yaml] [--out docs/pictures]

    taps.png        the layers of YOLO11, and where it is tapped
    lambda.png      the schedule of the config, beside the notes' table
    attention.png   a scene, and where teacher and student look at the six taps
    align.png       distances over the run; and a frozen student, whose align modules alone
                    are trained
    assigner.png    which anchor points answer for the objects of a scene, and with what
                    target score

The first two are drawn here, the others in bench/scene_pictures.py.
"""

import argparse
import io
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from bench import complexity
from bench.scene_pictures import align, assigner, attention, distances_beside
from kdmini import config
from kdmini.assemble import make_model, with_weights
from kdmini.contracts import UserError
from kdmini.detection.yolo11.model import CONCAT_WITH, HEAD
from kdmini.distill.schedule import piecewise_linear
from kdmini.files import write_whole
from kdmini.runlog import RunFolder
from kdmini.sections import Sections
from kdmini.tools.draw import COLOURS, DPI, SMALL, Axes, Figure, style
from kdmini.tools.scenes import feats_at, spread_scenes

CPU = torch.device("cpu")
SCENES = 24  # images of the validation set that are looked at

# epoch -> lambda, as the notes' table has it
NOTES_TABLE = {0: 2.0, 20: 1.0, 40: 0.0, 70: 0.15, 100: 0.0, 105: 0.05, 150: 0.05}

IMGSZ = 640  # pixels, of taps.png
NECK = 10.5  # the backbone ends at layer 10
STRIDES = (2, 4, 8, 16, 32)  # pixels a cell


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "run", type=Path, help="a run folder with a best.pt and a teacher, such as the demo's"
    )
    parser.add_argument("--config", default="configs/voc.yaml", help="whose schedule is drawn")
    parser.add_argument("--out", type=Path, default=Path("docs/pictures"))
    args = parser.parse_args()
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        for name, figure in figures(args.run, args.config):
            content = io.BytesIO()
            figure.savefig(content, format="png")
            path = args.out / f"{name}.png"
            write_whole(path, content.getvalue())
            print(f"picture: {path}, {len(content.getvalue()) / 1000:.0f} kB")
    except UserError as error:
        sys.exit(f"error: {error}")


def figures(run: Path, config_path: str) -> Iterator[tuple[str, Figure]]:
    path = run / "config.yaml"
    sections = config.call(Sections, config.load(path), str(path))
    if not sections.teacher or not sections.distill:
        raise UserError(f"{run}: has no teacher to compare with; name a run that distils")

    sets = sections.sets()
    names = sets.val.names
    torch.manual_seed(0)  # the student begins at random weights
    student = make_model(sections.student, "student", names, CPU)
    teacher = make_model(sections.teacher, "teacher", names, CPU)
    best = with_weights(sections.student, str(run / "best.pt"))
    trained = make_model(best, "student", names, CPU)

    scenes = spread_scenes(sets.store("val", CPU, limit=SCENES), SCENES)
    objects = [len(target["labels"]) for target in scenes.targets]
    fullest = objects.index(max(objects))
    taps = sections.distill["taps"]
    schedule = config.load(config_path)["distill"]["attention"]["schedule"]
    records = RunFolder(run, lead=False).records()

    yield "taps", layers(list(complexity.TAPS))
    yield "lambda", lambda_over_epochs(schedule, config_path)
    networks = {"teacher": teacher, "student": trained}
    yield "attention", attention(scenes, fullest, taps, networks)
    print("\n".join(distances_beside(scenes.images, taps, trained, teacher)))
    yield "align", align(records, scenes.images, taps, student, teacher)
    yield "assigner", assigner(scenes, fullest, trained)


# --- the layers


class Layer(NamedTuple):
    """One of the layers of YOLO11 below its head."""

    number: int
    sources: list[int]  # layers that it reads, the one before it first; none reads the images
    level: float  # -log2 of the stride: the higher, the finer
    channels: list[int]  # in s and m


def layers_of_yolo11() -> list[Layer]:
    names = [f"model.{number}" for number in range(HEAD)]
    image = complexity.image(IMGSZ)
    small = feats_at(names, complexity.detector("s"), image)
    medium = feats_at(names, complexity.detector("m"), image)
    described = []
    for number, (of_s, of_m) in enumerate(zip(small, medium, strict=True)):
        sources = [number - 1] if number else []
        if number in CONCAT_WITH:
            sources.append(CONCAT_WITH[number])
        stride = IMGSZ // of_m.shape[2]
        channels = [of_s.shape[1], of_m.shape[1]]
        described.append(Layer(number, sources, -math.log2(stride), channels))
    return described


def layers(taps: Sequence[str]) -> Figure:
    """Layers 0 to 22 of YOLO11 by number and stride, with their inputs; the taps with their
    channels in s and m.
    """
    figure = Figure(figsize=(11, 3.8), dpi=DPI, layout="constrained")
    axis = figure.subplots()
    every = layers_of_yolo11()
    for layer in every:
        for source in layer.sources:
            draw_arrow(axis, every[source], layer)
    for layer in every:
        draw_layer(axis, layer, tapped=f"model.{layer.number}" in taps)
    axis.axvline(NECK, color="#AAAAAA", linestyle=":")
    for middle, part in ((5, "backbone"), (16.5, "neck")):
        axis.text(middle, -0.55, part, ha="center", fontsize=SMALL + 2)
    title = "Squares are tapped; above each: channels of s | m. Dashed: what a Concat takes besides"
    style(axis, title, "layer", "stride")
    axis.set_yticks([-math.log2(stride) for stride in STRIDES], map(str, STRIDES))
    axis.set(xticks=[], xlim=(-0.7, 22.9), ylim=(-5.5, -0.3))
    return figure


def draw_arrow(axis: Axes, source: Layer, layer: Layer) -> None:
    arrow = {"arrowstyle": "->", "color": "#777777", "shrinkA": 10, "shrinkB": 10}
    if source.number != layer.number - 1:
        arrow |= {"connectionstyle": "arc3,rad=-0.25", "linestyle": "--"}
    end = (layer.number, layer.level)
    start = (source.number, source.level)
    axis.annotate("", end, start, arrowprops=arrow)


def draw_layer(axis: Axes, layer: Layer, tapped: bool) -> None:
    axis.plot(
        layer.number,
        layer.level,
        marker="s" if tapped else "o",
        markersize=19,
        color=COLOURS[1 if tapped else 4],
        markeredgecolor="black",
    )
    number = str(layer.number)
    axis.text(layer.number, layer.level, number, ha="center", va="center", fontsize=SMALL + 1)
    if tapped:
        axis.text(
            layer.number,
            layer.level + 0.34,
            " | ".join(map(str, layer.channels)),
            ha="center",
            va="bottom",
            fontsize=SMALL + 1,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
        )


# --- lambda


def lambda_over_epochs(schedule: Sequence[Sequence[float]], where: str) -> Figure:
    """Each segment is a line; where it begins is in it, where it ends is not.

    where: the config that the schedule is from.
    """
    figure = Figure(figsize=(9, 3.4), dpi=DPI, layout="constrained")
    axis = figure.subplots()
    last_epoch = max(NOTES_TABLE)
    for segment in schedule:
        draw_segment(axis, segment, last_epoch)
    wrong = {
        epoch: value
        for epoch, value in NOTES_TABLE.items()
        if abs(value - piecewise_linear(schedule, epoch)) > 1e-9
    }
    axis.plot(
        list(wrong),
        list(wrong.values()),
        "X",
        color=COLOURS[5],
        markersize=11,
        markeredgecolor="white",
        zorder=3,
        label="the notes' table",
    )
    for epoch, value in wrong.items():
        right = piecewise_linear(schedule, epoch)
        axis.annotate(
            f"epoch {epoch}: {right:g}, not {value:g}",
            (epoch, right),
            (epoch + 3, right + 0.4),
            fontsize=SMALL + 1,
            arrowprops={"arrowstyle": "-", "color": "#555555"},
        )
    style(axis, f"lambda over the epochs, from {where}", "epoch", "lambda")
    axis.set(xlim=(-2, last_epoch + 2), ylim=(-0.06, 2.1))
    axis.legend(fontsize=SMALL + 1, frameon=False)
    return figure


def draw_segment(axis: Axes, segment: Sequence[float], last_epoch: float) -> None:
    """segment: start, value at the start, end, value at the end."""
    start, first, end, last = segment
    stop = min(end, last_epoch)
    value = first + (last - first) * (stop - start) / (end - start)
    axis.plot([start, stop], [first, value], color=COLOURS[0], linewidth=2.5)
    axis.plot(start, first, "o", color=COLOURS[0], markersize=7)
    if math.isfinite(end):
        axis.plot(
            stop,
            value,
            "o",
            markeredgecolor=COLOURS[0],
            markerfacecolor="white",
            markersize=7,
            markeredgewidth=1.5,
        )


if __name__ == "__main__":
    main()
