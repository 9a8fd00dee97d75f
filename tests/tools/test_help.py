"""--help of every tool fits a terminal of 80 columns, and says how it is called."""

import importlib

import pytest

from tests.conftest import ROOT

TOOLS = sorted(
    path.stem
    for path in (ROOT / "kdmini/tools").glob("*.py")
    if "ArgumentParser(" in path.read_text()
)


def test_tools_are_found() -> None:
    assert {"train", "eval", "new", "look", "predict", "export", "report"} <= set(TOOLS)


@pytest.mark.parametrize("tool", TOOLS)
def test_help_fits_80_columns(
    tool: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("sys.argv", [f"{tool}.py", "--help"])
    with pytest.raises(SystemExit) as left:
        importlib.import_module(f"kdmini.tools.{tool}").main()
    assert left.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if len(line) > 80] == []
    called = {"train": "python train.py", "eval": "python eval.py"}
    assert any(called.get(tool, f"python -m kdmini.tools.{tool}") in line for line in lines)
