"""The pictures of masks; MeanIoU names `figures` as what draws them.

    batch.png        training images as the loader renders them, with their masks
    masks.png        the photograph, its true mask, those of the networks, and where these
                     are wrong
    confusion.png    what the pixels of each class were taken for, over the validation set

Legend: S image size, H, W size of an image's file, h, w size of what is drawn of it,
K classes.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.patches import Patch
from PIL import Image

from kdmini.data.layout import Frame
from kdmini.data.loader import TrainLoader
from kdmini.engine import on_cpu
from kdmini.segmentation.mean_iou import MeanIoU
from kdmini.segmentation.truth import VOID, Masks
from kdmini.tools import draw_confusion
from kdmini.tools.draw import SMALL, Axes, Figure, blank, grid, show
from kdmini.tools.draw_masks import blended, colour_of, resized
from kdmini.tools.scenes import Material, Scenes

COLUMNS = 4  # of rendered images
CELL = 2.6  # inches that an image is wide
LEGEND_COLUMNS = 8


class Kind(NamedTuple):
    """What may be wrong with a pixel, and how it looks: colours of Okabe and Ito."""

    colour: str
    words: str


WRONG = Kind("#D55E00", "wrong")
STUDENT = Kind("#D55E00", "only the student is wrong")
TEACHER = Kind("#56B4E9", "only the teacher is wrong")
BOTH = Kind("#F0E442", "both are wrong")
DIFFER = Kind("#D55E00", "the two differ")


def figures(material: Material) -> Iterator[tuple[str, Figure]]:
    """-> name and picture, of what there is."""
    if material.train_loader is not None:
        yield "batch", batch(material.train_loader)
    if material.scenes is not None:
        yield "masks", masks(material, material.scenes)
    if material.metric is not None:
        yield "confusion", confusion(material.metric)


def batch(loader: TrainLoader) -> Figure:
    """The first batch of the first epoch."""
    images, targets = next(loader.epoch(0))
    planes = targets["mask"].cpu().numpy()
    rows = -(-len(images) // COLUMNS)
    title = "Training images as rendered in the first epoch, with their masks"
    figure = blank(CELL * COLUMNS, (CELL + 0.25) * rows + 1.1, title)
    pictures = images.permute(0, 2, 3, 1).cpu().numpy()
    axes = grid(figure, len(images), COLUMNS)
    for axis, picture, plane, name in zip(axes, pictures, planes, targets["ids"], strict=True):
        show(axis, blended(as_image(picture), plane), name)
    add_legend(figure, planes, loader.store.names)
    return figure


# --- masks


class Seen(NamedTuple):
    """One image and what is said of it; all masks are (h, w) uint8."""

    picture: Image.Image  # w, h
    truth: np.ndarray | None
    said: dict[str, np.ndarray]  # teacher, student -> its mask
    id: str


def masks(material: Material, scenes: Scenes) -> Figure:
    """A row for each image: photograph, truth, teacher, student, where the two are wrong.

    Without the truth, where they differ. The teacher is left out where it has other classes.
    """
    student = material.student
    networks = {"student": student}
    if material.teacher is not None and list(material.teacher.names) == list(student.names):
        networks = {"teacher": material.teacher, **networks}
    rows = seen(networks, scenes)
    known = rows[0].truth is not None
    titles = ["photograph", *(["truth"] if known else [])]
    titles += list(networks) if len(networks) == 2 else ["predicted"]
    kinds = kinds_of(list(networks), known)
    titles += ["where wrong" if known else "where they differ"] if kinds else []

    heights = [row.picture.height / row.picture.width for row in rows]
    height = sum(CELL * ratio + 0.25 for ratio in heights) + 1.4
    figure = blank(CELL * len(titles), height, f"Masks of {material.weights}")
    axes = figure.subplots(len(rows), len(titles), squeeze=False, height_ratios=heights)
    for row, line in zip(rows, axes, strict=True):
        draw_row(line, row, list(kinds))
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=SMALL + 1)
    drawn = [mask for row in rows for mask in (*row.said.values(), row.truth) if mask is not None]
    patches = [Patch(facecolor=kind.colour, label=kind.words) for kind in kinds.values()]
    add_legend(figure, drawn, student.names, patches)
    return figure


@torch.no_grad()
def seen(networks: Mapping[str, Any], scenes: Scenes) -> list[Seen]:
    """Each image without its padding, and the masks at that size."""
    said = {}
    for name, network in networks.items():
        decoded = on_cpu(network.decode(network.eval()(scenes.images)))
        said[name] = Masks.to_file(decoded, scenes.frames)
    rows = []
    for n, (picture, target) in enumerate(zip(scenes.pictures, scenes.targets, strict=True)):
        shown = unpadded(as_image(picture), scenes.frames[n])
        truth = resized(target["mask"], shown.size) if scenes.annotated else None
        of_networks = {
            name: resized(masks[n]["mask"].numpy(), shown.size) for name, masks in said.items()
        }
        rows.append(Seen(shown, truth, of_networks, target["id"]))
    return rows


def unpadded(square: Image.Image, frame: Frame) -> Image.Image:
    """What a letterboxed image has of its file."""
    left, top = np.round(frame.corner).astype(int).tolist()
    width, height = np.maximum(np.round(frame.native / frame.scale), 1).astype(int).tolist()
    return square.crop((left, top, left + width, top + height))


def draw_row(axes: Sequence[Axes], row: Seen, kinds: list[int]) -> None:
    """kinds: none where there is no column of what is wrong."""
    show(axes[0], row.picture, row.id)
    column = 1
    if row.truth is not None:
        show(axes[1], blended(row.picture, row.truth))
        column = 2
    for mask in row.said.values():
        right = "" if row.truth is None else f"{share_right(mask, row.truth):.1%} right"
        show(axes[column], blended(row.picture, mask), right)
        column += 1
    if kinds:
        show(axes[column], faults(row))


def share_right(mask: np.ndarray, truth: np.ndarray) -> float:
    """Of the pixels that are not void; 1 where all are."""
    counted = truth != VOID
    return float((mask == truth)[counted].mean()) if counted.any() else 1.0


def kinds_of(networks: list[str], known: bool) -> dict[int, Kind]:
    """What `fault_map` finds -> how it looks; nothing where there is nothing to compare."""
    if known:
        return {1: STUDENT, 2: TEACHER, 3: BOTH} if len(networks) == 2 else {1: WRONG}
    return {1: DIFFER} if len(networks) == 2 else {}


def fault_map(row: Seen) -> np.ndarray:
    """(h, w) uint8: 1 where the student is wrong, 2 where the teacher is, 3 where both are.

    Without the truth, 1 where the two differ. Void pixels are 0.
    """
    if row.truth is None:
        return (row.said["student"] != row.said["teacher"]).astype(np.uint8)
    counted = row.truth != VOID
    found = np.zeros(row.truth.shape, np.uint8)
    for name, mask in row.said.items():
        bit = 1 if name == "student" else 2
        found |= bit * (counted & (mask != row.truth)).astype(np.uint8)
    return found


def faults(row: Seen) -> np.ndarray:
    """(h, w, 3) uint8, the colours of `fault_map` on a pale picture."""
    kinds = kinds_of(list(row.said), row.truth is not None)
    grey = np.asarray(row.picture.convert("L"), np.float32)[..., None]
    pale = np.repeat(200 + grey * (55 / 255), 3, 2)
    found = fault_map(row)
    for number, kind in kinds.items():
        pale[found == number] = list(bytes.fromhex(kind.colour.removeprefix("#")))
    return pale.astype(np.uint8)


def as_image(picture: np.ndarray) -> Image.Image:
    """(H, W, 3) RGB 0..1 -> 8 bits."""
    return Image.fromarray((picture * 255).round().astype(np.uint8))


def add_legend(
    figure: Figure,
    drawn: Sequence[np.ndarray],
    names: Sequence[str],
    others: Sequence[Patch] = (),
) -> None:
    """The classes that any of the masks has, and other patches."""
    present = np.unique(np.concatenate([np.unique(mask) for mask in drawn])).tolist()
    patches = []
    for label in present:
        name = "void" if label == VOID else names[label]
        colour = "#" + bytes(colour_of(label)).hex()
        patches.append(Patch(facecolor=colour, edgecolor="black", linewidth=0.5, label=name))
    handles = [*patches, *others]
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=min(len(handles), LEGEND_COLUMNS),
        fontsize=SMALL,
    )


# --- confusion


def confusion(metric: MeanIoU) -> Figure:
    """What the pixels of each class were taken for, by a metric that has seen the whole
    validation set.
    """
    names = metric.names
    ious = [row["mIoU"] for row in metric.per_class().values()]
    rows = [
        f"{name}, IoU {'-' if np.isnan(iou) else format(iou, '.2f')}"
        for name, iou in zip(names, ious, strict=True)
    ]
    mean = metric.compute()["mIoU"]
    title = f"What the pixels of each class were taken for: mIoU {mean:.3f}"
    return draw_confusion.confusion(metric.confusion(), names, rows, title, "pixels")
