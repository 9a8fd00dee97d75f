"""A detector as the file that ultralytics writes and reads: `YOLO("best_ultralytics.pt")`.

Such a file is the pickle of a model: it names classes of their package, and holds what their
objects have as attributes. Neither needs the package here. The names are given to stand-ins
that hold the tensors of our layers, and the attributes are few, for the layers of both have
the same names.
"""

import io
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import nn

from kdmini.contracts import UserError
from kdmini.detection.yolo11 import layers
from kdmini.detection.yolo11.model import CONCAT_WITH, HEAD, HEAD_INPUTS, READ_LATER, YOLO11

BACKBONE = 11  # layers of it; the others are of what they call the head


class Twin(NamedTuple):
    """What stands for a layer of ours in their file."""

    module: str  # of ultralytics.nn
    name: str
    attributes: Callable[[Any], dict[str, Any]]  # of the layer -> of the twin, beside its parts


TWINS: dict[type[nn.Module], Twin] = {
    layers.Conv: Twin("modules.conv", "Conv", lambda _: {}),
    layers.Bottleneck: Twin("modules.block", "Bottleneck", lambda _: {"add": True}),
    layers.C3k: Twin("modules.block", "C3k", lambda _: {}),
    layers.C3k2: Twin("modules.block", "C3k2", lambda layer: {"c": hidden(layer)}),
    layers.SPPF: Twin("modules.block", "SPPF", lambda _: {"n": 3, "add": False}),
    layers.Attention: Twin(
        "modules.block",
        "Attention",
        lambda layer: {
            "num_heads": layer.heads,
            "head_dim": layer.value_dim,
            "key_dim": layer.key_dim,
            "scale": layer.key_dim**-0.5,
        },
    ),
    layers.PSABlock: Twin("modules.block", "PSABlock", lambda _: {"add": True}),
    layers.C2PSA: Twin("modules.block", "C2PSA", lambda layer: {"c": hidden(layer)}),
    layers.Concat: Twin("modules.conv", "Concat", lambda _: {"d": 1}),
    layers.DFL: Twin("modules.block", "DFL", lambda _: {"c1": layers.REG_MAX}),
    layers.Detect: Twin(
        "modules.head",
        "Detect",
        lambda layer: {
            "nc": classes(layer),
            "nl": len(layers.STRIDES),
            "reg_max": layers.REG_MAX,
            "no": layers.BOX_CHANNELS + classes(layer),
            "stride": torch.tensor(layers.STRIDES, dtype=torch.float32),
            "inplace": True,
        },
    ),
}
DETECTOR = Twin("tasks", "DetectionModel", lambda _: {})


def hidden(block: nn.Module) -> int:
    """Channels of the inner blocks of a C3k2 or C2PSA."""
    return block.get_parameter("cv1.conv.weight").shape[0] // 2


def classes(head: nn.Module) -> int:
    return head.get_parameter("cv3.0.2.bias").shape[0]


def to_ultralytics(detector: Any, imgsz: int) -> bytes:
    """The file, of float32 and not folded. Raises UserError for what is no YOLO11."""
    if not isinstance(detector, YOLO11):
        raise UserError("--to ultralytics is for a YOLO11; give --to onnx or torchscript")
    model = twin(detector, DETECTOR)
    model.model = nn.Sequential(*model.model)
    vars(model).update(
        {
            "yaml": described(detector),
            "save": sorted(READ_LATER),
            "names": dict(enumerate(detector.names)),
            "inplace": True,
            "stride": torch.tensor(layers.STRIDES, dtype=torch.float32),
            "task": "detect",
        }
    )
    for number, layer in enumerate(model.model):
        vars(layer).update(
            {
                "i": number,
                "f": source(number),
                "type": f"{type(layer).__module__}.{type(layer).__name__}",
                "np": sum(parameter.numel() for parameter in layer.parameters()),
            }
        )
    checkpoint = {
        "epoch": -1,
        "model": model,
        "ema": None,
        "optimizer": None,
        "train_args": {"task": "detect", "imgsz": imgsz},
        "license": detector.license,
    }
    buffer = io.BytesIO()
    with importable(model):
        torch.save(checkpoint, buffer)
    return buffer.getvalue()


# --- layers


def counterpart(layer: nn.Module) -> nn.Module:
    """The same layer of ultralytics' classes, or of torch's where those are meant."""
    parts = map(counterpart, layer.children())
    if isinstance(layer, nn.ModuleList | nn.Sequential):
        return nn.ModuleList(parts) if isinstance(layer, nn.ModuleList) else nn.Sequential(*parts)
    if isinstance(layer, layers.BatchNorm):
        norm = nn.BatchNorm2d(layer.num_features, layer.eps, layer.momentum)
        norm.load_state_dict(layer.state_dict())
        return norm
    if isinstance(layer, layers.Upsample):
        return nn.Upsample(scale_factor=layer.scale_factor, mode=layer.mode)
    known = TWINS.get(type(layer))
    return twin(layer, known) if known else layer


@cache
def stand_in(module: str, name: str) -> type[nn.Module]:
    """A class of which a pickle keeps this name."""
    return type(name, (nn.Module,), {"__module__": module})


def twin(layer: nn.Module, known: Twin) -> Any:
    """A module that a pickle takes for one of theirs."""
    made = stand_in(f"ultralytics.nn.{known.module}", known.name)()
    vars(made).update(known.attributes(layer))
    for name, part in layer.named_children():
        made.add_module(name, counterpart(part))
    return made


@contextmanager
def importable(model: nn.Module) -> Iterator[None]:
    """Within it, the classes of the twins are found where they say that they are."""
    modules: dict[str, ModuleType] = {}
    for kind in {type(module) for module in model.modules()}:
        names = kind.__module__.split(".")
        if names[0] != "ultralytics":
            continue
        for end in range(1, len(names) + 1):
            path = ".".join(names[:end])
            modules.setdefault(path, ModuleType(path))
        setattr(modules[kind.__module__], kind.__name__, kind)

    hidden = {path: sys.modules[path] for path in modules if path in sys.modules}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for path in modules:
            del sys.modules[path]
        sys.modules.update(hidden)


# --- the description of the graph, of which their trainer builds a model anew

# layer -> how often it repeats its inner block, and its arguments: channels, kernel, ...
ROWS: dict[type[nn.Module], Callable[[Any], tuple[int, list[Any]]]] = {
    layers.Conv: lambda layer: (1, [outputs(layer), *layer.conv.kernel_size[:1], 2]),
    layers.C3k2: lambda layer: (
        len(layer.m),
        [outputs(layer), isinstance(layer.m[0], layers.C3k), hidden(layer) / outputs(layer)],
    ),
    layers.SPPF: lambda layer: (1, [outputs(layer), layer.m.kernel_size]),
    layers.C2PSA: lambda layer: (len(layer.m), [outputs(layer)]),
    layers.Upsample: lambda layer: (1, [None, int(layer.scale_factor), layer.mode]),
    layers.Concat: lambda _: (1, [1]),
    layers.Detect: lambda _: (1, ["nc"]),
}


def outputs(layer: Any) -> int:
    """Channels that a Conv, or a block that ends in one, gives."""
    last = layer if isinstance(layer, layers.Conv) else layer.cv2
    return last.conv.out_channels


def source(number: int) -> int | list[int]:
    """Which layers a layer reads; -1 is the one before it."""
    if number == HEAD:
        return list(HEAD_INPUTS)
    return [-1, CONCAT_WITH[number]] if number in CONCAT_WITH else -1


def described(detector: YOLO11) -> dict[str, Any]:
    """In ultralytics' format, channels and repeats as they are: a scale of 1."""
    rows: list[list[Any]] = []
    for number, layer in enumerate(detector.model):
        repeats, arguments = ROWS[type(layer)](layer)
        name = "nn.Upsample" if isinstance(layer, nn.Upsample) else type(layer).__name__
        rows.append([source(number), repeats, name, arguments])
    return {
        "nc": len(detector.names),
        "channels": 3,
        "scale": "n",  # of m, l and x they would make other blocks
        "scales": {"n": [1.0, 1.0, 8192]},
        "backbone": rows[:BACKBONE],
        "head": rows[BACKBONE:],
    }
