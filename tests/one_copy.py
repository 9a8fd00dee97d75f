"""What each of two ranks does with one data set, for tests/test_one_copy.py to look at.

torchrun --standalone --nproc-per-node 2 tests/one_copy.py FOLDER
"""

import os
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdmini import distributed
from kdmini.contracts import UserError
from kdmini.data.store import Store
from tests.data.arrays import NoTruth

CPU = torch.device("cpu")
TIMEOUT = 0.05  # minutes
LONGER = 4.0  # seconds: than that
IMAGES = 52
SIDE = 500  # pixels: an image takes 1 MB


class Noise:
    """Counts what is asked of it, and reports."""

    names = ("thing",)
    truth = NoTruth

    def __init__(self) -> None:
        self.asked = 0
        self.reports = 0

    def __len__(self) -> int:
        return IMAGES

    def __getitem__(self, index: int) -> tuple[np.ndarray, dict[str, Any]]:
        self.asked += 1
        rng = np.random.default_rng(index)
        return rng.integers(0, 256, (SIDE, SIDE - index, 3), np.uint8), {"id": str(index)}

    def report(self) -> str:
        self.reports += 1
        return "is noise"


def kept_alone() -> int:
    """Bytes of memory that no other process has."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Private_"))


def mapping() -> list[str]:
    """Device and inode of the scratch files that this process maps."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    here = [line.split() for line in lines if os.environ["KDMINI_CACHE"] in line]
    return [" ".join(words[3:5]) for words in here]


def one_store(storage: Any) -> dict[str, Any]:
    dataset = Noise()
    before = kept_alone()
    store = Store(dataset, SIDE, workers=1, storage=storage, once=distributed.once_a_machine)
    code = zlib.crc32(store.pixels.numpy())
    distributed.wait_for_all()  # what one does not map yet, or no longer, the other has alone
    alone = kept_alone() - before
    distributed.wait_for_all()
    return {
        "alone": alone,
        "mapping": mapping(),
        "asked": dataset.asked,
        "reports": dataset.reports,
        "pixels": code,
        "sizes": store.sizes.tolist(),
        "ids": [target["id"] for target in store.targets],
        "digests": store.digests,
    }


def told(make: Any) -> Any:
    try:
        return distributed.once_a_machine(make)
    except UserError as error:
        return f"UserError: {error}"


def slow() -> str:
    time.sleep(LONGER)
    return f"by rank {distributed.rank()}"


def mistaken() -> None:
    raise UserError(f"a.jpg: bad, says rank {distributed.rank()}")


def work(out: Path) -> None:
    torch.set_num_threads(1)
    distributed.start(CPU, TIMEOUT)
    results = {
        "stores": {storage: one_store(storage) for storage in ("resident", "mapped")},
        "slow": told(slow),
        "mistaken": told(mistaken),
    }
    torch.save(results, out / f"{distributed.rank()}.pt")
    distributed.finish()


if __name__ == "__main__":
    work(Path(sys.argv[1]))
