"""Decoded images, once: every picture of a dataset in one flat buffer of packed pixels.

A pixel is an int32 that holds the bytes R, G, B, 0 (lowest first), so that one gather fetches a
whole pixel.
Offsets into the buffer are int64: VOC2012 alone has 3.2e9 pixels.
Legend: M images of the store, B objects in them.
"""

import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from kdmini.contracts import Dataset, Target, UserError
from kdmini.data.pictures import pack, shrink

Storage = Literal["auto", "resident", "mapped"]
OnBad = Literal["stop", "skip"]


class Picture(NamedTuple):
    """One decoded image, its long side at most the image size."""

    pixels: np.ndarray  # (H * W,) int32
    size: tuple[int, int]  # H, W as stored
    native: tuple[int, int]  # H, W of the file
    target: Target  # in pixels of the file


class Store:
    """All images of a dataset, decoded by threads when it is built.

    imgsz: longest side; larger images are reduced to it. device: where batches go.
    storage: `resident` keeps the pixels on `device`; `mapped` in a scratch file (in KDMINI_CACHE,
    else
        ~/.cache/kdmini; it vanishes with the process, so it can neither be stale nor be left
        behind); `auto` is resident when they fill less than half of the device's free memory.
    limit: keep a fixed random subset of that many images.
    compiled: batches are rendered from it by torch.compile, which takes seconds once for each size
    of a batch.
    on_bad: an image that cannot be decoded is reported when all have been tried: an error, or it is
    left out."""

    def __init__(
        self,
        dataset: Dataset,
        imgsz: int,
        device: torch.device | str = "cpu",
        workers: int = 8,
        storage: Storage = "auto",
        limit: int | None = None,
        on_bad: OnBad = "stop",
        name: str = "images",
        compiled: bool = False,
    ):
        self.imgsz, self.device, self.compiled = imgsz, torch.device(device), compiled
        indices = subset(len(dataset), limit)
        if not indices:
            raise UserError(f"{name}: the dataset has no images")
        pictures = decode_all(dataset, indices, imgsz, workers, on_bad, name)
        first = next(pictures)
        if storage == "auto":
            storage = (
                "resident"
                if first.pixels.nbytes * len(indices) < free_bytes(self.device) / 2
                else "mapped"
            )

        about: list[Picture] = []

        def pixels() -> Iterator[np.ndarray]:
            for picture in chain([first], pictures):
                about.append(picture._replace(pixels=np.empty(0, np.int32)))
                yield picture.pixels

        self.pixels = (
            resident(list(pixels()), self.device) if storage == "resident" else mapped(pixels())
        )
        self.sizes = np.array([p.size for p in about])  # (M, 2) H, W
        self.native = np.array([p.native for p in about])  # (M, 2) H, W
        self.offsets = np.concatenate(
            [[0], np.cumsum(self.sizes.prod(1, dtype=np.int64))[:-1]]
        )  # (M,)
        self.targets = [p.target for p in about]
        self.names = list(dataset.names)
        if report := getattr(dataset, "report", str)():
            print(f"{name}: {report}")

    def __len__(self) -> int:
        return len(self.targets)

    @cached_property
    def objects(self) -> "Objects":
        easy = [~target["difficult"] for target in self.targets]
        scale = (self.sizes / self.native)[:, [1, 0, 1, 0]]  # (M, 4)
        boxes = [t["boxes_xyxy"][e] * s for t, e, s in zip(self.targets, easy, scale, strict=True)]
        labels = [t["labels"][e] for t, e in zip(self.targets, easy, strict=True)]
        first = np.cumsum([0, *map(len, labels)])
        return Objects(np.concatenate(boxes).reshape(-1, 2, 2), np.concatenate(labels), first)


class Objects(NamedTuple):
    """The objects to train on, of all images in a row; image m has those from first[m] to first[m +
    1].
    """

    corners: np.ndarray  # (B, corner, xy) stored pixels
    labels: np.ndarray  # (B,)
    first: np.ndarray  # (M + 1,)


def subset(length: int, limit: int | None) -> list[int]:
    """The images kept: all, or the same `limit` of them every time, in order."""
    if limit is not None and limit < 1:
        raise UserError(
            f"data.limit: {limit} is less than one image; give 1 or more, or null for all"
        )
    if limit is None or limit >= length:
        return list(range(length))
    return sorted(np.random.default_rng(0).choice(length, limit, replace=False).tolist())


def decode_all(
    dataset: Dataset, indices: Sequence[int], imgsz: int, workers: int, on_bad: OnBad, name: str
) -> Iterator[Picture]:
    """Pictures in order, decoded by threads (Pillow lets go of the interpreter's lock), with a
    progress bar.

    Raises UserError after the last one for all that cannot be decoded, or leaves them out.
    """
    problems: list[str] = []

    def picture(index: int) -> Picture | UserError:
        try:
            image, target = dataset[index]
        except UserError as error:
            return error
        reduced = shrink(image, imgsz)
        return Picture(pack(reduced), reduced.shape[:2], image.shape[:2], target)

    with ThreadPoolExecutor(max(workers, 1)) as pool:
        # portions bound what waits in memory for a slow disk
        portions = (
            pool.map(picture, indices[start : start + 256]) for start in range(0, len(indices), 256)
        )
        for result in tqdm(
            chain.from_iterable(portions), f"decode {name}", len(indices), unit="img", disable=None
        ):
            if isinstance(result, Picture):
                yield result
            else:
                problems.append(str(result))
    tell(problems, len(indices), on_bad, name)


def tell(problems: list[str], total: int, on_bad: OnBad, name: str) -> None:
    """Prints the problem of every bad image on a line of its own, and raises one UserError for all
    of them, unless they are to be skipped and others are left.
    """
    count = f"{name}: {len(problems):,} of {total:,} images are bad"
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems and (on_bad != "skip" or len(problems) == total):
        raise UserError(
            f"{count}, as {problems[0]}. Repair or remove them, or leave them out with data.on_bad=skip"
        )
    if problems:
        print(f"{count} and left out", file=sys.stderr)


def resident(parts: list[np.ndarray], device: torch.device) -> Tensor:
    """Joins the parts in one buffer on the device, and empties the list meanwhile: memory holds
    them once.
    """
    at = sum(len(part) for part in parts)
    buffer = torch.empty(at, dtype=torch.int32, device=device)
    while parts:
        part = parts.pop()
        buffer[at - len(part) : at] = torch.from_numpy(part)
        at -= len(part)
    return buffer


def mapped(parts: Iterator[np.ndarray]) -> Tensor:
    """Writes the parts to a scratch file and maps it."""
    folder = Path(os.environ.get("KDMINI_CACHE", "~/.cache/kdmini")).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            for part in parts:
                part.tofile(file)
            file.flush()
            return torch.from_numpy(np.memmap(file, np.int32, mode="r+"))
    except OSError as error:
        raise UserError(
            f"cannot keep images in {folder} ({error}); set KDMINI_CACHE to a larger disk"
        ) from error


def free_bytes(device: torch.device) -> int:
    """Memory that is free now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
