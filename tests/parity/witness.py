"""The largest difference from each witness, collected while the parity tests run, and the table of
them.
"""

from pathlib import Path

TABLE = Path(__file__).parent / "TABLE.md"
HEAD = "| what | witness | cases | largest difference | bound |\n|---|---|---|---|---|\n"

_rows: dict[
    tuple[str, str, float], tuple[int, float]
] = {}  # (what, witness, bound) -> cases, largest difference


def witness(what: str, against: str, difference: float, bound: float, cases: int = 1) -> None:
    """Asserts difference <= bound, and adds the cases to the row of the table for (what, against,
    bound).

    what: "Model: decoded boxes, relative"; against: "ultralytics 8.3.250". NaN fails.
    """
    difference = float(difference)
    assert difference <= bound, f"{what}: {difference:.3g} from {against}, more than {bound:g}"
    count, largest = _rows.get((what, against, bound), (0, 0.0))
    _rows[what, against, bound] = count + cases, max(largest, difference)


def write_table() -> str:
    """Writes TABLE.md, sorted, and returns it; nothing where nothing was compared."""
    lines = [
        f"| {what} | {against} | {cases:,} | {largest:.2g} | {bound:g} |\n"
        for (what, against, bound), (cases, largest) in sorted(_rows.items())
    ]
    if not lines:
        return ""
    TABLE.write_text(HEAD + "".join(lines))
    return TABLE.read_text()
