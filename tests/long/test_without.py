"""The core without terms/ and tools/: its tests pass in a tree that has neither."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KEPT = ("kdmini", "tests", "examples", "configs", "train.py", "eval.py", "pyproject.toml")
GONE = (
    *("kdmini/terms", "kdmini/tools"),
    *("tests/terms", "tests/tools", "configs/terms", "configs/atss.yaml"),
    "configs/segmentation",
    # these test commands, examples, benchmarks and pages that need them
    *("tests/parity", "tests/long", "tests/docs", "tests/examples"),
    *("tests/house/test_docs.py", "tests/bench"),
    # and these go through every term, and every key that the pages name
    *("tests/test_bounds.py", "tests/test_scales.py"),
    "tests/cuda",  # it counts what bench states
)


@pytest.mark.long
def test_the_core_does_without_terms_and_tools(tmp_path: Path) -> None:
    for name in KEPT:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, tmp_path)
    for name in GONE:
        path = tmp_path / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()

    run = subprocess.run(
        [sys.executable, "-m", "pytest", "--ignore", "tests/faults", "-p", "no:cacheprovider"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-3000:]
    passed = int(run.stdout.split(" passed")[0].split()[-1])
    assert passed > 500
