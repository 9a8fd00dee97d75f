"""Every cell of docs/demo.ipynb is a test: all are run, in order, as one program.

`python -m bench.notebook` runs them in Jupyter, and keeps what they put out.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.notebook import code_cells, program, read
from tests.conftest import ROOT

LIMIT_S = 900  # on one thread, beside another test


@pytest.mark.long
def test_every_cell_holds(tmp_path: Path) -> None:
    notebook = read()
    script = tmp_path / "cells.py"
    last = f'print("executed {len(code_cells(notebook))} cells")\n'
    script.write_text(program(notebook) + last)
    written = tmp_path / "written"  # below it the cells make a folder of their own
    written.mkdir()
    variables = {**os.environ, "TMPDIR": str(written), "PYTHONPATH": str(ROOT)}

    command = [sys.executable, str(script)]
    done = subprocess.run(
        command, env=variables, cwd=tmp_path, capture_output=True, text=True, timeout=LIMIT_S
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.endswith(last.removeprefix('print("').removesuffix('")\n') + "\n")
    [folder] = written.glob("kdmini-*")  # torch keeps files of its own there
    assert (folder / "report.html").exists()
    assert not (ROOT / "docs" / "runs").exists()
