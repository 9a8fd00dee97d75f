"""Predictions from Python.

from kdmini import Predictor

predictor = Predictor("runs/voc/best.pt")
found = predictor("photograph.jpg")
for box, score, name in zip(found["boxes_xyxy"], found["scores"], found["names"]):
    ...
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image

from kdmini.contracts import Prediction, Truth, UserError
from kdmini.data.loader import ValLoader
from kdmini.data.pictures import pack, shrink
from kdmini.data.store import Store
from kdmini.device import pick_device
from kdmini.engine import on_cpu
from kdmini.tools.load import load_network
from kdmini.tools.photographs import read_upright
from kdmini.tools.writers import make_writer

BATCH = 8  # images

Picture: TypeAlias = str | Path | np.ndarray | Image.Image


class Predictor:
    """A network out of a weight file, which answers as the command `predict` does.

    weights: best.pt of a run, or a public YOLO11 file. Prints one line that says what it is.
    imgsz: multiple of 32; that of the training by default.
    device: auto, cpu, cuda or cuda:1.
    score, iou: of a detector: objects under that score are left out; of boxes that overlap
        more, the best is kept. By default 0.25 and 0.7.

    `names` are its classes. Raises UserError.
    """

    def __init__(
        self,
        weights: str | Path,
        imgsz: int | None = None,
        device: str = "auto",
        score: float | None = None,
        iou: float | None = None,
    ):
        loaded = load_network(weights, pick_device(device))
        self.network = loaded.network
        self.truth = loaded.truth
        self.imgsz = imgsz or loaded.imgsz
        self.names = list(self.network.names)
        self.writer = make_writer(loaded, {"score": score, "iou": iou})
        self.network.fold()

    def __call__(self, pictures: Picture | Sequence[Picture]) -> Any:
        """-> what is said of a picture, in its pixels, as arrays by name; of several a list.

        A picture is the path of a file, which is turned as EXIF asks for it; an array (H, W, 3)
        uint8 RGB; or an image of Pillow. The last two are taken as they are.

        Boxes: `boxes_xyxy` (n, 4), `scores` (n,), `labels` (n,) and `names`, n texts, best
        first. Masks: `mask` (H, W) uint8, indices of `Predictor.names`. Classes: `scores` (K,).
        Raises UserError.
        """
        if isinstance(pictures, str | Path | np.ndarray | Image.Image):
            return self([pictures])[0]
        return [*map(self.answer, self.predictions([as_array(picture) for picture in pictures]))]

    def predictions(self, arrays: Sequence[np.ndarray]) -> list[Prediction]:
        """(H, W, 3) uint8 RGB each -> what the network says of them, in their pixels."""
        if not arrays:
            return []
        store = Held(arrays, self.imgsz, next(self.network.parameters()).device, self.truth)
        found: list[Prediction] = []
        with torch.no_grad():
            for images, _, to_file in ValLoader(store, BATCH):
                found += to_file(on_cpu(self.writer.decode(self.network(images))))
        return found

    def answer(self, prediction: Prediction) -> dict[str, Any]:
        found: dict[str, Any] = {key: value.numpy() for key, value in prediction.items()}
        if "labels" in found:
            found["names"] = [self.names[label] for label in found["labels"]]
        return found


class Held(Store):
    """Pictures that are in memory already: nothing is decoded, counted or told."""

    def __init__(
        self,
        pictures: Sequence[np.ndarray],
        imgsz: int,
        device: torch.device,
        truth: type[Truth],
    ):
        self.imgsz = imgsz
        self.device = device
        self.compiled = False
        self.labelled = False
        self.truth = truth
        reduced = [shrink(picture, imgsz) for picture in pictures]
        self.pixels = torch.from_numpy(np.concatenate([*map(pack, reduced)])).to(device)
        self.sizes = np.array([picture.shape[:2] for picture in reduced])
        self.native = np.array([picture.shape[:2] for picture in pictures])
        counts = self.sizes.prod(1, dtype=np.int64)
        self.offsets = np.concatenate([[0], np.cumsum(counts)[:-1]])
        self.targets = [{"id": str(number)} for number in range(len(pictures))]


def as_array(picture: Picture) -> np.ndarray:
    """-> (H, W, 3) uint8 RGB. Raises UserError."""
    if isinstance(picture, str | Path):
        return read_upright(Path(picture))
    if isinstance(picture, Image.Image):
        return np.asarray(picture.convert("RGB"))
    is_rgb = isinstance(picture, np.ndarray) and picture.ndim == 3 and picture.shape[2] == 3
    if not is_rgb or picture.dtype != np.uint8 or 0 in picture.shape:
        kind = type(picture).__name__
        if isinstance(picture, np.ndarray):
            kind = f"{picture.dtype} of {picture.shape}"
        raise UserError(
            f"a picture is a path, an image of Pillow or (H, W, 3) uint8, and no {kind}"
        )
    return np.ascontiguousarray(picture)
