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


# what a user's code begins with
OFFERED = {
    "Predictor": "kdmini.tools.predictor",
    "train": "kdmini.tools.from_python",
    "evaluate": "kdmini.tools.from_python",
}


def __getattr__(name: str) -> Any:
    """Imported when it is asked for: torch takes seconds."""
    if name in OFFERED:
        return getattr(import_module(OFFERED[name]), name)
    raise AttributeError(f"module 'kdmini' has no attribute {name!r}")
