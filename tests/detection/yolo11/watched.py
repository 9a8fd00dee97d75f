"""Weight files read under an audit hook that sees what no file may make happen."""

import sys
from pathlib import Path
from typing import Any

import pytest

from kdmini.contracts import UserError
from kdmini.detection.yolo11 import weights

FORBIDDEN = (
    "exec",
    "compile",
    "import",
    "os.",
    "subprocess.",
    "socket.",
    "pickle.find_class",
    "ctypes.",
    "shutil.",
)
HARMLESS = ("os.listdir", "os.scandir")


class Watch:
    """Collects the forbidden events while it is armed."""

    def __init__(self) -> None:
        self.armed = False
        self.events: list[str] = []

    def hook(self, event: str, args: tuple[Any, ...]) -> None:
        if self.armed and event.startswith(FORBIDDEN) and event not in HARMLESS:
            self.events.append(event)


watch = Watch()
sys.addaudithook(watch.hook)  # for the life of the process, idle unless armed


def read(path: Path) -> weights.WeightFile:
    """weights.read, watched."""
    watch.armed = True
    try:
        return weights.read(path)
    finally:
        watch.armed = False


def refused(path: Path, match: str | None = None) -> None:
    """Asserts that reading ends in one line of bounded length that names the file."""
    with pytest.raises(UserError, match=match) as caught:
        read(path)
    message = str(caught.value)
    assert str(path) in message
    assert len(message) < 600 + len(str(path))
    assert message.isprintable()
