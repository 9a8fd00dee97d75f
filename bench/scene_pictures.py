"""The pictures of docs/ideas.md that need images and networks; see bench/pictures.py.

Legend: N images, S image size, A anchor points, G objects of an image.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kdmini.contracts import Target
from kdmini.data.layout import Frame
from kdmini.detection.boxes import anchor_points, centre_inside, dist_ltrb_to_xyxy, flatten_levels
from kdmini.detection.truth import Targets
from kdmini.detection.yolo11.assign import assign
from kdmini.detection.yolo11.layers import BOX_CHANNELS, REG_MAX, STRIDES
from kdmini.detection.yolo11.loss import expected_dist
from kdmini.distill.align import Align
from kdmini.distill.attention import attention_map, map_distance, to_largest
from kdmini.tools.draw import COLOURS, DPI, MARKERS, SMALL, Axes, Figure, style
from kdmini.tools.scenes import Scenes, feats_at

# of the experiment with a frozen student
STEPS = 60
LEARNING_RATE = 0.02

MOST_MARKERS = 8  # on a line, however many points it has


# --- where networks look


def attention(
    scenes: Scenes, chosen: int, taps: Sequence[str], networks: Mapping[str, Any]
) -> Figure:
    """One scene; the maps at the taps in cells of their own, a row for each network."""
    image = scenes.images[chosen : chosen + 1]
    feats = {name: feats_at(taps, network, image) for name, network in networks.items()}
    figure = Figure(figsize=(1.5 * (1 + len(taps)), 3.9), dpi=DPI, layout="constrained")
    axes = figure.subplots(2, 1 + len(taps))
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    axes[0, 0].imshow(scenes.pictures[chosen])
    axes[0, 0].set_title("image", fontsize=SMALL + 2)
    axes[1, 0].axis("off")
    scale = "dark: 0\nbright: largest\nof the pair"
    axes[1, 0].text(0.5, 0.5, scale, ha="center", va="center", fontsize=SMALL + 1)
    for row, name in enumerate(feats):
        axes[row, 1].set_ylabel(name, fontsize=SMALL + 2)
    for number, tap in enumerate(taps):
        draw_tap(axes[:, number + 1], tap, [of_tap[number] for of_tap in feats.values()])
    figure.suptitle("A(F), the attention maps at the taps", fontsize=SMALL + 3)
    return figure


def draw_tap(axes: Sequence[Axes], tap: str, feats: Sequence[Tensor]) -> None:
    """The maps of two networks at one tap, on one colour scale, and their distance."""
    of_unit_size = [to_largest(feat) for feat in feats]
    maps = [attention_map(feat)[0].numpy() for feat in of_unit_size]
    largest = max(values.max() for values in maps)
    for axis, values in zip(axes, maps, strict=True):
        axis.imshow(values, "viridis", vmin=0, vmax=largest)
    one, other = of_unit_size
    distance = map_distance(one, other).item()
    height, width = maps[0].shape
    axes[0].set_title(f"{tap}\n{height}x{width}", fontsize=SMALL + 2)
    axes[1].set_xlabel(f"distance {distance:.2f}", fontsize=SMALL + 2)


# --- alignment


def align(
    records: Sequence[Mapping], images: Tensor, taps: Sequence[str], student: Any, teacher: Any
) -> Figure:
    """Left: the run's distances. Right: a student that stays as it was initialised.

    records: lines of metrics.jsonl.
    """
    figure = Figure(figsize=(10, 3.6), dpi=DPI, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    logged = [record for record in records if "distance/raw" in record]
    epochs = [record["epoch"] + 1 for record in logged]
    of_run = {
        kind: [record[f"distance/{kind}"] for record in logged] for kind in ("raw", "aligned")
    }
    draw_distances(left, epochs, of_run)
    draw_distances(right, range(STEPS + 1), distances_frozen(images, taps, student, teacher))
    style(
        left,
        "Distillation: the student learns, and so does align",
        "epoch (0: before training)",
        "sum over the taps",
    )
    style(right, "Student frozen at random weights: align alone learns", "steps of align")
    left.set_ylim(bottom=0)
    right.legend(fontsize=SMALL + 1, frameon=False, title="attention distance")
    return figure


def draw_distances(axis: Axes, x: Sequence[int], lines: Mapping[str, Sequence[float]]) -> None:
    """The lines raw and aligned."""
    colours = (COLOURS[0], COLOURS[5])
    for number, (kind, y) in enumerate(lines.items()):
        axis.plot(
            x,
            y,
            label=kind,
            color=colours[number],
            marker=MARKERS[number],
            linestyle=("-", "--")[number],
            markevery=math.ceil(len(y) / MOST_MARKERS),
            linewidth=2,
        )


def distances_frozen(
    images: Tensor, taps: Sequence[str], student: Any, teacher: Any
) -> dict[str, list[float]]:
    """-> raw and aligned, mean over the images and summed over the taps, while Align is
    trained and nothing else.
    """
    for module in student.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            # its statistics are then those of these images, and not of nothing
            module.momentum = 1.0
    with torch.no_grad():
        student.train()(images)
    ours = dict(zip(taps, feats_at(taps, student, images), strict=True))
    theirs = dict(zip(taps, feats_at(taps, teacher, images), strict=True))

    shapes = {}
    for tap in taps:
        _, channels, height, width = theirs[tap].shape
        shapes[tap] = (ours[tap].shape[1], channels, height, width)
    modules = Align(shapes)
    optimizer = torch.optim.Adam(modules.parameters(), LEARNING_RATE)
    raw = sum(map_distance(ours[tap], theirs[tap]).mean().item() for tap in taps)
    aligned = []
    for _ in range(STEPS + 1):
        feats = modules(ours)
        losses = [map_distance(feats[tap], theirs[tap]).mean() for tap in taps]
        loss = torch.stack(losses).sum()
        aligned.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {"raw": [raw] * len(aligned), "aligned": aligned}


def distances_beside(images: Tensor, taps: Sequence[str], student: Any, teacher: Any) -> list[str]:
    """Lines that say what the student's distance is worth: the teacher's maps beside the
    student's, beside the student's of another image, and beside maps without any content.

    Means over the images, summed over the taps, of maps of unit norm.
    """
    sums = {"the student's": 0.0, "the student's of another image": 0.0, "a constant map": 0.0}
    sides = [feats_at(taps, network, images) for network in (student, teacher)]
    for one, other in zip(*sides, strict=True):
        ours = to_largest(one)
        theirs = to_largest(other)
        beside = (ours, ours.roll(1, 0), torch.ones_like(theirs))
        for name, feat in zip(sums, beside, strict=True):
            sums[name] += map_distance(feat, theirs).mean().item()
    return [f"teacher's maps to {name}: {total:.2f}" for name, total in sums.items()]


# --- assignment


class Anchors(NamedTuple):
    """The anchor points of a scene."""

    points: Tensor  # (A, 2) x y, pixels
    stride_of: Tensor  # (A,)
    inside: Tensor  # (A,) bool: in a box
    scores: Tensor  # (A,) target scores, 0 for background


@torch.no_grad()
def assigner(scenes: Scenes, chosen: int, student: Any) -> Figure:
    """Left: all anchor points inside a box. Right: those chosen, by target score."""
    image = scenes.images[chosen : chosen + 1]
    targets = in_square(scenes.targets[chosen], scenes.frames[chosen])
    anchors = assigned(student, image, targets)

    figure = Figure(figsize=(10, 5.2), dpi=DPI, layout="constrained")
    left, right = figure.subplots(1, 2)
    faded = 0.65 + 0.35 * scenes.pictures[chosen]
    boxes_xyxy = targets["boxes_xyxy"][0].tolist()
    inside = anchors.inside
    draw_scene(left, faded, boxes_xyxy, f"Candidates: {int(inside.sum())} centres inside a box")
    draw_anchors(left, anchors, inside, torch.zeros_like(anchors.scores), "cividis")
    positive = anchors.scores > 0
    draw_scene(right, faded, boxes_xyxy, f"Chosen: {int(positive.sum())}, by target score")
    drawn = draw_anchors(right, anchors, positive, anchors.scores, "viridis")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=3, fontsize=SMALL + 2)
    scale = figure.colorbar(drawn, ax=right, shrink=0.8)
    scale.set_label("target score", fontsize=SMALL + 2)
    return figure


def in_square(target: Target, frame: Frame) -> Targets:
    """The objects of one image as a batch of one, in pixels of the letterboxed image."""
    corners = target["boxes_xyxy"].reshape(-1, 2, 2)
    boxes_xyxy = (corners / frame.scale + frame.corner).reshape(-1, 4)
    return {
        "boxes_xyxy": torch.from_numpy(boxes_xyxy)[None].float(),
        "labels": torch.from_numpy(target["labels"])[None],
        "ids": [target["id"]],
    }


def assigned(student: Any, image: Tensor, targets: Targets) -> Anchors:
    """image: (1, 3, S, S)."""
    preds = student.eval()(image)
    sizes = [level.shape[2:] for level in preds]
    points, stride_of = anchor_points(sizes, STRIDES, image.device)
    outputs = flatten_levels(preds)  # (1, A, 64 + K)
    dist_ltrb = expected_dist(outputs[..., :BOX_CHANNELS], REG_MAX)
    boxes_xyxy = dist_ltrb_to_xyxy(dist_ltrb, points, stride_of)
    scores = outputs[..., BOX_CHANNELS:].sigmoid()
    assignment = assign(scores, boxes_xyxy, points, targets)
    inside = centre_inside(points, targets["boxes_xyxy"])[0].any(0)
    return Anchors(points, stride_of[:, 0], inside, assignment.scores[0].amax(-1))


def draw_scene(
    axis: Axes, picture: np.ndarray, boxes_xyxy: Sequence[Sequence[float]], title: str
) -> None:
    """picture: (S, S, 3)."""
    size = len(picture)
    axis.imshow(picture, extent=(0, size, size, 0))
    axis.set(xticks=[], yticks=[])
    axis.set_title(title, fontsize=SMALL + 3)
    for left, top, right, bottom in boxes_xyxy:
        x = [left, right, right, left, left]
        y = [top, top, bottom, bottom, top]
        axis.plot(x, y, color="black", linewidth=3.5)
        axis.plot(x, y, color="white", linewidth=1.5)


def draw_anchors(axis: Axes, anchors: Anchors, which: Tensor, values: Tensor, colours: str) -> Any:
    """The points named by `which`, (A,) bool, coloured by the values, (A,) 0..1.

    Each level has a marker of its own -> the last level's, for a scale of the colours.
    """
    for marker, stride in zip(MARKERS, STRIDES, strict=False):
        here = which & (anchors.stride_of == stride)
        x, y = anchors.points[here].T
        drawn = axis.scatter(
            x,
            y,
            label=f"stride {stride}",
            edgecolors="black",
            c=values[here],
            cmap=colours,
            vmin=0,
            vmax=1,
            marker=marker,
            s=50 + 4 * stride,
        )
    return drawn
