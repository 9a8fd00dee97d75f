"""Prints and writes the table of faults when a whole run of the fault tests has passed."""

import pytest

from tests.faults.record import write_table


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    options = session.config.option
    whole = session.config.args == ["tests/faults"] and not options.markexpr and not options.keyword
    if exitstatus == 0 and whole:
        print("\n" + write_table())
