"""Prints and writes the table of witnesses when a whole run of the parity tests has passed."""

import pytest
from witness import write_table


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if (
        exitstatus == 0
        and session.config.getoption("-m") == "parity"
        and not session.config.getoption("-k")
    ):
        print("\n" + write_table())
