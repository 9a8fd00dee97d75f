"""AGENTS.md names what exists, and its limits are those of the tests.

Its links, commands of make and modules: tests/house/test_docs.py.
"""

import re
import shlex
import tomllib
from functools import cache
from pathlib import Path

import pytest

from kdmini import contracts
from tests.house import test_size as size
from tests.house.source import MODULES, ROOT, text_files

PAGE = (ROOT / "AGENTS.md").read_text()
SPANS = sorted(set(re.findall(r"`([^`]+)`", PAGE)))
LINES = 120
FILE = r"(?:[\w.-]+/)*[\w-]+\.(?:py|md|yaml|toml|txt)"
FOLDER = r"(?:[\w.-]+/)+"


@cache
def everything() -> str:
    """The text of all other files of the project."""
    here = (ROOT / "AGENTS.md", Path(__file__))
    others = [path for path in text_files() if path not in here]
    return "\n".join(path.read_text(encoding="utf-8") for path in others)


def exists(span: str) -> bool:
    """Whether what a span of code names is there: a command word by word."""
    words = shlex.split(span)
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return len(words) == 2 and words[1] in targets
    if words[0].endswith("pytest"):
        return all((ROOT / word).exists() for word in words[1:])
    if words[:2] == ["python", "-m"]:
        return words[2] in MODULES and all((ROOT / word).exists() for word in words[4:])
    if words[0] == "python":
        options = [word for word in words if word.startswith("--")]
        script = (ROOT / words[1]).read_text()
        return all(f'"{option}"' in script for option in options) and exists(words[3])
    if re.fullmatch(rf"{FILE}|{FOLDER}", span):
        return (ROOT / span).exists()
    # a name, a key, an expression
    return re.search(rf"{re.escape(span)}(?!\w)", everything()) is not None


@pytest.mark.parametrize("span", SPANS)
def test_what_it_names_is_there(span: str) -> None:
    assert exists(span)


@pytest.mark.parametrize(
    "span",
    [
        "make tests",
        "python -m kdmini.tools.show",
        ".venv/bin/pytest tests/term",
        "python train.py --config configs/nothing.yaml --check",
        "python train.py --config configs/demo.yaml --checks",
        "kdmini/extras/",
        "tests/terms/test_term.py",
        "train_one_batch",
        "train_one_epo",
    ],
)
def test_what_is_not_there_would_be_seen(span: str) -> None:
    assert not exists(span)


@pytest.mark.parametrize("name", ["Truth", "Dataset", "Model", "View", "Term", "Metric"])
def test_contracts_are_those_of_the_code(name: str) -> None:
    assert f"`{name}`" in PAGE
    assert hasattr(contracts, name)


def test_its_limits_are_those_of_the_tests() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]
    parameters = settings["lint"]["pylint"]["max-args"]
    complexity = settings["lint"]["mccabe"]["max-complexity"]
    assert settings["line-length"] == size.COLUMNS
    for limit in (
        f"{size.FILE_LINES} lines a file",
        f"{size.FUNCTION_LINES} lines, {parameters} parameters and a complexity of {complexity}",
        f"{size.COLUMNS} columns",
        f"{size.TOKENS_PER_LINE} tokens a line of code",
    ):
        assert limit in " ".join(PAGE.split())


def test_it_names_every_room_and_every_check() -> None:
    for room in (ROOT / "kdmini").glob("*/__init__.py"):
        assert f"`kdmini/{room.parent.name}/`" in PAGE
    for check in re.findall(r"^make ([\w-]+)$", (ROOT / ".ci/run").read_text(), re.MULTILINE):
        assert f"`make {check}`" in PAGE


def test_it_is_short() -> None:
    assert PAGE.count("\n") <= LINES
