"""Decoded images, once: every picture of a data set in one flat buffer of packed pixels.

A pixel is an int32 that holds the bytes R, G, B and a label (lowest first; 0 where a task has
none), so that one gather fetches a whole pixel. Offsets into the buffer are int64: VOC2012
alone has 3.2e9 pixels.
Legend: M images of the store.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from kdmini.contracts import BadObjects, Dataset, Target, UserError
from kdmini.data.digest import digest
from kdmini.data.pictures import pack, shrink
from kdmini.data.room import ROOM
from kdmini.data.storage import (
    OPEN_FILES,
    Storage,
    address,
    choose,
    kept,
    mapped,
    scratch_file,
)

OnBad = Literal["stop", "skip"]
Once = Callable[[Callable[[], Any]], Any]

PORTION = 256  # images decoded ahead of a slow disk: bounds what waits in memory
SAMPLES = 16  # images, at most, that stand for all where bytes are estimated
EVERY = 8  # of a small set: they are decoded twice


class Picture(NamedTuple):
    """One decoded image, its long side at most the image size."""

    pixels: np.ndarray  # (H * W,) int32
    size: tuple[int, int]  # H, W as stored
    native: tuple[int, int]  # H, W of the file
    target: Target  # in pixels of the file
    digest: str  # of all that
    labelled: bool  # the fourth byte is a label
    faults: Sequence[str] = ()  # of objects that cannot be used and are not in the target


class Known(NamedTuple):
    """Of M pictures, all but their pixels."""

    sizes: np.ndarray  # (M, 2) H, W as stored
    native: np.ndarray  # (M, 2) H, W of the files
    targets: list[Target]
    digests: list[str]
    labelled: bool


class Store:
    """All images of a data set, decoded by threads when it is built.

    imgsz: longest side; larger images are reduced to it.
    device: where batches go.
    workers: threads that decode.
    storage: `resident` keeps the pixels on `device`; `mapped` in a scratch file (in
        KDMINI_CACHE, else ~/.cache/kdmini; it vanishes with the process); `auto` is resident
        when they fill less than half of the device's free memory.
    limit: keep a fixed random subset of that many images.
    on_bad: images and objects that cannot be used are reported when all have been tried:
        `stop` makes them an error, `skip` leaves them out.
    name: of the set, in messages.
    compiled: batches are rendered from it by torch.compile, which takes seconds once for each
        size of a batch.
    once: of several processes of a machine that build the same store, lets one of them call
        what it is given, and tells all of them the outcome. What lies in the memory of the
        host, they then share: it is a scratch file whatever `storage` says.
    training: labels of pixels go into their fourth byte; else they stay in the targets, as
        large as the files.
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
        once: Once | None = None,
        training: bool = False,
    ):
        self.imgsz = imgsz
        self.device = torch.device(device)
        self.compiled = compiled
        self.truth = dataset.truth
        self.names = list(dataset.names)

        indices = subset(len(dataset), limit)
        if not indices:
            raise UserError(f"{name}: the dataset has no images")

        def decode(keep: Callable[[Iterator[np.ndarray]], Any]) -> tuple[Any, Known]:
            """-> what `keep` makes of the pixels, and what else is known."""
            read = partial(picture_of, dataset, imgsz=imgsz, training=training)
            pictures = decode_all(read, indices, workers, on_bad, name)
            outcome = kept_apart(pictures, keep)
            print_report(dataset, name)
            return outcome

        if once and OPEN_FILES.exists():
            place, known = once(lambda: decode(self._share))
            self.pixels = mapped(place)
            if storage == "auto":
                storage = choose(self.pixels.nbytes, self.device)
            if storage == "resident":  # of a CPU, the mapping is
                self.pixels = self.pixels.to(self.device)
        else:
            expected = 0
            if storage != "mapped":
                expected = expected_bytes(dataset, indices, imgsz, workers)
            if storage == "auto":
                storage = choose(expected, self.device)
            self.pixels, known = decode(partial(kept, storage, expected, self.device))
        counts = known.sizes.prod(1, dtype=np.int64)
        self.offsets = np.concatenate([[0], np.cumsum(counts)[:-1]])  # (M,)
        self.sizes = known.sizes
        self.native = known.native
        self.targets = known.targets
        self.digests = known.digests
        self.labelled = known.labelled

    def __len__(self) -> int:
        return len(self.targets)

    def _share(self, parts: Iterator[np.ndarray]) -> str:
        """-> where all processes find the pixels, as long as this store is there."""
        self._file = scratch_file(parts)
        return address(self._file)


def kept_apart(
    pictures: Iterator[Picture], keep: Callable[[Iterator[np.ndarray]], Any]
) -> tuple[Any, Known]:
    """Pixels go to `keep` as they come -> what it makes of them, and all else."""
    rest: list[Picture] = []

    def parts() -> Iterator[np.ndarray]:
        for picture in pictures:
            rest.append(picture._replace(pixels=np.empty(0, np.int32)))
            yield picture.pixels

    outcome = keep(parts())
    known = Known(
        sizes=np.array([picture.size for picture in rest]),
        native=np.array([picture.native for picture in rest]),
        targets=[picture.target for picture in rest],
        digests=[picture.digest for picture in rest],
        labelled=any(picture.labelled for picture in rest),
    )
    return outcome, known


def subset(length: int, limit: int | None) -> list[int]:
    """The images kept: all, or the same `limit` of them every time, in order."""
    if limit is None or limit >= length:
        return list(range(length))
    chosen = np.random.default_rng(0).choice(length, limit, replace=False)
    return sorted(chosen.tolist())


def expected_bytes(dataset: Dataset, indices: Sequence[int], imgsz: int, workers: int) -> int:
    """Of the pixels of these images, about: from a few of them, evenly spread. Those that cannot
    be used are left out, and told of when all are decoded.
    """
    count = min(-(-len(indices) // EVERY), SAMPLES)
    few = [indices[i] for i in np.linspace(0, len(indices) - 1, count, dtype=int)]
    with ThreadPoolExecutor(max(workers, 1)) as pool:
        results = pool.map(partial(picture_of, dataset, imgsz=imgsz, training=False), few)
        sizes = [result.pixels.nbytes for result in results if isinstance(result, Picture)]
    return round(len(indices) * np.mean(sizes)) if sizes else 0


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
    read: Callable[[int], Picture | str],
    indices: Sequence[int],
    workers: int,
    on_bad: OnBad,
    name: str,
) -> Iterator[Picture]:
    """Pictures in order, decoded by threads (Pillow lets go of the interpreter's lock), with
    a progress bar.

    Raises UserError after the last one for all that cannot be used, or leaves them out.
    """
    bad_images: list[str] = []
    bad_objects: list[str] = []
    with ThreadPoolExecutor(max(workers, 1)) as pool:
        starts = range(0, len(indices), PORTION)
        portions = (pool.map(read, indices[start : start + PORTION]) for start in starts)
        results = chain.from_iterable(portions)
        bar = tqdm(results, f"decode {name}", len(indices), unit="img", disable=None)
        for result in bar:
            if isinstance(result, Picture):
                bad_objects += result.faults
                yield result
            else:
                bad_images.append(result)
    report_bad(bad_images, bad_objects, len(indices), on_bad, name)


def picture_of(dataset: Dataset, index: int, imgsz: int, training: bool) -> Picture | str:
    """One image, reduced; of one that cannot be used, what is wrong with it.

    Nothing of its full size is left on return: not even an error, whose traceback holds the
    pixels. The room is given back after that, and not by the one who still holds them.
    """
    with ROOM.one_image():
        return reduced_picture(dataset, index, imgsz, training)


def reduced_picture(dataset: Dataset, index: int, imgsz: int, training: bool) -> Picture | str:
    """What `picture_of` returns; its variables hold the pixels of full size to its end."""
    faults: list[str] = []
    try:
        image, target = dataset[index]
    except BadObjects as error:
        faults = error.lines
        image, target = error.rest
    except UserError as error:
        return str(error)
    labels, rest = dataset.truth.split(target) if training else (None, target)
    reduced = shrink(image, imgsz)
    pixels = pack(reduced, labels)
    native = image.shape[:2]
    code = digest(pixels, native, target)
    is_labelled = labels is not None
    return Picture(pixels, reduced.shape[:2], native, rest, code, is_labelled, faults)


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
