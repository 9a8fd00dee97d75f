"""Memory that runs out is one line that says whose it was and what to do."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import eval as eval_script
import train as train_script
from kdmini import memory
from kdmini.contracts import UserError
from kdmini.detection.yolo11.model import YOLO11
from kdmini.tools import export, predict, visualize
from tests.commands import run
from tests.conftest import ROOT

DEVICE = "out of memory on the device: "
MACHINE = "out of memory on this machine: "

ERRORS = {
    "torch's allocator": (torch.OutOfMemoryError("CUDA out of memory. Tried ..."), DEVICE),
    "the driver": (RuntimeError("CUDA error: out of memory\nCUDA kernel errors ..."), DEVICE),
    "cuBLAS": (
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(h)`"),
        DEVICE,
    ),
    "cuDNN": (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), DEVICE),
    "Triton": (RuntimeError("Triton Error [CUDA]: out of memory"), DEVICE),
    "Linux": (
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate "
            "memory: you tried to allocate 99999999 bytes. Error code 12 (Cannot allocate memory)"
        ),
        MACHINE,
    ),
    "Windows": (
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:73] data. DefaultCPUAllocator: not enough memory: "
            "you tried to allocate 99999999 bytes."
        ),
        MACHINE,
    ),
    "a map": (RuntimeError("unable to mmap 99 bytes: Cannot allocate memory (12)"), MACHINE),
    "Python": (MemoryError(), MACHINE),
}


@pytest.mark.parametrize(("error", "start"), ERRORS.values(), ids=ERRORS)
def test_each_form_is_one_line(error: Exception, start: str) -> None:
    with pytest.raises(UserError) as caught, memory.bounded("ask for less"):
        raise error
    assert str(caught.value) == f"{start}ask for less"


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA error: an illegal memory access"), ValueError("out of memory")]
)
def test_an_error_of_another_kind_is_left_as_it_is(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, memory.bounded("ask for less"):
        raise error
    assert caught.value is error


@pytest.mark.parametrize("settings", [{}, {"train": None, "data": [1]}])
def test_a_config_that_is_none_has_a_remedy_too(settings: dict[str, Any]) -> None:
    assert "data.storage=mapped" in memory.remedy_of(settings)


# --- every program that computes


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    Image.new("RGB", (64, 64)).save(path)
    return path


def exhausting(error: Exception) -> Callable:
    def forward(*_: Any) -> Any:
        raise error

    return forward


CALLS = {
    "train": (train_script, ["--config", "{config}"], ["train.batch=8 at data.imgsz=64"]),
    "check": (train_script, ["--config", "{config}", "--check"], ["train.batch=8"]),
    "eval": (
        eval_script,
        ["--config", "{config}", "--weights", "{weights}"],
        ["train.batch=8 at data.imgsz=64", "data.storage=mapped"],
    ),
    "predict": (predict, ["{weights}", "{picture}", "--out", "{out}"], ["--imgsz", "--device cpu"]),
    "visualize": (visualize, ["{weights}", "{picture}", "--out", "{out}"], ["fewer IMAGES"]),
    "export": (export, ["{weights}", "--to", "onnx", "--out", "{out}.onnx"], ["--imgsz"]),
}


@pytest.mark.parametrize("kind", ["torch's allocator", "Linux"])
@pytest.mark.parametrize(("script", "arguments", "words"), CALLS.values(), ids=CALLS)
def test_a_program_ends_with_the_line(
    monkeypatch: pytest.MonkeyPatch,
    config_file: Path,
    teacher_file: Path,
    picture: Path,
    script: Any,
    arguments: list[str],
    words: list[str],
    kind: str,
) -> None:
    error, start = ERRORS[kind]
    places = {
        "config": config_file,
        "weights": teacher_file,
        "picture": picture,
        "out": picture.parent / "out",
    }
    monkeypatch.setattr(YOLO11, "_pyramid", exhausting(error))
    with pytest.raises(SystemExit) as caught:
        run(script, *[argument.format(**places) for argument in arguments])
    line = str(caught.value)
    assert line.startswith(f"error: {start}")
    assert "\n" not in line
    for word in words:
        assert word in line


def test_memory_of_the_machine_that_really_runs_out(
    teacher_file: Path, picture: Path, tmp_path: Path
) -> None:
    """An image of 8192 px, and 1.6 GB of addresses beyond those that the program begins with."""
    out = tmp_path / "out"
    arguments = [str(teacher_file), str(picture), "--out", str(out), "--device", "cpu"]
    code = f"""
import resource
from pathlib import Path
from kdmini.tools.predict import main
held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + 3 * 2**29, resource.RLIM_INFINITY))
main({[*arguments, "--imgsz", "8192"]!r})
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"error: {MACHINE}lower --imgsz"), done.stderr
    assert "Traceback" not in done.stderr
