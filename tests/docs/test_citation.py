"""CITATION.cff: of the project what pyproject.toml says, and the papers that the terms name."""

import re
import tomllib
from typing import Any

import pytest
import yaml

import kdmini
from tests.house.source import ROOT

CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TERMS = (ROOT / "docs" / "terms.md").read_text()
CODE = " ".join(
    " ".join(path.read_text().split())
    for room in ("distill", "terms")
    for path in sorted((ROOT / "kdmini" / room).glob("*.py"))
)
REQUIRED = {"cff-version", "message", "title", "authors"}  # by the format, 1.2.0
OF_A_REFERENCE = {"type", "title", "authors"}


def sections() -> dict[str, str]:
    """Term -> its section in docs/terms.md, in one line."""
    _, *parts = re.split(r"^## (\w+)$", TERMS, flags=re.MULTILINE)
    return dict(zip(parts[::2], (" ".join(part.split()) for part in parts[1::2]), strict=True))


def test_it_says_what_the_project_says() -> None:
    assert CITATION.keys() >= REQUIRED
    assert CITATION["cff-version"] == "1.2.0"
    assert CITATION["type"] == "software"
    assert CITATION["title"] == PROJECT["name"]
    assert CITATION["abstract"] == PROJECT["description"]
    assert CITATION["version"] == PROJECT["version"] == kdmini.__version__
    assert CITATION["license"] == PROJECT["license"]
    licence = (ROOT / "LICENSE").read_text()
    assert licence.startswith(f"{CITATION['license']} License\n")
    assert [author["name"] for author in CITATION["authors"]] == ["the kdmini authors"]
    assert f"Copyright (c) 2026 {CITATION['authors'][0]['name']}\n" in licence


@pytest.mark.parametrize("paper", CITATION["references"], ids=lambda paper: paper["title"][:30])
def test_a_paper_is_one_that_a_term_names(paper: dict[str, Any]) -> None:
    assert paper.keys() >= OF_A_REFERENCE
    assert all(author.keys() == {"family-names", "given-names"} for author in paper["authors"])
    first = paper["authors"][0]["family-names"]
    term = paper["notes"].split()[-1]
    origin = sections()[term]
    assert re.search(rf"\b{first} (et al\.|& )", origin)
    assert re.search(rf"\b{paper['year']}\b", origin)
    assert '"' + paper["title"].partition(": ")[0] in CODE


def test_every_paper_that_a_term_names_is_there() -> None:
    """The origins of the terms, in docs/terms.md, by their titles in quotes."""
    titles = [paper["title"] for paper in CITATION["references"]]
    origins = [
        text.partition("- Origin: ")[2].partition("- Cost:")[0] for text in sections().values()
    ]
    named = [title for origin in origins for title in re.findall(r'"([^"]+)"', origin)]
    assert len(named) > 8
    for name in named:
        assert any(title.startswith(name) for title in titles), name
