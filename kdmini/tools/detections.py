"""The pictures of detections; DetectionMetric names `figures` as what draws them.

    batch.png              training images as the loader renders them, with their boxes
    detections.png         what was detected beside what is there
    precision_recall.png   of each class, over the whole validation set
    confusion.png          what the objects of each class were taken for, likewise

Legend: S image size, D detections and G objects of an image.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torchvision.ops import box_iou

from kdmini.contracts import Prediction, Target
from kdmini.data.layout import Frame
from kdmini.data.loader import TrainLoader
from kdmini.detection.average_precision import DetectionMetric
from kdmini.detection.breakdown import SHOWN
from kdmini.detection.matching import match_voc, overlapping_pairs
from kdmini.detection.precision import precision_curve
from kdmini.detection.truth import Boxes
from kdmini.engine import on_cpu
from kdmini.tools import draw_confusion
from kdmini.tools.draw import COLOURS, SMALL, Axes, Figure, blank, grid, style
from kdmini.tools.draw_boxes import Box, BoxedImage, draw_boxes
from kdmini.tools.scenes import Material, Scenes

COLUMNS = 4  # of images with boxes

# of the detections that are drawn
SCORE = SHOWN
IOU = 0.7  # boxes of one class that overlap by more are one detection
MAX_DET = 300

HIT_IOU = 0.5  # as in VOC


def figures(material: Material) -> Iterator[tuple[str, Figure]]:
    """-> name and picture, of what there is."""
    if material.train_loader is not None:
        yield "batch", batch(material.train_loader)
    if material.scenes is not None:
        yield "detections", detections(material.student, material.scenes, material.weights)
    if material.metric is not None:
        yield "precision_recall", precision_recall(material.metric)
        yield "confusion", confusion(material.metric)


def batch(loader: TrainLoader) -> Figure:
    """The first batch of the first epoch."""
    images, targets = next(loader.epoch(0))
    names = loader.store.names
    size = float(images.shape[2])
    boxed = []
    for n, picture in enumerate(images.permute(0, 2, 3, 1).numpy()):
        labels = targets["labels"][n]
        real = labels >= 0  # the others are padding
        rows = zip(targets["boxes_xyxy"][n][real].tolist(), labels[real], strict=True)
        boxes = [Box(box, names[label], "object") for box, label in rows]
        if "ignored_xyxy" in targets:
            regions = targets["ignored_xyxy"][n].tolist()
            boxes += [Box(box, "ignored", "difficult") for box in regions if any(box)]
        image = BoxedImage(
            picture,
            extent=(0, size, size, 0),
            size=(size, size),
            boxes=boxes,
            title=targets["ids"][n],
        )
        boxed.append(image)
    title = "Training images as rendered in the first epoch, with their boxes"
    return draw_boxes(boxed, COLUMNS, title)


# --- detections


@torch.no_grad()
def detections(detector: Any, scenes: Scenes, weights: str) -> Figure:
    """Hits and misses beside the ground truth, or detections alone where none is known.

    weights: names those of the detector in the title.
    """
    names = detector.names
    preds = detector.eval()(scenes.images)
    in_square = on_cpu(detector.decode(preds, score=SCORE, iou=IOU, max_det=MAX_DET))
    in_file = Boxes.to_file(in_square, scenes.frames)
    pictures = scenes.pictures
    boxed = []
    for n, target in enumerate(scenes.targets):
        prediction = in_file[n]
        image = without_boxes(pictures[n], scenes.frames[n])
        kinds = ["detection"] * len(prediction["scores"])
        if scenes.annotated:
            judged = judge(prediction, target)
            kinds = judged.detections
            objects = boxes_of_target(target, judged.objects, names)
            boxed.append(image._replace(boxes=objects, title=f"{target['id']}: ground truth"))
        boxes = boxes_of_prediction(prediction, kinds, names)
        boxed.append(image._replace(boxes=boxes, title=f"{target['id']}: detections"))
    return draw_boxes(boxed, COLUMNS, f"Detections of {weights} with a score over {SCORE}")


def without_boxes(picture: np.ndarray, frame: Frame) -> BoxedImage:
    """A letterboxed image, (S, S, 3), in pixels of its file."""
    left, top = -frame.corner * frame.scale
    right, bottom = (len(picture) - frame.corner) * frame.scale
    width, height = frame.native
    return BoxedImage(
        picture,
        extent=(left, right, bottom, top),
        size=(width, height),
        boxes=[],
        title="",
    )


def boxes_of_target(target: Target, kinds: Sequence[str], names: Sequence[str]) -> list[Box]:
    """The G objects, of these kinds."""
    texts = [names[label] for label in target["labels"]]
    rows = zip(target["boxes_xyxy"].tolist(), texts, kinds, strict=True)
    return [Box(*row) for row in rows]


def boxes_of_prediction(
    prediction: Prediction, kinds: Sequence[str], names: Sequence[str]
) -> list[Box]:
    """The D detections, of these kinds."""
    scored = zip(prediction["labels"], prediction["scores"], strict=True)
    texts = [f"{names[label]} {score:.2f}" for label, score in scored]
    rows = zip(prediction["boxes_xyxy"].tolist(), texts, kinds, strict=True)
    return [Box(*row) for row in rows]


class Judged(NamedTuple):
    """Kinds: hit, difficult, false alarm or missed."""

    detections: list[str]  # D
    objects: list[str]  # G


def judge(prediction: Prediction, target: Target) -> Judged:
    """What the detections, best score first, and the objects are, as VOC counts.

    A detection stands for the object of its class that it overlaps most, and each object is
    found once.
    """
    detections = ["false alarm"] * len(prediction["scores"])
    objects = ["difficult" if difficult else "missed" for difficult in target["difficult"]]
    if not objects:
        return Judged(detections, objects)

    boxes_xyxy = prediction["boxes_xyxy"]
    objects_xyxy = torch.from_numpy(target["boxes_xyxy"]).to(boxes_xyxy)
    overlap = box_iou(boxes_xyxy, objects_xyxy)  # (D, G)
    labels = torch.from_numpy(target["labels"])
    overlap[prediction["labels"][:, None] != labels] = 0
    for d in range(len(detections)):
        g = int(overlap[d].argmax())
        if overlap[d, g] >= HIT_IOU and objects[g] != "hit":
            kind = "difficult" if objects[g] == "difficult" else "hit"
            detections[d] = kind
            objects[g] = kind
    return Judged(detections, objects)


# --- precision and recall


def precision_recall(metric: DetectionMetric) -> Figure:
    """Of each class, as in VOC; the metric has seen the whole validation set."""
    curves = {}
    for name, detected, objects in metric.by_class():
        difficult = objects["difficult"]
        count = int((~difficult).sum())
        pairs = overlapping_pairs(detected, objects)
        hit, ignored = match_voc(*pairs, difficult, len(detected))
        curves[name] = precision_curve(hit, ignored, count)
    averages = [curve.mean() for curve in curves.values() if len(curve)]
    mean = f"mean AP {np.mean(averages):.3f}" if averages else "no objects"
    title = f"Precision and recall at IoU 0.5 over the validation set, as in VOC: {mean}"
    return draw_precision_recall(curves, title)


def draw_precision_recall(curves: Mapping[str, np.ndarray], title: str) -> Figure:
    """One set of axes for each class.

    curves: class -> (count,), the best precision at recall 1 / count, 2 / count, ... 1; 0
    beyond what was reached.
    """
    columns = math.ceil(math.sqrt(len(curves) * 1.25))
    rows = math.ceil(len(curves) / columns)
    figure = blank(2.6 * columns, 2.5 * rows + 0.7, title)
    axes = grid(figure, len(curves), columns, sharex=True, sharey=True)
    for number, (name, curve) in enumerate(curves.items()):
        lowest = number + columns >= len(curves)  # of its column
        draw_class(axes[number], name, curve, lowest)
    figure.supxlabel("recall", fontsize=SMALL + 1)
    figure.supylabel("precision", fontsize=SMALL + 1)
    return figure


def draw_class(axis: Axes, name: str, curve: np.ndarray, lowest: bool) -> None:
    """The area under the line is the mean of its values, the average precision."""
    count = len(curve)
    scored = f"AP {curve.mean():.2f}, {count:,} objects" if count else "no objects"
    style(axis, f"{name}: {scored}")
    axis.set(xlim=(0, 1), ylim=(0, 1.02), xticks=[0, 0.5, 1], yticks=[0, 0.5, 1])
    axis.tick_params(labelbottom=lowest)
    if not count:
        return
    recall = np.arange(count + 1) / count
    stairs = np.concatenate([curve[:1], curve])
    axis.fill_between(recall, stairs, step="pre", color=COLOURS[0], alpha=0.2, linewidth=0)
    axis.step(recall, stairs, where="pre", color=COLOURS[0])


# --- confusion


def confusion(metric: DetectionMetric) -> Figure:
    """Of the detections that are shown; the metric has seen the whole validation set."""
    matrix = metric.confusion()
    rows = [f"{name}, {count:,}" for name, count in zip(metric.names, matrix.sum(1), strict=False)]
    title = f"What the objects of each class were taken for, at a score of {SCORE}"
    columns = [*metric.names, "not found"]
    return draw_confusion.confusion(matrix, columns, [*rows, "nothing"], title, "objects")
