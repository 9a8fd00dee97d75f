"""README: its commands train on a folder like the one it describes, and its term distils."""

import shlex
import sys
from pathlib import Path

import pytest

import train as train_script
from kdmini import config
from kdmini.tools import look, new
from tests.commands import records, run
from tests.conftest import ROOT, TINY, write_config
from tests.data.layouts import write
from tests.docs.pages import blocks

README = (ROOT / "README.md").read_text()
OWN = README.partition("## Your own data")[2]
PROGRAMS = {"kdmini.tools.new": new.main, "kdmini.tools.look": look.main}
TINY_STUDENT = (
    "device=cpu",
    "train.epochs=1",
    "train.freeze=[]",
    f"student.scale={TINY}",
    "student.weights=null",
)
TINY_TEACHER = (f"teacher.scale={TINY}", "allow_void=true")


def test_its_commands_distil(shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the installation and the download of weights."""
    write("beside", shapes, tmp_path / "path/to/folder")
    monkeypatch.chdir(tmp_path)
    lines = [shlex.split(line, comments=True) for line in blocks(OWN, "")[0].splitlines()]
    for _, *words in lines[1:]:
        if words[0] == "train.py":
            tiny = (*TINY_STUDENT, *(TINY_TEACHER if words[-1] == "mine/config.yaml" else ()))
            run(train_script, *words[1:], *tiny)
        elif words[1] in PROGRAMS:
            PROGRAMS[words[1]](words[2:])
    assert records(tmp_path / "mine/teacher")[-1]["loss/box"] > 0
    assert records(tmp_path / "mine/student")[-1]["loss/logits"] > 0
    assert (tmp_path / "mine/student/look/train.png").exists()
    drawn = [(tmp_path / f"mine/{name}/val.txt").read_text() for name in ("teacher", "student")]
    assert drawn[0] == drawn[1]


def test_its_term_distils(shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(blocks(README, "python")[0])
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    [fragment] = blocks(README, "yaml")
    path = write_config(tmp_path, shapes)
    settings = {**config.load(path), **config.parse(fragment, "README.md")}
    path.write_text(config.dump(settings))
    run(train_script, "--config", path, "train.epochs=1")
    assert records(tmp_path / "run")[-1]["loss/l2"] > 0
