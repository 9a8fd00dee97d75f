"""The wheel: built, installed into an empty folder, and used from another one."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT, TINY
from tests.data.layouts import write

BUILD = "from setuptools.build_meta import build_wheel; print(build_wheel('dist'))"
SOURCES = ("train.py", "eval.py", "pyproject.toml", "README.md", "LICENSE")

# a user's day, in a folder of theirs
DAY = f"""
import sys
from pathlib import Path

import kdmini
from kdmini.tools.new import main

main(["mine", "--data", "photos"])
tiny = {{"student.scale": {TINY}, "student.weights": None}}
tiny.update({{"train.freeze": [], "train.epochs": 1, "device": "cpu"}})
run = kdmini.train("mine/teacher.yaml", **tiny)
scored = kdmini.evaluate(run / "config.yaml", run / "best.pt")
assert scored["student"].scores["AP50-95"] >= 0, scored

import kdmini.tools.sweep, kdmini.tools.look, kdmini.tools.export
for name, module in sys.modules.items():
    if name.partition(".")[0] == "kdmini":
        print("from", module.__file__)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("setuptools", "77", reason="builds the wheel")
    source = tmp_path_factory.mktemp("source")
    shutil.copytree(ROOT / "kdmini", source / "kdmini", True, shutil.ignore_patterns("__pycache__"))
    for name in SOURCES:
        shutil.copy(ROOT / name, source)
    built = subprocess.run(
        [sys.executable, "-c", BUILD], cwd=source, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    return source / "dist" / built.stdout.split()[-1]


def test_it_holds_the_scripts_as_they_are(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for script in ("train.py", "eval.py"):
            assert archive.read(f"kdmini/tools/{script}") == (ROOT / script).read_bytes()
        assert not {"train.py", "eval.py"} & set(archive.namelist())


def test_it_works_in_an_empty_folder(wheel: Path, shapes: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*install, "--target", str(site), str(wheel)], check=True)
    here = tmp_path / "here"
    write("beside", shapes, here / "photos")
    environment = {**os.environ, "PYTHONPATH": str(site), "KDMINI_CACHE": str(here)}
    done = subprocess.run(
        [sys.executable, "-c", DAY], cwd=here, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "student:  python -m kdmini.tools.train --config mine/config.yaml" in lines
    own = [line.removeprefix("from ") for line in lines if line.startswith("from ")]
    assert len(own) > 30
    assert [path for path in own if not path.startswith(str(site))] == []
