"""Scenarios, played in processes of their own and each once."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.cuda.card import why_not

ROOT = Path(__file__).parents[2]
LIMIT_S = 600


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    reason = why_not()
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.cuda)
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))


@cache
def run(module: str, argument: str) -> str:
    """What a module of this folder prints."""
    done = subprocess.run(
        [sys.executable, "-m", f"tests.cuda.{module}", argument],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="session")
def play() -> Callable[..., list[dict[str, Any]]]:
    """Scenarios, by their settings -> the Findings of each."""

    def played(*scenarios: dict[str, Any]) -> list[dict[str, Any]]:
        return json.loads(run("scenario", json.dumps(scenarios)))

    return played
