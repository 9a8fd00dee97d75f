"""macOS and Windows, as far as they can be played on Linux."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train as train_script
from kdmini.data import storage
from tests.commands import run
from tests.house.source import MODULES, ROOT

REAL = os.sysconf


def without(*missing):
    """-> os.sysconf of a system that does not know these names."""

    def sysconf(name):
        if name in missing:
            raise ValueError("unrecognized configuration name")
        return REAL(name)

    return sysconf


def test_macos_does_not_say_what_is_free(monkeypatch):
    everything = REAL("SC_PHYS_PAGES") * REAL("SC_PAGE_SIZE")
    cpu = torch.device("cpu")
    assert 0 < storage.free_bytes(cpu) <= everything

    monkeypatch.setattr(os, "sysconf", without("SC_AVPHYS_PAGES"))
    assert storage.free_bytes(cpu) == everything // 2
    monkeypatch.setattr(os, "sysconf", without("SC_AVPHYS_PAGES", "SC_PHYS_PAGES"))
    assert storage.free_bytes(cpu) == storage.ASSUMED_FREE


def test_a_run_on_macos(monkeypatch, config_file, tmp_path):
    monkeypatch.setattr(os, "sysconf", without("SC_AVPHYS_PAGES"))
    run(train_script, "--config", config_file, "train.epochs=1", "teacher=null", "distill=null")
    assert (tmp_path / "run" / "best.pt").exists()


# before it, what Windows has not; then a program of ours
HIDE = """
import runpy, signal, sys
sys.modules["fcntl"] = None
del signal.SIGHUP
sys.argv = ["program"]
"""
PROGRAMS = {
    "train": "runpy.run_path('train.py', run_name='__main__')",
    "eval": "runpy.run_path('eval.py', run_name='__main__')",
    "a library": "import kdmini",
}
for name, path in MODULES.items():
    if name.startswith("kdmini.tools.") and "\ndef main(" in path.read_text():
        PROGRAMS[name] = f"runpy.run_module({name!r}, run_name='__main__')"


@pytest.mark.parametrize("program", PROGRAMS)
def test_windows_is_told_what_is_missing_in_one_line(program: str) -> None:
    code = HIDE + PROGRAMS[program]
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: kdmini runs on Linux and macOS")
    assert "fcntl" in done.stderr
    assert "wsl --install" in done.stderr


def test_nothing_else_of_unix_alone_is_imported() -> None:
    """What Windows lacks is asked for in one place, which says so."""
    gate = Path(MODULES["kdmini"]).read_text()
    for needed in ("import fcntl", "SIGHUP"):
        assert needed in gate
    for name, path in MODULES.items():
        for module in ("resource", "pwd", "grp", "termios", "pty", "posix"):
            assert f"import {module}\n" not in path.read_text(), name
