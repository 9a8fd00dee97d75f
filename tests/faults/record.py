"""What was tried and what was lost, collected while the fault tests run, and the table of it."""

from pathlib import Path
from typing import NamedTuple

TABLE = Path(__file__).parent / "TABLE.md"
HEAD = "| fault | tried | lost |\n|---|---|---|\n"


class Row(NamedTuple):
    """All attempts at one fault."""

    tried: int
    lost: int  # the most in one attempt
    of: str  # what was lost


_rows: dict[str, Row] = {}  # fault -> row


def add(fault: str, row: Row) -> None:
    before = _rows.get(fault, Row(0, 0, row.of))
    _rows[fault] = Row(before.tried + row.tried, max(before.lost, row.lost), row.of)


def survived(fault: str, lost: int = 0, most: int = 0, of: str = "", tried: int = 1) -> None:
    """Asserts lost <= most, and adds the attempts to the row of the table for this fault.

    fault: "Saving: SIGKILL at a random moment"; lost: how many of `of` ("steps", "files",
    "payloads run"): the largest of all attempts is shown.
    """
    assert lost <= most, f"{fault}: {lost} {of} lost, at most {most} may be"
    add(fault, Row(tried, lost, of))


def rows() -> dict[str, tuple[int, int, str]]:
    """fault -> its row: what one of several processes has to tell."""
    return {fault: tuple(row) for fault, row in _rows.items()}


def write_table() -> str:
    """Writes TABLE.md, sorted, and returns it; nothing where nothing was tried."""
    if not _rows:
        return ""
    text = HEAD
    for fault, row in sorted(_rows.items()):
        lost = f"{row.lost} {row.of}" if row.lost else "nothing"
        text += f"| {fault} | {row.tried:,} | {lost} |\n"
    TABLE.write_text(text)
    return TABLE.read_text()
