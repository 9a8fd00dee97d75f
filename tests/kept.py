"""A logger that keeps what it gets, for tests in the same process."""

from typing import Any


class Kept:
    """records: of all that were ever built."""

    records: list[dict[str, Any]] = []  # noqa: RUF012

    def __init__(self, run: str):
        self.run = run

    def __call__(self, record: dict[str, Any]) -> None:
        self.records.append({**record, "run": self.run})


class KeptToo(Kept):
    """Under another name."""


class NotCalled:
    """No logger."""
