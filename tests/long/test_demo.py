"""The demo as a user runs it, and what it promises."""

import csv
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT


@pytest.mark.long
@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
def test_make_demo_trains_distils_and_prints_one_table(tmp_path: Path) -> None:
    made = subprocess.run(
        ["make", "demo", f"RUNS={tmp_path}", f"VENV={Path(sys.executable).parents[1]}"],
        cwd=ROOT, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr[-2000:]
    table = (
        made.stdout[made.stdout.rindex("student  ") :]
        if "student  " in made.stdout
        else made.stdout
    )
    assert "teacher" in made.stdout and "circle" in table
    with (tmp_path / "demo/results.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["distance/raw"]]
    first, last = rows[0], rows[-1]
    print(table, {key: (first[key], last[key]) for key in ("distance/raw", "distance/aligned")})
    assert float(last["AP50"]) >= 0.6
    pictures = {path.stem for path in (tmp_path / "demo/pictures").glob("*.png")}
    assert pictures == {
        "curves",
        "batch",
        "detections",
        "precision_recall",
        "attention",
        "before_after",
    }
    for kind in ("aligned", "raw"):
        assert float(last[f"distance/{kind}"]) < 0.8 * float(first[f"distance/{kind}"])
