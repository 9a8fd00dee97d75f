"""Decoded images, once: every picture of a data set in one flat buffer of packed pixels.

A pixel is an int32 that holds the bytes R, G, B, 0 (lowest first), so that one gather
fetches a whole pixel. Offsets into the buffer are int64: VOC2012 alone has 3.2e9 pixels.
Legend: M images of the store.
"""

import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from kdmini.contracts import BadObjects, Dataset, Target, UserError
from kdmini.data.digest import digest
from kdmini.data.pictures import pack, shrink
from kdmini.data.room import ROOM

Storage = Literal["auto", "resident", "mapped"]
OnBad = Literal["stop", "skip"]

ASSUMED_FREE = 2**31  # bytes, where the system does not tell

PORTION = 256  # images decoded ahead of a slow disk: bounds what waits in memory


class Picture(NamedTuple):
    """One decoded image, its long side at most the image size."""

    pixels: np.ndarray  # (H * W,) int32
    size: tuple[int, int]  # H, W as stored
    native: tuple[int, int]  # H, W of the file
    target: Target  # in pixels of the file
    digest: str  # of all that
    faults: Sequence[str] = ()  # of objects that cannot be used and are not in the target


class Store:
    """All images of a data set, decoded by threads when it is built.

    imgsz: longest side; larger images are reduced to it.
    device: where batches go.
    workers: threads that decode.
    storage: `resident` keeps the pixels on `device`; `mapped` in a scratch file (in
        KDMINI_CACHE, else ~/.cache/kdmini; it vanishes with the process, so it can neither be
        stale nor be left behind); `auto` is resident when they fill less than half of the
        device's free memory.
    limit: keep a fixed random subset of that many images.
    on_bad: images and objects that cannot be used are reported when all have been tried:
        `stop` makes them an error, `skip` leaves them out.
    name: of the set, in messages.
    compiled: batches are rendered from it by torch.compile, which takes seconds once for each
        size of a batch.
    """

    def __init__(  # noqa: PLR0913 - the keys of the `data` section
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
        self.imgsz = imgsz
        self.device = torch.device(device)
        self.compiled = compiled
        self.truth = dataset.truth
        self.names = list(dataset.names)

        indices = subset(len(dataset), limit)
        if not indices:
            raise UserError(f"{name}: the dataset has no images")
        pictures = decode_all(dataset, indices, imgsz, workers, on_bad, name)
        first = next(pictures)
        if storage == "auto":
            expected = first.pixels.nbytes * len(indices)
            fits = expected < free_bytes(self.device) / 2
            storage = "resident" if fits else "mapped"

        decoded: list[Picture] = []  # without their pixels, which go elsewhere meanwhile

        def parts() -> Iterator[np.ndarray]:
            for picture in chain([first], pictures):
                decoded.append(picture._replace(pixels=np.empty(0, np.int32)))
                yield picture.pixels

        if storage == "resident":
            self.pixels = resident(list(parts()), self.device)
        else:
            self.pixels = mapped(parts())
        self.sizes = np.array([picture.size for picture in decoded])  # (M, 2) H, W
        self.native = np.array([picture.native for picture in decoded])  # (M, 2) H, W
        counts = self.sizes.prod(1, dtype=np.int64)
        self.offsets = np.concatenate([[0], np.cumsum(counts)[:-1]])  # (M,)
        self.targets = [picture.target for picture in decoded]
        self.digests = [picture.digest for picture in decoded]

        print_report(dataset, name)

    def __len__(self) -> int:
        return len(self.targets)


def subset(length: int, limit: int | None) -> list[int]:
    """The images kept: all, or the same `limit` of them every time, in order."""
    if limit is None or limit >= length:
        return list(range(length))
    chosen = np.random.default_rng(0).choice(length, limit, replace=False)
    return sorted(chosen.tolist())


def print_report(dataset: Dataset, name: str) -> None:
    """What the data set set right while it was read."""
    report = getattr(dataset, "report", None)
    try:
        line = report() if report else ""
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    if line:
        print(f"{name}: {line}")


def decode_all(
    dataset: Dataset, indices: Sequence[int], imgsz: int, workers: int, on_bad: OnBad, name: str
) -> Iterator[Picture]:
    """Pictures in order, decoded by threads (Pillow lets go of the interpreter's lock), with
    a progress bar.

    Raises UserError after the last one for all that cannot be used, or leaves them out.
    """

    def picture(index: int) -> Picture | str:
        with ROOM.one_image():
            return picture_of(dataset, index, imgsz)

    bad_images: list[str] = []
    bad_objects: list[str] = []
    with ThreadPoolExecutor(max(workers, 1)) as pool:
        starts = range(0, len(indices), PORTION)
        portions = (pool.map(picture, indices[start : start + PORTION]) for start in starts)
        results = chain.from_iterable(portions)
        bar = tqdm(results, f"decode {name}", len(indices), unit="img", disable=None)
        for result in bar:
            if isinstance(result, Picture):
                bad_objects += result.faults
                yield result
            else:
                bad_images.append(result)
    report_bad(bad_images, bad_objects, len(indices), on_bad, name)


def picture_of(dataset: Dataset, index: int, imgsz: int) -> Picture | str:
    """One image, reduced; of one that cannot be used, what is wrong with it.

    Nothing of its full size is left on return: not even an error, whose traceback holds the
    pixels.
    """
    faults: list[str] = []
    try:
        image, target = dataset[index]
    except BadObjects as error:
        faults = error.lines
        image, target = error.rest
    except UserError as error:
        return str(error)
    reduced = shrink(image, imgsz)
    pixels = pack(reduced)
    native = image.shape[:2]
    code = digest(pixels, native, target)
    return Picture(pixels, reduced.shape[:2], native, target, code, faults)


def report_bad(images: list[str], objects: list[str], total: int, on_bad: OnBad, name: str) -> None:
    """Prints what is wrong with every bad image and object on a line of its own, and raises
    one UserError for all of them, unless they are to be skipped and images are left.
    """
    problems = images + objects
    if not problems:
        return
    for problem in problems:
        print(problem, file=sys.stderr)
    counts = []
    if images:
        counts.append(f"{len(images):,} of {total:,} images")
    if objects:
        counts.append(f"{len(objects):,} objects")
    bad = f"{name}: {' and '.join(counts)} are bad"
    if on_bad != "skip" or len(images) == total:
        raise UserError(
            f"{bad}, as {problems[0]}. Repair or remove them, or leave them out with "
            "data.on_bad=skip"
        )
    print(f"{bad} and left out", file=sys.stderr)


def resident(parts: list[np.ndarray], device: torch.device) -> Tensor:
    """Joins the parts in one buffer on the device, and empties the list meanwhile: memory
    holds them once.
    """
    end = sum(len(part) for part in parts)
    buffer = torch.empty(end, dtype=torch.int32, device=device)
    while parts:
        part = parts.pop()
        start = end - len(part)
        buffer[start:end] = torch.from_numpy(part)
        end = start
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
    # macOS counts only what there is, and half of that is taken to be free
    for name, share in (("SC_AVPHYS_PAGES", 1), ("SC_PHYS_PAGES", 2)):
        with suppress(ValueError):
            return os.sysconf(name) * os.sysconf("SC_PAGE_SIZE") // share
    return ASSUMED_FREE
