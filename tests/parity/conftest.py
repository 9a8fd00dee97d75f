"""Prints and writes the table of witnesses when a whole run of the parity tests has passed."""

import pytest
from witness import write_table


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    config = session.config
    every_file = config.args == config.getini("testpaths")
    whole = every_file and config.option.markexpr == "parity" and not config.option.keyword
    if exitstatus == 0 and whole:
        print("\n" + write_table())
