"""A detector to export, and readers of what was exported that are not the writers."""

from pathlib import Path
from typing import Any

import pytest
import torch

from kdmini.detection.yolo11.model import YOLO11
from kdmini.tools.export import main

NAMES = ["cup", "잔", 'a "b"']
IMGSZ = 64
ANCHORS = 8 * 8 + 4 * 4 + 2 * 2  # of IMGSZ


def detector(bias: float = -1) -> YOLO11:
    """BatchNorm has statistics of its own, so that folding it wrongly would show.

    bias: what the logits of the classes lie around.
    """
    torch.manual_seed(0)
    model = YOLO11(NAMES, [0.5, 0.0625, 1024])
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, 0, 0.1)
    for level in range(3):
        torch.nn.init.normal_(model.get_parameter(f"model.23.cv3.{level}.2.bias"), bias)
    with torch.no_grad():
        model.train()(torch.rand(8, 3, 128, 128))
    model.license = "AGPL-3.0"
    return model.eval()


def needs_onnx() -> None:
    pytest.importorskip("onnxscript", reason="kdmini[export] is not installed")
    pytest.importorskip("onnxruntime", reason="kdmini[export] is not installed")


def onnx_session(path: Path) -> Any:
    import onnxruntime

    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def refusal(*args: object) -> str:
    """The line that an export ends with."""
    with pytest.raises(SystemExit) as left:
        main([*map(str, args)])
    line = left.value.code
    assert isinstance(line, str)
    assert line.startswith("error: ")
    assert "\n" not in line
    return line
