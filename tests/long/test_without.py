"""What is left of kdmini where rooms of it were deleted still passes its tests and trains."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

KEPT = ("kdmini", "tests", "examples", "configs", "train.py", "eval.py", "pyproject.toml")
TERMS_AND_TOOLS = (
    *("kdmini/terms", "kdmini/tools"),
    *(
        "configs/terms",
        "configs/segmentation",
        "configs/sweep",
        "configs/atss.yaml",
        "configs/voc_best.yaml",
        "configs/voc_retinanet.yaml",
    ),
    "configs/classification",
    # these test commands, examples, benchmarks and pages that need them
    *("tests/terms", "tests/tools", "tests/parity", "tests/long", "tests/docs", "tests/examples"),
    *("tests/house/test_docs.py", "tests/bench"),
    "tests/test_bounds.py",  # it goes through every key that the pages name
    "tests/cuda",  # it counts what bench states
)
CONFIGS = {
    "detection": "configs/demo.yaml",
    "segmentation": "configs/segmentation/demo.yaml",
    "classification": "configs/classification/demo.yaml",
}

# an editable installation would find in the repository what is deleted here
SITE = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "__editable__" not in finder.__module__]
"""


def tree(folder: Path, *gone: str) -> None:
    """Copies what is kept of the repository, without these."""
    for name in KEPT:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder)
    for name in gone:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    rooms = [name.replace("/", ".") for name in gone if name.startswith("kdmini/")]
    for path in (folder / "tests").rglob("test_*.py"):
        text = path.read_text()
        if re.search(rf"(from|build:) ({'|'.join(rooms)})\b", text):
            path.unlink()  # it tests what is gone
    (folder / "sitecustomize.py").write_text(SITE)


def python(folder: Path, *arguments: str) -> str:
    """-> what a Python prints that works in this tree."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def passed(folder: Path, *arguments: str) -> int:
    text = python(folder, "-m", "pytest", "-p", "no:cacheprovider", *arguments)
    return int(text.split(" passed")[0].split()[-1])


@pytest.mark.long
def test_the_core_does_without_terms_and_tools(tmp_path: Path) -> None:
    tree(tmp_path, *TERMS_AND_TOOLS)
    in_two = ("--numprocesses", "2", "--dist", "loadfile")
    assert passed(tmp_path, *in_two, "--ignore", "tests/faults") > 2000


@pytest.mark.long
@pytest.mark.parametrize("task", CONFIGS)
def test_a_task_does_without_terms_tools_and_the_other_tasks(tmp_path: Path, task: str) -> None:
    others = set(CONFIGS) - {task}
    tree(tmp_path, "kdmini/terms", "kdmini/tools", *(f"kdmini/{other}" for other in others))
    assert passed(tmp_path, f"tests/{task}") > 50

    shapes = ["--train", "24", "--val", "6", "--names", "circle", "ring", "cross"]
    if task == "classification":
        shapes.append("--folders")
    python(tmp_path, "-m", "examples.shapes", "--root", "shapes", *shapes)
    settings = ("teacher=null", "distill=null", "data.root=shapes", "train.epochs=1")
    python(tmp_path, "train.py", "--config", CONFIGS[task], *settings, "run=run")
    assert (tmp_path / "run" / "best.pt").exists()
