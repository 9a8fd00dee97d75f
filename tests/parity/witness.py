"""The largest difference from each witness, and the table of them.

They are collected while the parity tests run.
"""

from pathlib import Path
from typing import NamedTuple

TABLE = Path(__file__).parent / "TABLE.md"
HEAD = "| what | witness | cases | largest difference | bound |\n|---|---|---|---|---|\n"


class Row(NamedTuple):
    what: str
    against: str
    bound: float


class Tally(NamedTuple):
    cases: int
    largest: float  # difference


_tallies: dict[Row, Tally] = {}


def witness(what: str, against: str, difference: float, bound: float, cases: int = 1) -> None:
    """Asserts difference <= bound, and adds the cases to their row of the table.

    what: "Model: decoded boxes, relative". against: "ultralytics 8.3.250". NaN fails.
    """
    difference = float(difference)
    assert difference <= bound, f"{what}: {difference:.3g} from {against}, more than {bound:g}"
    row = Row(what, against, bound)
    before = _tallies.get(row, Tally(0, 0.0))
    _tallies[row] = Tally(before.cases + cases, max(before.largest, difference))


def write_table() -> str:
    """Writes TABLE.md, sorted, and returns it; nothing where nothing was compared."""
    if not _tallies:
        return ""
    lines = []
    for row, tally in sorted(_tallies.items()):
        cells = (
            row.what,
            row.against,
            f"{tally.cases:,}",
            f"{tally.largest:.2g}",
            f"{row.bound:g}",
        )
        lines.append(f"| {' | '.join(cells)} |\n")
    text = HEAD + "".join(lines)
    TABLE.write_text(text)
    return text
