"""The demo as a user runs it, and what it promises."""

import csv
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

LIMIT_S = 1800  # on one thread, beside another test
PICTURES = {
    *("curves", "batch", "detections", "precision_recall", "confusion"),
    *("attention", "before_after"),
}


@pytest.mark.long
@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
def test_make_demo_trains_distils_and_prints_one_table(tmp_path: Path) -> None:
    command = ["make", "demo", f"RUNS={tmp_path}", f"VENV={Path(sys.executable).parents[1]}"]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S)
    assert made.returncode == 0, made.stderr[-2000:]
    _, heading, table = made.stdout.rpartition("student  ")
    assert "teacher" in made.stdout
    assert "circle" in table

    with (tmp_path / "demo/results.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["distance/raw"]]
    first = rows[0]
    last = rows[-1]
    print(heading + table)
    assert float(last["score/AP50"]) >= 0.6
    for kind in ("aligned", "raw"):
        before = float(first[f"distance/{kind}"])
        after = float(last[f"distance/{kind}"])
        print(f"distance, {kind}: {before:.3f} -> {after:.3f}")
        assert after < 0.8 * before
    assert {path.stem for path in (tmp_path / "demo/pictures").glob("*.png")} == PICTURES
