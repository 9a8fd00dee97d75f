"""Weight files made for the tests: kdmini's own, and files as the public ones are."""

import sys
import types
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import SSD300_VGG16_Weights

from kdmini.detection.yolo11.model import YOLO11

COCO_NAMES = [
    name
    for name in SSD300_VGG16_Weights.COCO_V1.meta["categories"]
    if name not in ("N/A", "__background__")
]

LICENSE = "AGPL-3.0 License (https://ultralytics.com/license)"

# the tensors with one row a class
ROWS = [
    "model.23.cv3.0.2.weight",
    "model.23.cv3.0.2.bias",
    "model.23.cv3.1.2.weight",
    "model.23.cv3.1.2.bias",
    "model.23.cv3.2.2.weight",
    "model.23.cv3.2.2.bias",
]

TINY = [0.5, 0.0625, 256]  # depth, width, max channels


# --- kdmini's own


def own_content(**changes: Any) -> dict[str, Any]:
    """What a best.pt of two classes holds, with no more tensors than are looked at."""
    state = {}
    for key in ROWS:
        state[key] = torch.rand(2, 4, 1, 1) if key.endswith("weight") else torch.rand(2)
    content = {
        "format": "kdmini",
        "model": state,
        "names": ["cat", "dog"],
        "card": {"scale": "n", "sppf_act": True, "license": "of the data"},
    }
    return content | changes


def own_file(path: Path, **changes: Any) -> Path:
    torch.save(own_content(**changes), path)
    return path


# --- as the public ones are

# module -> its classes that a YOLO11 file names
PUBLIC_CLASSES = {
    "ultralytics.nn.modules.conv": ["Conv", "Concat"],
    "ultralytics.nn.modules.block": [
        "Attention",
        "Bottleneck",
        "C2PSA",
        "C3k",
        "C3k2",
        "DFL",
        "PSABlock",
        "SPPF",
    ],
    "ultralytics.nn.modules.head": ["Detect"],
    "ultralytics.nn.tasks": ["DetectionModel", "PoseModel"],
}

PublicClasses = Mapping[str, type[nn.Module]]


@contextmanager
def public_classes() -> Iterator[PublicClasses]:
    """Empty classes under the public names, importable meanwhile, by name.

    torch.save then writes the pickle that a public file has.
    """
    classes = {}
    with pytest.MonkeyPatch.context() as patch:
        for package in ("ultralytics", "ultralytics.nn", "ultralytics.nn.modules"):
            patch.setitem(sys.modules, package, types.ModuleType(package))
        for module_name, class_names in PUBLIC_CLASSES.items():
            module = types.ModuleType(module_name)
            patch.setitem(sys.modules, module_name, module)
            for name in class_names:
                classes[name] = type(name, (nn.Module,), {"__module__": module_name})
                setattr(module, name, classes[name])
        yield classes


def public_model(public: PublicClasses, detector: YOLO11) -> nn.Module:
    """The detector as the public classes spell it, in half precision."""
    root = public["DetectionModel"]()
    root.model = nn.Sequential(*detector.model)
    root.names = dict(enumerate(detector.names))
    classes = {**public, "BatchNorm": nn.BatchNorm2d, "Upsample": nn.Upsample}
    for module in root.modules():
        module.__class__ = classes.get(type(module).__name__, type(module))
    return root.half()


def public_file(path: Path, model: Any, protocol: int = 2, **changes: Any) -> Path:
    content = {
        "date": "2024",
        "version": "8.3.0",
        "license": LICENSE,
        "docs": "",
        "epoch": -1,
        "best_fitness": None,
        "model": model,
        "ema": None,
        "optimizer": None,
        "train_args": {"lr0": 0.01},
    }
    torch.save(content | changes, path, pickle_protocol=protocol)
    return path


class CocoFile(NamedTuple):
    path: Path
    state: dict[str, Tensor]  # what is in it


def detector(scale: Any, names: list[str]) -> YOLO11:
    """Random weights, moved BatchNorm statistics."""
    torch.manual_seed(0)
    model = YOLO11(names, scale)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            module.num_batches_tracked += 7
    return model


def tiny_n() -> YOLO11:
    """Small but for its first convolution, by whose width it is read as scale n."""
    model = detector(TINY, ["a", "b"])
    model.model[0].conv = nn.Conv2d(3, 16, 3, bias=False)
    return model


# --- the zip


def zipped(path: Path, pickled: bytes) -> Path:
    """A file of this pickle alone."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("f/data.pkl", pickled)
    return path


def entries_of(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def rezipped(path: Path, change: Callable[[dict[str, bytes]], object]) -> Path:
    """The file again, with entries changed and right checksums."""
    entries = entries_of(path)
    change(entries)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return path


# --- tensors


def rounded(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As they come back from a file in half precision."""
    return {
        key: value.half().float() if value.is_floating_point() else value.clone()
        for key, value in state.items()
    }


def assert_equal(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert state.keys() == expected.keys()
    for key, tensor in state.items():
        assert tensor.dtype == expected[key].dtype, key
        assert torch.equal(tensor, expected[key]), key
