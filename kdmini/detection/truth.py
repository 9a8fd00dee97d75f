"""How boxes travel: from a data set through mosaic, zoom and flip into a batch, and from
detections back to the files.

Boxes are `xyxy` corners in pixels, continuous: a box that covers the first pixel is
0, 0, 1, 1.
Legend: N images, S image size, M images of the store, B objects in them, G objects of an
image (padded), D detections.
"""

from typing import Any, Literal, NamedTuple, NotRequired, TypedDict

import numpy as np
import torch
from torch import Tensor

from kdmini.contracts import Prediction, UserError
from kdmini.data.layout import Frame, Layout
from kdmini.data.render import to_device
from kdmini.data.store import Store

# what must be left of a box for it to stay
MIN_SIDE = 2.0  # pixels
MAX_ASPECT = 100.0  # longer side over shorter
MIN_AREA = 0.1  # share of its area

LEAST_PADDED = 8  # objects of an image; more are padded to 16, 32, 64, ...

Difficult = Literal["background", "ignore"]  # what such objects are in training


class Target(TypedDict):
    """The objects of one image, as a data set gives them."""

    boxes_xyxy: np.ndarray  # (G, 4) float32, pixels of the file, from 0 to width or height
    labels: np.ndarray  # (G,) int64, index into the data set's names
    difficult: np.ndarray  # (G,) bool; not trained on, neither hit nor miss in evaluation
    id: str  # names the image, unique in the data set


class Targets(TypedDict):
    """The objects of a training batch, padded to one G."""

    boxes_xyxy: Tensor  # (N, G, 4) float32, pixels of the rendered image
    labels: Tensor  # (N, G) int64, -1 where padded
    # (N, R, 4) regions in which nothing is background, without area where padded
    ignored_xyxy: NotRequired[Tensor]
    ids: list[str]  # N; of a mosaic, the image that it was drawn for


class Detections(TypedDict):
    """What a detector sees in one image, best score first."""

    boxes_xyxy: Tensor  # (D, 4) float32, pixels
    scores: Tensor  # (D,) 0..1
    labels: Tensor  # (D,) int64


class Boxes:
    """A `kdmini.contracts.Truth`. Difficult objects are not trained on.

    Raises UserError where there are no others.
    """

    @staticmethod
    def split(target: Any) -> tuple[None, Any]:
        """Boxes are no labels of pixels."""
        return None, target

    def __init__(self, store: Store):
        self.imgsz = store.imgsz
        self.device = store.device
        self.objects = objects_of(store)
        if not len(self.objects.labels):
            difficult = sum(int(target["difficult"].sum()) for target in store.targets)
            raise UserError(
                f"data.train: no object to learn from in its {len(store):,} images "
                f"({difficult:,} difficult ones do not count); look at the annotations"
            )

    def rendered(self, layout: Layout, plane: Tensor | None = None) -> dict[str, Any]:
        """-> `boxes_xyxy` and `labels` as in Targets."""
        return pad(render_boxes(self.objects, layout, self.imgsz), self.device)

    @staticmethod
    def to_file(predictions: list[Prediction], frames: list[Frame]) -> list[Prediction]:
        """Boxes in pixels of the files, clipped to the picture."""
        moved: list[Prediction] = []
        for prediction, frame in zip(predictions, frames, strict=True):
            corners = prediction["boxes_xyxy"].reshape(-1, 2, 2)
            scale, corner, native = (torch.as_tensor(x.copy()).to(corners) for x in frame[:3])
            corners = torch.minimum(((corners - corner) * scale).clamp(min=0), native)
            moved.append({**prediction, "boxes_xyxy": corners.reshape(-1, 4)})
        return moved


class BoxesAndRegions(Boxes):
    """Boxes, with the difficult objects as regions in which nothing is background."""

    def __init__(self, store: Store):
        super().__init__(store)
        self.regions = objects_of(store, difficult=True)

    def rendered(self, layout: Layout, plane: Tensor | None = None) -> dict[str, Any]:
        """-> `ignored_xyxy` as well."""
        targets = super().rendered(layout, plane)
        regions = render_boxes(self.regions, layout, self.imgsz)
        # to the length of the objects, or more: else every pair of lengths is compiled anew
        padded = pad(regions, self.device, least=targets["labels"].shape[1])
        return {**targets, "ignored_xyxy": padded["boxes_xyxy"]}


class Objects(NamedTuple):
    """Objects of all images in a row; image m has those from first[m] to first[m + 1]."""

    corners: np.ndarray  # (B, corner, xy) stored pixels
    labels: np.ndarray  # (B,)
    first: np.ndarray  # (M + 1,)


def objects_of(store: Store, difficult: bool = False) -> Objects:
    """Those that are not difficult, or those that are, in the pixels that the store keeps."""
    scales = (store.sizes / store.native)[:, [1, 0, 1, 0]]  # (M, 4)
    boxes = []
    labels = []
    for target, scale in zip(store.targets, scales, strict=True):
        chosen = target["difficult"] == difficult
        boxes.append(target["boxes_xyxy"][chosen] * scale)
        labels.append(target["labels"][chosen])
    first = np.cumsum([0, *map(len, labels)])
    return Objects(np.concatenate(boxes).reshape(-1, 2, 2), np.concatenate(labels), first)


class Rendered(NamedTuple):
    """What is left of the objects of one rendered image."""

    boxes_xyxy: np.ndarray  # (G, 4) float32, pixels of the rendered image
    labels: np.ndarray  # (G,)


def render_boxes(objects: Objects, layout: Layout, imgsz: int) -> list[Rendered]:
    """The objects of each image of the batch.

    A box stays if what the picture shows of it has sides over MIN_SIDE, an aspect under
    MAX_ASPECT and more than MIN_AREA of its area (of the part on the mosaic's canvas, as in
    the public recipe).
    """
    # All tiles of all images stand in a row, tile 0 to 3 of the first image, then those of the
    # second, and so on; below, each object of each tile has a place in a row of its own.
    used = layout.tiled[:, None] | (np.arange(4) == 0)  # (N, 4)
    counts = np.where(used, np.diff(objects.first)[layout.image], 0).ravel()
    tile = np.repeat(np.arange(counts.size), counts)  # (B',) of each object
    before = (counts.cumsum() - counts)[tile]  # objects of the tiles before it
    index = np.arange(len(tile)) - before  # among those of its tile
    row = objects.first[layout.image].ravel()[tile] + index  # in `objects`

    a = layout.a.reshape(-1, 1, 2)[tile]
    b = layout.b.reshape(-1, 1, 2)[tile]
    shown = layout.shown.reshape(-1, 1, 2, 2)[tile]  # (B', 1, xy, [low, high])
    corners = np.sort(objects.corners[row] * a + b, 1)  # sorted, as mirrored ones swap
    on_canvas = corners.clip(shown[..., 0], shown[..., 1])
    visible = on_canvas.clip(0, imgsz)
    keep = remains(on_canvas, visible)

    ends = np.bincount(tile[keep] // 4, minlength=len(layout.image)).cumsum()[:-1]
    boxes_xyxy = np.split(visible[keep].reshape(-1, 4).astype(np.float32), ends)
    labels = np.split(objects.labels[row[keep]], ends)
    return [Rendered(*pair) for pair in zip(boxes_xyxy, labels, strict=True)]


def remains(whole: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """(B, corner, xy) before and after clipping to the picture -> (B,) bool."""
    sides = seen[:, 1] - seen[:, 0]  # (B, 2)
    whole_sides = whole[:, 1] - whole[:, 0]
    aspect = sides.max(1) / np.maximum(sides.min(1), 1e-9)
    area = sides.prod(1) / np.maximum(whole_sides.prod(1), 1e-9)
    return (sides.min(1) > MIN_SIDE) & (aspect < MAX_ASPECT) & (area > MIN_AREA)


def pad(
    rendered: list[Rendered], device: torch.device, least: int = LEAST_PADDED
) -> dict[str, Any]:
    """Objects of each image -> tensors with G the next of 8, 16, 32, 64, ... so that few
    shapes occur; `least`, one of these, is where it begins.
    """
    most = max(len(image.labels) for image in rendered)
    padded = least
    while padded < most:
        padded *= 2
    boxes_xyxy = np.zeros((len(rendered), padded, 4), np.float32)
    labels = np.full((len(rendered), padded), -1, np.int64)
    for n, image in enumerate(rendered):
        boxes_xyxy[n, : len(image.labels)] = image.boxes_xyxy
        labels[n, : len(image.labels)] = image.labels
    return {"boxes_xyxy": to_device(boxes_xyxy, device), "labels": to_device(labels, device)}
