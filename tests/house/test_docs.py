"""README and docs are true: sizes, links, commands, and pages that are made from elsewhere."""

import ast
import re
from pathlib import Path

import pytest

from kdmini.tools import reference
from tests.house.source import MODULES, ROOT, code_lines, is_in

README = (ROOT / "README.md").read_text()
KOREAN = (ROOT / "README.ko.md").read_text()
WORDS = 1300
TOLERANCE = 0.05  # a size in README may be that far from the truth
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
READING = (
    "kdmini/contracts.py",
    "docs/step.md",
    "kdmini/engine.py",
    "kdmini/distill/step.py",
    "kdmini/distill/taps.py",
    "kdmini/distill/align.py",
    "kdmini/distill/attention.py",
    "kdmini/distill/schedule.py",
    "kdmini/detection/yolo11/loss.py",
    "kdmini/detection/yolo11/assign.py",
)
ROOMS = (
    *("data", "weights", "distill", "detection", "segmentation", "classification"),
    *("terms", "tools"),
)


def size_of_room(room: str) -> int:
    """Lines of code; `core` is all that is in no room."""
    rooms = [f"kdmini.{name}" for name in ROOMS]
    total = 0
    for module, path in MODULES.items():
        inside = [name for name in rooms if is_in(module, name)]
        if module.startswith("examples"):
            continue
        if inside == [f"kdmini.{room}"] or (not inside and room == "core"):
            total += code_lines(path.read_text())
    return total


def stated(page: str, mark: str) -> int:
    size = re.search(rf"<!-- {mark} -->([\d,]+).*?<!-- /{mark} -->", page)
    assert size, mark
    return int(size[1].replace(",", ""))


def test_readme_is_read_aloud_in_six_minutes() -> None:
    assert len(README.split()) <= WORDS


@pytest.mark.parametrize("room", ["core", *ROOMS])
def test_readme_states_the_true_sizes(room: str) -> None:
    for page in (README, KOREAN):
        assert stated(page, room) == pytest.approx(size_of_room(room), rel=TOLERANCE)


def test_readme_states_what_one_step_costs_to_read() -> None:
    lines = sum(len((ROOT / path).read_text().splitlines()) for path in READING)
    for page in (README, KOREAN):
        assert stated(page, "reading") == pytest.approx(lines, rel=TOLERANCE)
    for path in READING:
        assert f"({path})" in README or f"({Path(path).parent})" in README, path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", prose):
        if not link.startswith(("http", "#")):
            assert (page.parent / link.partition("#")[0]).exists(), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_and_commands_are_real(page: Path) -> None:
    if page.name == "LOG.md":  # of then
        return
    text = page.read_text()
    for module in re.findall(r"python -m ([\w.]+)", text):
        assert module in MODULES or (ROOT / f"{module.replace('.', '/')}.py").exists(), module
    for config in re.findall(r"configs/[\w/]+\.yaml", text):
        assert (ROOT / config).exists(), config
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`make ([\w-]+)`", text):
        assert f"\n{target}:" in makefile, target


def test_the_page_of_keys_is_that_of_the_signatures() -> None:
    page = (ROOT / "docs" / "config.md").read_text()
    assert page == reference.page(), "python -m kdmini.tools.reference > docs/config.md"


def test_every_key_has_a_meaning() -> None:
    rows = [line for line in reference.page().splitlines() if line.startswith("| `")]
    assert len(rows) > 80
    assert [row for row in rows if row.endswith("|  |")] == []


def rows_of(table: str, columns: tuple[int, ...]) -> set[tuple[str, ...]]:
    cells = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")]
    return {tuple(row[column] for column in columns) for row in cells}


def marked(page: str, mark: str) -> str:
    text = (ROOT / "docs" / page).read_text()
    return text.partition(f"<!-- {mark} -->")[2].partition(f"<!-- /{mark} -->")[0]


def test_the_reference_has_every_term() -> None:
    found = set()
    for path in sorted((ROOT / "kdmini/terms").glob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and "uses = frozenset" in ast.unparse(node):
                found.add(f"kdmini.terms.{path.stem}:{node.name}")
    assert found == {spec for spec in reference.TERMS if "distill" not in spec}


def test_the_table_of_witnesses_has_the_rows_that_were_measured() -> None:
    measured = ROOT / "tests/parity/TABLE.md"
    if not measured.exists():
        pytest.skip("`make parity` has not written its table here")
    # what, bound; the figures differ from machine to machine
    columns = (0, -1)
    table = rows_of(marked("exactness.md", "witnesses"), columns)
    assert table == rows_of(measured.read_text(), columns) != set()


def test_the_table_of_faults_promises_no_more_than_was_measured() -> None:
    measured = ROOT / "tests/faults/TABLE.md"
    if not measured.exists():
        pytest.skip("`make faults` has not written its table here")
    # what was lost in the worst of the attempts, which chance may spare
    promised = dict(rows_of(marked("survives.md", "faults"), (0, 2)))
    lost = dict(rows_of(measured.read_text(), (0, 2)))
    assert len(promised) > 40
    for fault, what in lost.items():
        assert what in ("nothing", promised.get(fault)), fault
    assert lost.keys() <= promised.keys()
