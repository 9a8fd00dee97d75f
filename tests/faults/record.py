"""What was tried and what was lost, collected while the fault tests run, and the table of it."""

from pathlib import Path

TABLE = Path(__file__).parent / "TABLE.md"
HEAD = "| fault | tried | lost |\n|---|---|---|\n"

_rows: dict[str, tuple[int, int, str]] = {}  # fault -> tried, lost, of what


def survived(fault: str, lost: int = 0, most: int = 0, of: str = "", tried: int = 1) -> None:
    """Asserts lost <= most, and adds the attempts to the row of the table for this fault.

    fault: "Saving: SIGKILL at a random moment"; lost: how many of `of` ("steps", "files", "payloads
    run"): the largest of all attempts is shown.
    """
    assert lost <= most, f"{fault}: {lost} {of} lost, at most {most} may be"
    count, largest, _ = _rows.get(fault, (0, 0, of))
    _rows[fault] = count + tried, max(largest, lost), of


def write_table() -> str:
    """Writes TABLE.md, sorted, and returns it; nothing where nothing was tried."""
    lines = [
        f"| {fault} | {tried:,} | {f'{lost} {of}' if lost else 'nothing'} |\n"
        for fault, (tried, lost, of) in sorted(_rows.items())
    ]
    if not lines:
        return ""
    TABLE.write_text(HEAD + "".join(lines))
    return TABLE.read_text()
