"""How boxes travel: from the files through mosaic, zoom and flip into a batch, and back."""

from dataclasses import dataclass

import numpy as np
import torch

from kdmini.contracts import Detections, Targets
from kdmini.data.render import Layout, to_device
from kdmini.data.store import Store

MIN_SIDE, MAX_ASPECT, MIN_AREA = (
    2.0,
    100.0,
    0.1,
)  # what must be left of a box: pixels, ratio, share of its area


def render_boxes(store: Store, layout: Layout, imgsz: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """-> per image boxes_xyxy (G, 4) float32 in rendered pixels and labels (G,); difficult objects
    are left out.

    A box stays if what the picture shows of it has sides over 2 pixels, an aspect under 100 and
    more than a tenth of its area (of the part on the mosaic's canvas, as in the public recipe)."""
    objects = store.objects
    four = np.isfinite(layout.centre[:, :1]) | (np.arange(4) == 0)  # (N, 4) tiles in use
    counts = np.where(four, np.diff(objects.first)[layout.image], 0).ravel()  # objects of each tile
    tile = np.repeat(np.arange(counts.size), counts)  # (B,) of all objects
    rank = np.arange(len(tile)) - (counts.cumsum() - counts)[tile]  # among those of its tile
    row = objects.first[layout.image].ravel()[tile] + rank
    a, b = layout.a.reshape(-1, 1, 2)[tile], layout.b.reshape(-1, 1, 2)[tile]
    low, high = layout.shown.reshape(-1, 1, 2, 2)[tile].transpose(3, 0, 1, 2)
    corners = np.sort(
        objects.corners[row] * a + b, 1
    )  # (B, corner, xy), sorted: mirrored ones swap
    whole = corners.clip(low, high)
    seen = whole.clip(0, imgsz)
    keep = remains(whole, seen)
    ends = np.bincount(tile[keep] // 4, minlength=len(layout.image)).cumsum()[:-1]
    boxes_xyxy = seen[keep].reshape(-1, 4).astype(np.float32)
    return list(
        zip(np.split(boxes_xyxy, ends), np.split(objects.labels[row[keep]], ends), strict=True)
    )


def remains(whole: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """(G, corner, xy) before and after clipping to the picture -> (G,) bool."""
    sides, whole_sides = seen[:, 1] - seen[:, 0], whole[:, 1] - whole[:, 0]  # (G, 2)
    aspect = sides.max(1) / np.maximum(sides.min(1), 1e-9)
    area = sides.prod(1) / np.maximum(whole_sides.prod(1), 1e-9)
    return (sides.min(1) > MIN_SIDE) & (aspect < MAX_ASPECT) & (area > MIN_AREA)


@dataclass(frozen=True)
class Inverse:
    """From the letterboxed images back to the files: native = (x - corner) * scale, clipped to the
    picture.
    """

    scale: np.ndarray  # (N, 2) x, y
    corner: np.ndarray  # (N, 2) x, y
    native: np.ndarray  # (N, 2) width, height

    def __call__(self, detections: list[Detections]) -> list[Detections]:
        out: list[Detections] = []
        for found, *numbers in zip(detections, self.scale, self.corner, self.native, strict=True):
            corners = found["boxes_xyxy"].reshape(-1, 2, 2)
            scale, corner, limit = (torch.as_tensor(x.copy()).to(corners) for x in numbers)
            corners = torch.minimum(((corners - corner) * scale).clamp(min=0), limit)
            out.append({**found, "boxes_xyxy": corners.reshape(-1, 4)})
        return out


def pad(
    rendered: list[tuple[np.ndarray, np.ndarray]], ids: list[str], device: torch.device
) -> Targets:
    """Objects of each image -> tensors with G the next of 8, 16, 32, 64, ... so that few shapes
    occur.
    """
    most = max(len(labels) for _, labels in rendered)
    padded = 8
    while padded < most:
        padded *= 2
    boxes_xyxy = np.zeros((len(rendered), padded, 4), np.float32)
    labels = np.full((len(rendered), padded), -1, np.int64)
    for n, (boxes, classes) in enumerate(rendered):
        boxes_xyxy[n, : len(boxes)] = boxes
        labels[n, : len(classes)] = classes
    return {
        "boxes_xyxy": to_device(boxes_xyxy, device),
        "labels": to_device(labels, device),
        "ids": ids,
    }
