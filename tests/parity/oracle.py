"""Runs a script with a reference implementation, in a process of its own.

None of it is imported here.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

LIMIT_S = 600


def oracle(script: str, *args: object, version: str = "8.3.250") -> str:
    """Standard output of `script`, run with `args` in sys.argv[1:].

    KDMINI_ORACLE names a folder with one folder for each reference, into which `pip
    install --target ... --no-deps` put it: ultralytics 8.3.0, 8.3.250, 8.4.0 and
    newest, torchdistill, object-detection-metrics, torchmetrics, transformers, timm;
    `version` says which. Where it is not set, the test is skipped. The script sees neither
    kdmini nor the network, and its settings go to a folder that is deleted.
    """
    folder = os.environ.get("KDMINI_ORACLE")
    if not folder:
        pytest.skip("KDMINI_ORACLE is not set: no reference implementation to compare with")
    with tempfile.TemporaryDirectory() as scratch:
        environment = os.environ | {
            "PYTHONPATH": str(Path(folder, version).resolve()),
            "YOLO_CONFIG_DIR": scratch,
            "YOLO_OFFLINE": "true",
            "YOLO_AUTOINSTALL": "false",
            "YOLO_VERBOSE": "false",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        }
        done = subprocess.run(
            [sys.executable, "-c", script, *map(str, args)],
            env=environment,
            cwd=scratch,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
        )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout
