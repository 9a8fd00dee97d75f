"""Where a run computes, how exactly it repeats, and in which precision."""

import os
import re
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

from kdmini.contracts import UserError

Autocast = Callable[[], AbstractContextManager]
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one. Raises UserError for a device that is not there."""
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
