"""README: its config trains on a folder like the one it describes, and its term distils."""

import sys
from pathlib import Path

import pytest

import train as train_script
from tests.commands import records, run
from tests.conftest import ROOT, TINY
from tests.data.layouts import write
from tests.docs.pages import blocks

README = (ROOT / "README.md").read_text()
NAMES = "[circle, square, triangle, star, ring, cross]"
TINY_RUN = ("device=cpu", "data.imgsz=64", f"student.scale={TINY}", "train.epochs=1")


@pytest.fixture
def mine(tmp_path: Path, shapes: Path) -> Path:
    """configs/mine.yaml, of the shapes, without the download of its weights."""
    write("beside", shapes, tmp_path / "photographs")
    text = blocks(README, "yaml")[0]
    for old, new in {
        "path/to/folder": (tmp_path / "photographs").as_posix(),
        "runs/mine": (tmp_path / "run").as_posix(),
        "[cat, dog, cup]": NAMES,
    }.items():
        assert text.count(old) == 1
        text = text.replace(old, new)
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return path


def test_its_config_trains(mine: Path, tmp_path: Path) -> None:
    run(train_script, "--config", mine, *TINY_RUN, "student.weights=null")
    assert records(tmp_path / "run")[-1]["loss/box"] > 0


def test_its_term_distils(mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(blocks(README, "python")[0])
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    teacher = f"teacher: {{build: kdmini.detection.yolo11.model:YOLO11, scale: {TINY}}}\n"
    mine.write_text(mine.read_text() + teacher + blocks(README, "yaml")[1])
    run(train_script, "--config", mine, *TINY_RUN, "student.weights=null", "allow_void=true")
    assert records(tmp_path / "run")[-1]["loss/l2"] > 0
