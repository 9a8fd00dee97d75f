"""Mean intersection over union: one confusion matrix of all pixels of all images.

Of a class, the IoU is what truth and prediction share of the pixels that either gives it,
TP / (TP + FP + FN). It is no mean over images: a class that fills few pixels of one image
and many of another counts once. Void pixels count nowhere. Source: Everingham et al., "The
PASCAL Visual Object Classes Challenge: A Retrospective", IJCV 2015.

Legend: K classes; H, W size of an image's file.
"""

import math
import re
import zlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kdmini.contracts import UserError
from kdmini.data.palette import palette_png
from kdmini.files import write_whole
from kdmini.segmentation.truth import VOID

VALUES = 256  # of a pixel of a mask
UNSAFE = r'[\x00-\x1f<>:"|?*\\]'  # in the name of a file, on one system or another


class Predicted(NamedTuple):
    """The mask of one image, as small as it waits for `save`: 3 kB of a photograph of VOC."""

    id: str
    size: tuple[int, int]  # H, W
    content: bytes  # zlib

    def mask(self) -> np.ndarray:
        """-> (H, W) uint8."""
        return np.frombuffer(zlib.decompress(self.content), np.uint8).reshape(self.size)


class MeanIoU:
    """Counts pixels batch by batch; start afresh with a new object.

    names: of the K classes.
    """

    fitness = "mIoU"
    figures = "kdmini.tools.segmentations:figures"
    summary = ("mIoU", "accuracy")

    def __init__(self, names: list[str]):
        self.names = list(names)
        # (K, K + 1) int64 of each batch: pixels by true and predicted class, and last the
        # images in which the true class is
        self.records: list[np.ndarray] = []
        self.predicted: list[Predicted] = []
        self.right: dict[str, float] = {}  # id -> share of its pixels

    def update(
        self, predictions: list[Mapping[str, Any]], targets: list[Mapping[str, Any]]
    ) -> None:
        """One batch, in pixels of the files: `mask` (H, W), a tensor of integers on any device
        in predictions, an array of uint8 with 255 void in targets.

        Raises ValueError if the lists differ in length or masks in size, UserError for an
        index without a name.
        """
        if len(predictions) != len(targets):
            raise ValueError(
                f"{len(predictions)} predictions for {len(targets)} targets: one of each per image"
            )
        count = len(self.names)
        record = np.zeros((count, count + 1), np.int64)
        for prediction, target in zip(predictions, targets, strict=True):
            pixels = count_pairs(target["id"], target["mask"], prediction["mask"])
            self._check_named(pixels.sum(1)[:VOID], f"the mask of {target['id']}")
            self._check_named(pixels.sum(0), f"the prediction for {target['id']}")
            record[:, :count] += pixels[:count, :count]
            record[:, count] += pixels[:count].any(1)
            right = share(pixels[:VOID].trace(), pixels[:VOID].sum())
            self.right[target["id"]] = 1.0 if math.isnan(right) else right
            self.predicted.append(compressed(target["id"], prediction["mask"]))
        if targets:
            self.records.append(record)

    def _check_named(self, pixels: np.ndarray, where: str) -> None:
        unnamed = np.flatnonzero(pixels[len(self.names) :]) + len(self.names)
        if len(unnamed):
            known = f"the metric knows {len(self.names)} names"
            raise UserError(f"{where} has index {unnamed[0]}, but {known}: give both the same")

    def _counted(self) -> tuple[np.ndarray, np.ndarray]:
        """-> pixels by true and predicted class (K, K), images of each true class (K,)."""
        count = len(self.names)
        total = sum(self.records, np.zeros((count, count + 1), np.int64))
        return total[:, :count], total[:, count]

    def compute(self) -> dict[str, float]:
        """-> mIoU; accuracy, the share of the pixels that are right; mAcc, the mean over classes
        of that; absent, the number of classes that neither truth nor prediction has: they are
        left out of the means, as are from mAcc those that the truth does not have.

        Means of nothing are 0.
        """
        matrix, _ = self._counted()
        rows = self.per_class().values()
        ious = [row["mIoU"] for row in rows]
        return {
            "mIoU": mean(ious),
            "accuracy": float(matrix.trace() / max(matrix.sum(), 1)),
            "mAcc": mean([row["mAcc"] for row in rows]),
            "absent": float(sum(map(math.isnan, ious))),
        }

    def per_class(self) -> dict[str, dict[str, float]]:
        """-> name -> the IoU as `mIoU`; the share of its pixels that are right as `mAcc`; the
        number of `images` that have it. NaN of nothing, as is `accuracy`, which is of all.
        """
        matrix, images = self._counted()
        shared = matrix.diagonal()
        true = matrix.sum(1)
        either = true + matrix.sum(0) - shared
        table = {}
        for label, name in enumerate(self.names):
            table[name] = {
                "mIoU": share(shared[label], either[label]),
                "accuracy": math.nan,
                "mAcc": share(shared[label], true[label]),
                "images": int(images[label]),
            }
        return table

    def confusion(self) -> np.ndarray:
        """(K, K) int64, pixels by true and predicted class."""
        matrix, _ = self._counted()
        return matrix

    def per_image(self) -> dict[str, float]:
        """-> id -> the share of its pixels that are right; 1 where all are void."""
        return self.right

    def chance(self) -> float:
        """The mIoU of the commonest class in every pixel."""
        matrix, _ = self._counted()
        true = matrix.sum(1)
        present = np.count_nonzero(true)
        return float(true.max() / true.sum() / present) if present else 0.0

    def save(self, folder: Path) -> Path:
        """Writes a palette PNG of each prediction, FOLDER/ID.png, and returns the folder.

        Raises UserError.
        """
        taken: set[str] = set()
        for predicted in self.predicted:
            name = safe_name(predicted.id)
            unique = name
            while unique.lower() in taken:  # not all systems tell capitals
                unique += "_"
            taken.add(unique.lower())
            file = folder / f"{unique}.png"
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(
                    f"cannot write {file} ({error.strerror}); name another folder"
                ) from error
            write_whole(file, palette_png(predicted.mask()))
        return folder


def count_pairs(id: str, truth: np.ndarray, prediction: Tensor) -> np.ndarray:
    """Masks (H, W) -> (256, 256) int64, pixels by true and predicted index, void among them."""
    if truth.shape != tuple(prediction.shape):
        raise ValueError(f"{id}: a mask of {truth.shape}, predicted {tuple(prediction.shape)}")
    if prediction.dtype != torch.uint8 and not torch.equal(prediction, prediction & VOID):
        raise ValueError(f"{id}: predicted indices are not from 0 to {VOID}")
    rows = torch.from_numpy(truth).to(prediction.device).int()
    # int32: bincount of int64 takes ten times as long on a CPU
    pairs = (rows * VALUES + prediction.int()).flatten()
    return torch.bincount(pairs, minlength=VALUES**2).reshape(VALUES, VALUES).cpu().numpy()


def compressed(id: str, mask: Tensor) -> Predicted:
    content = mask.to(torch.uint8).cpu().contiguous().numpy().tobytes()
    height, width = mask.shape
    return Predicted(id, (height, width), zlib.compress(content, level=1))


def safe_name(id: str) -> str:
    """An id as a path that stays below its folder, in characters that every system takes."""
    parts = PurePosixPath(re.sub(UNSAFE, "_", id)).parts
    return "/".join(part.strip("/. ") or "_" for part in parts) or "_"


def share(part: float, whole: float) -> float:
    return float(part / whole) if whole else math.nan


def mean(values: list[float]) -> float:
    """Without NaN; 0 of nothing."""
    numbers = [value for value in values if not math.isnan(value)]
    return float(np.mean(numbers)) if numbers else 0.0
