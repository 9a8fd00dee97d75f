"""Runs of the scripts in this process, and what they leave behind."""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch


def run(script: ModuleType, *arguments: object) -> None:
    """Calls a script's main() with a command line."""
    before = sys.argv
    sys.argv = [script.__name__, *map(str, arguments)]
    try:
        script.main()
    finally:
        sys.argv = before


def newest(folder: Path) -> dict[str, Any]:
    """The newest checkpoint of a run folder."""
    return torch.load(sorted((folder / "ckpt").glob("*.pt"))[-1], weights_only=True)


def records(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl of a run folder."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_equal(one: Any, other: Any, path: str = "") -> None:
    """Bitwise, through dicts and lists."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), path
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            assert_equal(one[key], other[key], f"{path}/{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), path
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_equal(a, b, f"{path}/{i}")
    else:
        assert one == other, path
