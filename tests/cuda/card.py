"""A pretended CUDA card, for a process of its own: tensors have a place and a shape there, and
no content.

FakeTensorMode answers every operator with the shape, type and device of what a card would
give, and refuses what meets on two devices. Here the rest is answered: what torch.cuda is
asked, and what autograd's engine wants of the driver (card.cpp).
"""

import ctypes
import hashlib
import shutil
import subprocess
import tempfile
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch._subclasses.fake_tensor as fakes
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

CARD = torch.device("cuda", 0)
SOURCE = Path(__file__).with_name("card.cpp")
GIB = 2**30


def why_not() -> str:
    """What is missing here to pretend; empty where nothing is."""
    if not torch.version.cuda:
        return "torch is built for the CPU alone"
    if not shutil.which("g++"):
        return "there is no g++ to compile card.cpp"
    if torch.cuda.is_available():
        return "a real card is here: bench.first_gpu and the other tests meet it"
    return ""


def pretend(major: int = 9, total: float = 80 * GIB, free: float = 79 * GIB) -> FakeTensorMode:
    """Makes torch take this process for one with a card of this compute capability and memory,
    for good -> the mode in which it computes.
    """
    library = ctypes.CDLL(str(compiled_engine()))
    library.pretend_install()
    fakes.init_gpu_context = lambda device: None
    of_mode: Any = FakeTensorMode
    of_mode.avoid_device_init = property(lambda mode: True)
    of_mode.__deepcopy__ = lambda mode, memo: mode  # a copied tensor stays in its mode
    of_tensor: Any = FakeTensor
    of_tensor.__format__ = lambda tensor, spec: format(tensor.item(), spec)
    module: Any = nn.Module
    module._apply = apply_anew
    answer(torch.cuda, major, int(free), int(total))
    return FakeTensorMode(allow_non_fake_inputs=True)


def compiled_engine() -> Path:
    """card.cpp, compiled once for each torch."""
    text = SOURCE.read_text() + torch.__version__
    name = f"kdmini_card_{hashlib.sha256(text.encode()).hexdigest()[:12]}.so"
    library = Path(tempfile.gettempdir()) / name
    if not library.exists():
        root = Path(torch.__file__).parent
        temporary = library.with_suffix(f".{id(text)}")
        flags = ["-std=c++20", "-O0", "-w", "-shared", "-fPIC"]
        links = [f"-L{root}/lib", "-ltorch_cpu", "-lc10"]
        subprocess.run(
            ["g++", *flags, f"-I{root}/include", str(SOURCE), "-o", str(temporary), *links],
            check=True,
        )
        temporary.replace(library)
    return library


def answer(cuda: Any, major: int, free: int, total: int) -> None:
    """What torch.cuda says without asking a driver."""

    def properties(device: Any = None) -> SimpleNamespace:
        return SimpleNamespace(major=major, minor=0, name="pretended", total_memory=total)

    def nothing(*_: Any) -> None:
        pass

    def zero(*_: Any) -> int:
        return 0

    def entered(*_: Any) -> AbstractContextManager:
        return nullcontext()

    cuda.is_available = lambda: True
    cuda.is_initialized = lambda: True
    cuda.device_count = lambda: 1
    cuda.current_device = zero
    cuda.device = entered
    cuda.get_device_properties = properties
    cuda.get_device_name = lambda device=None: "pretended"
    cuda.get_device_capability = lambda device=None: (major, 0)
    cuda.mem_get_info = lambda device=None: (free, total)
    cuda.max_memory_reserved = zero
    cuda.max_memory_allocated = zero
    cuda.get_rng_state_all = lambda: [torch.zeros(16, dtype=torch.uint8)]
    for name in ("_lazy_init", "set_device", "synchronize", "set_rng_state_all", "empty_cache"):
        setattr(cuda, name, nothing)


def apply_anew(module: nn.Module, move: Any, recurse: bool = True) -> nn.Module:
    """In place of Module._apply, which swaps the contents of parameters: those of pretended
    ones cannot be swapped.
    """
    for child in module.children():
        child._apply(move)
    with torch.no_grad():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                moved = move(parameter.detach())
                module._parameters[name] = nn.Parameter(moved, parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = move(buffer)
    return module
