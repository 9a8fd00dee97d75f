"""The pictures of docs/ideas.md, drawn by the code that they explain.

make demo                                                             a teacher and its student, on generated shapes
python -m bench.pictures runs/demo [--config configs/voc.yaml] [--out docs/pictures]

    taps.png        the layers of YOLO11, and where it is tapped
    lambda.png      the schedule of the config, beside the notes' table
    attention.png   a scene, and where teacher and student look at the six taps
    align.png       distances over the run; and a frozen student, whose align modules alone are trained
    assigner.png    which anchor points answer for the objects of a scene, and with what target score
"""

import argparse
import io
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench import complexity
from kdmini import config
from kdmini.contracts import Targets, UserError
from kdmini.data.store import Store
from kdmini.detection.boxes import anchor_points, centre_inside, dist_ltrb_to_xyxy
from kdmini.detection.yolo11.assign import assign
from kdmini.detection.yolo11.loss import expected_dist
from kdmini.detection.yolo11.model import REG_MAX, SOURCES, STRIDES
from kdmini.distill.align import Align
from kdmini.distill.attention import attention_map, map_distance
from kdmini.distill.schedule import piecewise_linear
from kdmini.distill.taps import Taps
from kdmini.runlog import RunFolder, write_whole
from kdmini.tools.draw import COLOURS, DPI, MARKERS, SMALL, Figure, plain
from kdmini.tools.visualize import Scenes, look, look_at

NOTES_TABLE = {
    0: 2.0,
    20: 1.0,
    40: 0.0,
    70: 0.15,
    100: 0.0,
    105: 0.05,
    150: 0.05,
}  # lambda, as the notes' table has it
SCENES, STEPS, LEARNING_RATE = 24, 60, 0.02  # of the experiment with a frozen student


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
        settings = config.load(args.run / "config.yaml")
        if not settings.get("teacher") or not settings.get("distill"):
            raise UserError(f"{args.run}: has no teacher to compare with; name a run that distils")
        val = config.build(settings["data"]["val"], "data.val")
        torch.manual_seed(0)  # the student begins at random weights
        student, teacher = (
            config.build(settings[part], part, names=val.names) for part in ("student", "teacher")
        )
        trained = config.build(
            {**settings["student"], "weights": str(args.run / "best.pt")},
            "student",
            names=val.names,
        )
        scenes = look_at(Store(val, settings["data"]["imgsz"], "cpu", limit=SCENES), SCENES)
        taps = settings["distill"]["taps"]
        chosen = max(
            range(len(scenes.targets)), key=lambda n: len(scenes.targets[n]["labels"])
        )  # the fullest scene
        schedule = config.load(args.config)["distill"]["attention"]["schedule"]
        for name, figure in (
            ("taps", layers(list(complexity.TAPS))),
            ("lambda", lambda_over_epochs(schedule, args.config)),
            (
                "attention",
                attention(scenes, chosen, taps, {"teacher": teacher, "student": trained}),
            ),
            (
                "align",
                align(
                    RunFolder(args.run, lead=False).records(), scenes.images, taps, student, teacher
                ),
            ),
            ("assigner", assigner(scenes, chosen, trained)),
        ):
            content = io.BytesIO()
            figure.savefig(content, format="png")
            write_whole(args.out / f"{name}.png", content.getvalue())
            print(f"picture: {args.out / name}.png, {len(content.getvalue()) / 1000:.0f} kB")
    except UserError as error:
        sys.exit(f"error: {error}")


def layers(taps: Sequence[str]) -> Figure:
    """Layers 0 to 22 of YOLO11 by number and stride, with their inputs; the taps with their
    channels in s and m.
    """
    names = [f"model.{layer}" for layer in range(len(SOURCES))]
    channels, strides = [], []
    for scale in "sm":
        model = complexity.detector(scale)
        hooks = Taps(model, names)
        model(complexity.image(640))
        feats = hooks.take()
        channels.append([feats[name].shape[1] for name in names])
        strides = [640 // feats[name].shape[2] for name in names]
    figure = Figure(figsize=(11, 3.8), dpi=DPI, layout="constrained")
    axis = figure.subplots()
    level = [-math.log2(stride) for stride in strides]
    for layer, sources in enumerate(SOURCES):
        for source in sources:
            start = layer - 1 if source == -1 else source
            if start >= 0:
                style = {"arrowstyle": "->", "color": "#777777", "shrinkA": 10, "shrinkB": 10}
                bend = {} if source == -1 else {"connectionstyle": "arc3,rad=-0.25", "ls": "--"}
                axis.annotate(
                    "", (layer, level[layer]), (start, level[start]), arrowprops=style | bend
                )
    for layer, name in enumerate(names):
        tapped = name in taps
        axis.plot(
            layer,
            level[layer],
            "s" if tapped else "o",
            ms=19,
            color=COLOURS[1 if tapped else 4],
            mec="black",
        )
        axis.text(layer, level[layer], str(layer), ha="center", va="center", fontsize=SMALL + 1)
        if tapped:
            text = f"{channels[0][layer]} | {channels[1][layer]}"
            box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
            axis.text(
                layer,
                level[layer] + 0.34,
                text,
                ha="center",
                va="bottom",
                fontsize=SMALL + 1,
                bbox=box,
            )
    axis.axvline(10.5, color="#AAAAAA", ls=":")
    for place, part in ((5, "backbone"), (16.5, "neck")):
        axis.text(place, -0.55, part, ha="center", fontsize=SMALL + 2)
    plain(
        axis,
        "Squares are tapped; above each: channels of s | m. Dashed: what a Concat takes besides",
        "layer",
        "stride",
    )
    axis.set_yticks(
        [-math.log2(stride) for stride in (2, 4, 8, 16, 32)], ["2", "4", "8", "16", "32"]
    )
    axis.set(xticks=[], xlim=(-0.7, 22.9), ylim=(-5.5, -0.3))
    return figure


def lambda_over_epochs(schedule: Sequence[Sequence[float]], where: str) -> Figure:
    """Each segment is a line; where it begins is in it, where it ends is not."""
    figure = Figure(figsize=(9, 3.4), dpi=DPI, layout="constrained")
    axis = figure.subplots()
    last = max(NOTES_TABLE)
    for start, first, end, final in schedule:
        stop = min(end, last)
        until = first + (final - first) * (stop - start) / (end - start)
        axis.plot([start, stop], [first, until], color=COLOURS[0], lw=2.5)
        axis.plot(start, first, "o", color=COLOURS[0], ms=7)
        if math.isfinite(end):
            axis.plot(stop, until, "o", mec=COLOURS[0], mfc="white", ms=7, mew=1.5)
    wrong = {t: y for t, y in NOTES_TABLE.items() if abs(y - piecewise_linear(schedule, t)) > 1e-9}
    axis.plot(
        *zip(*wrong.items(), strict=True),
        "X",
        color=COLOURS[5],
        ms=11,
        mec="white",
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
    plain(axis, f"lambda over the epochs, from {where}", "epoch", "lambda")
    axis.set(xlim=(-2, last + 2), ylim=(-0.06, 2.1))
    axis.legend(fontsize=SMALL + 1, frameon=False)
    return figure


def attention(
    scenes: Scenes, chosen: int, taps: Sequence[str], models: Mapping[str, Any]
) -> Figure:
    """One scene; the maps at the taps in their own cells, a row for each network."""
    image = scenes.images[chosen : chosen + 1]
    feats = {name: look(model, taps, image) for name, model in models.items()}
    distances = [map_distance(*pair).item() for pair in zip(*feats.values(), strict=True)]
    figure = Figure(figsize=(1.5 * (1 + len(taps)), 3.9), dpi=DPI, layout="constrained")
    axes = figure.subplots(2, 1 + len(taps))
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    axes[0, 0].imshow(scenes.pictures[chosen])
    axes[0, 0].set_title("image", fontsize=SMALL + 2)
    axes[1, 0].axis("off")
    axes[1, 0].text(
        0.5,
        0.5,
        "dark: 0\nbright: largest\nof the pair",
        ha="center",
        va="center",
        fontsize=SMALL + 1,
    )
    for column, tap in enumerate(taps):
        maps = [attention_map(feat[column])[0].numpy() for feat in feats.values()]
        for row, (name, shown) in enumerate(zip(feats, maps, strict=True)):
            axis = axes[row, column + 1]
            axis.imshow(shown, "viridis", vmin=0, vmax=max(map(np.max, maps)))
            if column == 0:
                axis.set_ylabel(name, fontsize=SMALL + 2)
        height, width = maps[0].shape
        axes[0, column + 1].set_title(f"{tap}\n{height}x{width}", fontsize=SMALL + 2)
        axes[1, column + 1].set_xlabel(f"distance {distances[column]:.2f}", fontsize=SMALL + 2)
    figure.suptitle("A(F), the attention maps at the taps", fontsize=SMALL + 3)
    return figure


def align(
    records: Sequence[Mapping], images: Tensor, taps: Sequence[str], student: Any, teacher: Any
) -> Figure:
    """Left: the run's distances. Right: a student that stays as it was initialised."""
    figure = Figure(figsize=(10, 3.6), dpi=DPI, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    logged = [(record["epoch"] + 1, record) for record in records if "distance/raw" in record]
    epochs = [epoch for epoch, _ in logged]
    of_run = {
        kind: [record[f"distance/{kind}"] for _, record in logged] for kind in ("raw", "aligned")
    }
    for axis, x, lines in (
        (left, epochs, of_run),
        (right, range(STEPS + 1), frozen(images, taps, student, teacher)),
    ):
        for number, (kind, y) in enumerate(lines.items()):
            style = {
                "color": COLOURS[(0, 5)[number]],
                "marker": MARKERS[number],
                "ls": ("-", "--")[number],
            }
            axis.plot(x, y, label=kind, markevery=math.ceil(len(y) / 8), lw=2, **style)
    plain(
        left,
        "Distillation: the student learns, and so does align",
        "epoch (0: before training)",
        "sum over the taps",
    )
    plain(right, "Student frozen at random weights: align alone learns", "steps of align", "")
    left.set_ylim(bottom=0)
    right.legend(fontsize=SMALL + 1, frameon=False, title="attention distance")
    return figure


def frozen(
    images: Tensor, taps: Sequence[str], student: Any, teacher: Any
) -> dict[str, list[float]]:
    """-> distances, mean over the images and summed over the taps, while Align is trained and
    nothing else.
    """
    for module in student.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = (
                1.0  # its statistics are then those of these images, and not of nothing
            )
    with torch.no_grad():
        student.train()(images)
    ours, theirs = (
        dict(zip(taps, look(model, taps, images), strict=True)) for model in (student, teacher)
    )
    shapes = {tap: (ours[tap].shape[1], *theirs[tap].shape[1:]) for tap in taps}
    modules = Align(shapes)  # type: ignore[arg-type]
    optimizer = torch.optim.Adam(modules.parameters(), LEARNING_RATE)
    raw = sum(map_distance(ours[tap], theirs[tap]).mean().item() for tap in taps)
    aligned = []
    for _ in range(STEPS + 1):
        feats = modules(ours)
        loss = torch.stack([map_distance(feats[tap], theirs[tap]).mean() for tap in taps]).sum()
        aligned.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {"raw": [raw] * len(aligned), "aligned": aligned}


@torch.no_grad()
def assigner(scenes: Scenes, chosen: int, student: Any) -> Figure:
    """Left: all anchor points inside a box. Right: those that were chosen, by target score."""
    image, target = scenes.images[chosen : chosen + 1], scenes.targets[chosen]
    scale, corner = (
        np.tile(numbers[chosen], 2) for numbers in (scenes.inverse.scale, scenes.inverse.corner)
    )
    targets: Targets = {
        "boxes_xyxy": torch.from_numpy(target["boxes_xyxy"] / scale + corner)[None].float(),
        "labels": torch.from_numpy(target["labels"])[None],
        "ids": [target["id"]],
    }
    preds = student.eval()(image)
    points, stride_of = anchor_points([p.shape[2:] for p in preds], STRIDES, image.device)
    flat = torch.cat([p.flatten(2) for p in preds], 2).transpose(1, 2)
    found_xyxy = dist_ltrb_to_xyxy(
        expected_dist(flat[..., : 4 * REG_MAX], REG_MAX), points, stride_of
    )
    score = (
        assign(flat[..., 4 * REG_MAX :].sigmoid(), found_xyxy, points, targets).scores[0].amax(-1)
    )
    inside = centre_inside(points, targets["boxes_xyxy"])[0].any(0)

    figure = Figure(figsize=(10, 5.2), dpi=DPI, layout="constrained")
    axes = figure.subplots(1, 2)
    size, faded = image.shape[3], 0.65 + 0.35 * scenes.pictures[chosen]
    chosen_by: dict[str, Any] = {"c": score, "cmap": "viridis", "vmin": 0, "vmax": 1}
    shown = (
        (
            f"Candidates: {int(inside.sum())} centres inside a box",
            inside,
            chosen_by | {"c": 0 * score, "cmap": "cividis"},
        ),
        (f"Chosen: {int((score > 0).sum())}, by target score", score > 0, chosen_by),
    )
    for axis, (title, mask, look_of) in zip(axes, shown, strict=True):
        axis.imshow(faded, extent=(0, size, size, 0))
        axis.set(xticks=[], yticks=[])
        axis.set_title(title, fontsize=SMALL + 3)
        for x0, y0, x1, y1 in targets["boxes_xyxy"][0].tolist():
            for colour, width in (("black", 3.5), ("white", 1.5)):
                axis.plot([x0, x1, x1, x0, x0], [y0, y0, y1, y1, y0], color=colour, lw=width)
        for marker, stride in zip(MARKERS, STRIDES, strict=False):
            here = mask & (stride_of[:, 0] == stride)
            style = {**look_of, "c": look_of["c"][here], "marker": marker, "s": 50 + 4 * stride}
            drawn = axis.scatter(
                *points[here].T, label=f"stride {stride}", edgecolors="black", **style
            )
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower left", ncols=3, fontsize=SMALL + 2
    )
    figure.colorbar(drawn, ax=axes[1], shrink=0.8).set_label("target score", fontsize=SMALL + 2)
    return figure


if __name__ == "__main__":
    main()
