"""Where a run computes, how exactly it repeats, in which precision, and whether compiled."""

import os
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from kdmini.contracts import UserError

Autocast = Callable[[], AbstractContextManager]
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
LONGEST = 160  # characters of what a compiler says


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one. Raises UserError for a device that is not there.

    A card with a number becomes the current one: what names no card means that one.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:1?\d)?", name):
        raise UserError(f"device: {name!r} is none to run on; use auto, cpu, cuda or cuda:1")
    device = torch.device(name)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        raise UserError(
            f"device: {name} was asked for, but torch finds {count} CUDA devices; use auto or cpu"
        )
    if device.index is not None:
        torch.cuda.set_device(device)
    return device


def choose_algorithms(deterministic: bool) -> None:
    """On CUDA: the fastest convolutions, tried out at the first step, or those that repeat
    bit for bit.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = not deterministic


def precision(amp: bool | str, device: torch.device) -> tuple[Autocast, torch.amp.GradScaler]:
    """`amp` of the recipe -> the autocast context, and the scaler, which does nothing except
    in fp16.
    """
    if amp is True:
        amp = best_half(device) if device.type == "cuda" else False
    scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")

    def autocast() -> AbstractContextManager:
        if not amp:
            return torch.autocast(device.type, enabled=False)
        return torch.autocast(device.type, HALF[str(amp)])

    return autocast, scaler


def half_of(autocast: Autocast, device: torch.device) -> torch.dtype | None:
    """The type in which it has convolutions computed; None in float32."""
    with autocast():
        if not torch.is_autocast_enabled(device.type):
            return None
        return torch.get_autocast_dtype(device.type)


def best_half(device: torch.device) -> str:
    """bf16 where the card computes in it: one that only emulates it is slower than in float32."""
    with torch.cuda.device(device):
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if native else "fp16"


def is_compiled(wanted: bool | Literal["auto"], device: torch.device) -> bool:
    """`compile` of the config -> whether this run compiles.

    `auto`: on CUDA, if torch.compile works there. Raises UserError where it does not and is
    asked for.
    """
    if wanted is False or (wanted == "auto" and device.type != "cuda"):
        return False
    fault = compiler_fault(device)
    if not fault:
        return True
    without = f"torch.compile does not work on {device.type} here ({fault})"
    remedy = "install a C++ compiler, Python's headers and, for CUDA, triton"
    if wanted == "auto":
        print(f"compile: {without}: this runs uncompiled, more slowly; {remedy}")
        return False
    raise UserError(f"compile: {without}; {remedy}, or set compile=false")


@cache
def compiler_fault(device: torch.device) -> str:
    """What is wrong with torch.compile on the device, in a line; empty where it works."""
    try:
        torch.compile(square, dynamic=False)(torch.ones(8, device=device))
    except Exception as error:  # its parts raise whatever they like
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return lines[0][:LONGEST]
    return ""


def square(x: Tensor) -> Tensor:
    return x * x
