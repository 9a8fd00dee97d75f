"""kdmini: distil YOLO11m into YOLO11s by attention transfer, in plain PyTorch."""

import sys
from importlib import import_module
from typing import Any

__version__ = "0.1.0"

try:  # what locks a run folder, and says that a terminal was closed
    import fcntl  # noqa: F401
    from signal import SIGHUP  # noqa: F401
except ImportError as missing:
    sys.exit(
        f"error: kdmini runs on Linux and macOS, and not on {sys.platform} ({missing}); "
        "on Windows, install Linux with `wsl --install` and run it there"
    )


def __getattr__(name: str) -> Any:
    """What a user's code begins with, imported when it is asked for: torch takes seconds."""
    if name == "Predictor":
        return import_module("kdmini.tools.predictor").Predictor
    raise AttributeError(f"module 'kdmini' has no attribute {name!r}")
