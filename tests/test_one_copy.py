"""Two ranks of one machine: one decodes, both have the pixels, and memory has them once."""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from kdmini.data.store import Store
from tests import one_copy as script
from tests.conftest import ROOT
from tests.one_copy import IMAGES, SIDE, Noise

LIMIT_S = 120

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="processes find each other's files in /proc"
)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of the two has saved."""
    out = tmp_path_factory.mktemp("one_copy")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *torchrun, str(script.__file__), str(out)]
    cache = str(out / "cache")
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "KDMINI_CACHE": cache,
        # glibc keeps freed pieces that are smaller, for each thread: nobody's pixels
        "MALLOC_MMAP_THRESHOLD_": "65536",
    }
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=LIMIT_S)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not list((out / "cache").iterdir())
    return [torch.load(out / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture(params=["resident", "mapped"])
def stores(ranks: list[dict[str, Any]], request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return [result["stores"][request.param] for result in ranks]


def test_the_first_alone_decodes_and_reports(stores) -> None:
    assert [store["asked"] for store in stores] == [IMAGES, 0]
    assert [store["reports"] for store in stores] == [1, 0]


def test_both_have_what_one_process_would_have(stores) -> None:
    alone = Store(Noise(), SIDE, workers=1, storage="resident")
    code = script.zlib.crc32(alone.pixels.numpy())
    for store in stores:
        assert store["pixels"] == code
        assert store["sizes"] == alone.sizes.tolist()
        assert store["ids"] == [target["id"] for target in alone.targets]
        assert store["digests"] == alone.digests


def test_the_pixels_are_one_file_for_both_and_no_memory_of_either(stores) -> None:
    one, other = stores
    assert one["mapping"] == other["mapping"]
    assert len(one["mapping"]) == 1
    pixels = 4 * IMAGES * SIDE * (SIDE - IMAGES / 2)
    assert pixels > 40e6
    for store in stores:
        assert store["alone"] < 0.2 * pixels


def test_others_wait_for_longer_than_the_timeout(ranks) -> None:
    assert [result["slow"] for result in ranks] == ["by rank 0"] * 2


def test_a_mistake_is_raised_in_both_in_the_same_words(ranks) -> None:
    assert [result["mistaken"] for result in ranks] == ["UserError: a.jpg: bad, says rank 0"] * 2
