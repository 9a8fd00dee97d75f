"""Every kind of file that YOLO11 weights lie in: read exactly, or called what it is."""

import sys
import types
from collections.abc import Callable
from pathlib import Path, PosixPath
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kdmini import checkpoint
from kdmini.contracts import UserError
from kdmini.detection.yolo11 import weights
from kdmini.detection.yolo11.model import YOLO11
from kdmini.optim import EMA
from kdmini.tools.export import export
from kdmini.tools.export_safetensors import to_safetensors
from kdmini.tools.load import load_detector
from tests.detection.yolo11.watched import read, refused
from tests.detection.yolo11.weight_files import (
    TINY,
    CocoFile,
    PublicClasses,
    assert_equal,
    detector,
    public_file,
    public_model,
    rezipped,
    rounded,
    tiny_n,
)

NAMES = ["a", "b"]  # of tiny_n


@pytest.fixture(scope="module")
def student() -> YOLO11:
    return detector(TINY, NAMES)


@pytest.fixture
def whole(public: PublicClasses) -> nn.Module:
    """tiny_n as ultralytics pickles it."""
    return public_model(public, tiny_n())


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """What is in it."""
    return rounded(tiny_n().state_dict())


# --- from mid-training


class Blur:
    """Stands for an augmentation of another package."""


def training_facts() -> dict[str, Any]:
    """What a training leaves beside the model: numbers of numpy, paths, objects."""
    parameter = nn.Parameter(torch.rand(3))
    optimizer = torch.optim.SGD([parameter], 0.1, momentum=0.9)
    parameter.sum().backward()
    optimizer.step()
    return {
        "best_fitness": np.float64(0.5),
        "train_metrics": {"fitness": np.float64(0.5), "curve": np.arange(3.0)},
        "train_args": {
            "project": PosixPath("runs"),
            "augmentations": [Blur()],
            "classes": {1, 2},
            "imgsz": 96,
        },
        "optimizer": optimizer.state_dict() | {"by": {(0, 1): 2, None: 3, 1.5: 4}},
        "device": torch.device("cpu"),
    }


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_what_a_training_left_beside_the_model_is_inert(
    tmp_path: Path, whole: nn.Module, state: dict[str, Tensor], protocol: int
) -> None:
    path = public_file(tmp_path / "last.pt", None, protocol, ema=whole, **training_facts())
    file = read(path)
    assert_equal(file.state, state)
    assert file.names == NAMES
    assert file.imgsz == 96


def test_a_file_that_was_written_under_numpy_1_is_read(
    tmp_path: Path, whole: nn.Module, state: dict[str, Tensor]
) -> None:
    def rename(entries: dict[str, bytes]) -> None:
        name = next(name for name in entries if name.endswith("/data.pkl"))
        assert b"numpy._core" in entries[name]
        entries[name] = entries[name].replace(b"numpy._core", b"numpy.core")

    path = public_file(tmp_path / "last.pt", None, ema=whole, **training_facts())
    assert_equal(read(rezipped(path, rename)).state, state)


@pytest.mark.parametrize(
    "wrapper, name",
    [
        ("ultralytics.nn.distill_model:DistillationModel", "student_model"),
        ("ultralytics.models.yolo.model:YOLO", "model"),
        ("torch.nn.parallel.data_parallel:DataParallel", "module"),
        ("torch.nn.parallel.distributed:DistributedDataParallel", "module"),
    ],
)
def test_a_model_is_found_in_what_trains_or_uses_it(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    whole: nn.Module,
    state: dict[str, Tensor],
    wrapper: str,
    name: str,
) -> None:
    module_name, class_name = wrapper.split(":")
    outside = type(class_name, (nn.Module,), {"__module__": module_name})
    module = types.ModuleType(module_name)
    setattr(module, class_name, outside)
    monkeypatch.setitem(sys.modules, module_name, module)
    outer = outside()
    outer.add_module("teacher_model", nn.Conv2d(1, 1, 1))
    outer.add_module(name, whole)
    outer.register_forward_hook(print)

    torch.save(outer, tmp_path / "whole.pt")
    assert_equal(read(tmp_path / "whole.pt").state, state)
    assert_equal(read(public_file(tmp_path / "last.pt", None, ema=outer)).state, state)


def test_a_model_that_was_saved_by_itself_is_read(
    tmp_path: Path, whole: nn.Module, state: dict[str, Tensor]
) -> None:
    torch.save(whole, tmp_path / "model.pt")
    file = read(tmp_path / "model.pt")
    assert_equal(file.state, state)
    assert file.names == NAMES


def test_an_n_that_was_fine_tuned_with_the_class_branch_of_coco_is_read(
    public: PublicClasses, coco_n: CocoFile, tmp_path: Path
) -> None:
    """As recent releases of ultralytics do, where the rule for 2 classes says 64."""
    by_name = {"path": str(coco_n.path), "classes": "by_name"}
    tuned = YOLO11(["cat", "dog"], "n", weights=by_name)
    expected = rounded(tuned.state_dict())
    path = public_file(tmp_path / "best.pt", public_model(public, tuned))
    loaded = YOLO11(["cat", "dog"], "n", weights=str(path))
    assert_equal(loaded.state_dict(), expected)
    assert loaded.card["cls_width"] == 80


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions_are_read_as_float32(
    tmp_path: Path, whole: nn.Module, dtype: torch.dtype
) -> None:
    whole = whole.to(dtype)
    expected = {key: value.clone() for key, value in whole.state_dict().items()}
    for key, tensor in read(public_file(tmp_path / "f.pt", whole)).state.items():
        assert torch.equal(tensor.double(), expected[key].double()), key


# --- tensors alone

BARE: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "by itself": lambda state: state,
    "in a model": lambda state: {f"module.model.{key}": value for key, value in state.items()},
    "under model": lambda state: {"epoch": 3, "model": state},
    "under state_dict": lambda state: {"epoch": 3, "state_dict": state},
}


@pytest.mark.parametrize("kind", BARE)
def test_a_bare_state_dict_is_read_where_its_names_are_given(
    tmp_path: Path, student: YOLO11, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(BARE[kind](student.state_dict()), tmp_path / "f.pt")
    given = {"path": str(tmp_path / "f.pt"), "names": ["dog", "cat"]}
    loaded = YOLO11(["dog", "cat"], TINY, weights=given)
    assert_equal(loaded.state_dict(), student.state_dict())
    assert loaded.sppf_act
    assert "taken for one with SiLU in SPPF" in capsys.readouterr().out

    by_name = given | {"classes": "by_name", "sppf_act": False}
    swapped = YOLO11(["cat", "dog"], TINY, weights=by_name)
    rows = swapped.get_parameter("model.23.cv3.0.2.bias")
    assert torch.equal(rows, student.get_parameter("model.23.cv3.0.2.bias").flip(0))
    assert not swapped.sppf_act


def test_a_bare_state_dict_without_names_says_what_to_give(tmp_path: Path, student: YOLO11) -> None:
    torch.save(student.state_dict(), tmp_path / "f.pt")
    refused(
        tmp_path / "f.pt",
        "is a bare state_dict, which names no classes: .*names.* its 2 classes in order",
    )
    with pytest.raises(UserError, match="has no list of names for its 2 classes"):
        weights.read(tmp_path / "f.pt", names=["a", "b", "c"])


def test_a_bare_state_dict_of_another_scale_is_not_built(tmp_path: Path, student: YOLO11) -> None:
    torch.save(student.state_dict(), tmp_path / "f.pt")
    given = {"path": str(tmp_path / "f.pt"), "names": NAMES}
    with pytest.raises(UserError, match=r"other shapes in .*so it is no YOLO11m"):
        YOLO11(NAMES, "m", weights=given)


def test_the_names_of_a_file_go_before_those_that_are_given(
    tmp_path: Path, whole: nn.Module
) -> None:
    path = public_file(tmp_path / "f.pt", whole)
    assert weights.read(path, names=["x", "y"]).names == NAMES


# --- safetensors


@pytest.mark.parametrize("scale", [TINY, "n"])
def test_what_kdmini_exports_comes_back_whole(tmp_path: Path, scale: Any) -> None:
    model = detector(scale, ["cup", "잔"])
    model.sppf_act = False
    model.license = "AGPL-3.0"
    checkpoint.save_best(tmp_path / "best.pt", model, imgsz=96, epoch=0, fitness=0.5)
    path = export(str(tmp_path / "best.pt"), "safetensors")

    file = read(path)
    assert_equal(file.state, model.state_dict())
    assert file.names == model.names
    assert not file.sppf_act
    assert file.license == "AGPL-3.0"
    again, imgsz = load_detector(path)
    assert again.card == model.card
    assert imgsz == 96


def test_safetensors_of_tensors_alone_need_names(tmp_path: Path, student: YOLO11) -> None:
    path = tmp_path / "f.safetensors"
    path.write_bytes(to_safetensors(student.state_dict(), {}))
    refused(path, "is a safetensors file of tensors alone, which names no classes")
    assert_equal(weights.read(path, names=NAMES).state, student.state_dict())


@pytest.mark.parametrize(
    "header",
    [
        b"{" + b"[" * 100_000,
        b'{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [4294967296, 4294967296], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "C64", "shape": [1], "data_offsets": [0, 8]}}',
        b'{"a": 3}',
        b'{"__metadata__": 3}',
        b"{}",
        # one stretch of the file, many times
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, '
        b'"b": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}',
    ],
)
def test_safetensors_of_nonsense_are_refused(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "f.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    refused(path)


# --- a checkpoint of a run


def test_the_average_of_a_checkpoint_is_read_where_its_names_are_given(
    tmp_path: Path, student: YOLO11
) -> None:
    ema = EMA(student, decay=0.9, tau=10)
    with torch.no_grad():
        ema.average.get_parameter("model.0.conv.weight").add_(1)
    checkpoint.save(tmp_path, 3, {"student": student, "ema": ema}, {"run": "runs/x"})
    (path,) = tmp_path.glob("step_*.pt")
    refused(path, "is a checkpoint of a run of kdmini, which names no classes: give a best.pt")
    assert_equal(weights.read(path, names=NAMES).state, ema.average.state_dict())


# --- what is refused, and why


def test_a_fused_file_is_refused(tmp_path: Path, whole: nn.Module) -> None:
    conv = whole.get_submodule("model.0")
    del conv.bn
    conv.conv.bias = nn.Parameter(torch.zeros(16))
    refused(public_file(tmp_path / "f.pt", whole), "is fused.*give the file from before")
    folded = detector(TINY, NAMES).eval().fold()
    torch.save(folded.state_dict(), tmp_path / "state.pt")
    refused(tmp_path / "state.pt", "is fused")


def one_to_one(root: nn.Module) -> None:
    root.get_submodule("model.23").one2one_cv2 = nn.ModuleList()
    root.yaml = {"yaml_file": "yolo26n.yaml"}


def other_epsilon(root: nn.Module) -> None:
    root.get_submodule("model.0.bn").eps = 1e-5


def no_shortcut(root: nn.Module) -> None:
    root.get_submodule("model.2.m.0").add = False


def other_activation(root: nn.Module) -> None:
    root.get_submodule("model.3").act = nn.Identity()


def an_activation_more(root: nn.Module) -> None:
    root.get_submodule("model.10.m.0.ffn.1").act = nn.SiLU()


def strange_activation(root: nn.Module) -> None:
    root.get_submodule("model.3").act = nn.ReLU()


@pytest.mark.parametrize(
    "change, message",
    [
        (one_to_one, r"one-to-one head, as YOLO26.*\(it was made of 'yolo26n.yaml'\)"),
        (other_epsilon, "another `eps` in 'model.0.bn', which no YOLO11 has"),
        (no_shortcut, "another `add` in 'model.2.m.0'"),
        (other_activation, "another activation in 'model.3.act'"),
        (an_activation_more, "another activation in 'model.10.m.0.ffn.1.act'"),
        (strange_activation, "'torch.nn.modules.activation.ReLU' as 'model.3.act'"),
    ],
)
def test_a_network_that_only_looks_like_yolo11_is_refused(
    tmp_path: Path, whole: nn.Module, change: Callable[[nn.Module], None], message: str
) -> None:
    change(whole)
    refused(public_file(tmp_path / "f.pt", whole), message)


def test_the_best_pt_of_another_network_is_called_that(tmp_path: Path) -> None:
    for card in ({}, {"detector": "ATSS", "width": 8}):
        content = {"format": "kdmini", "model": {}, "names": NAMES, "card": card}
        torch.save(content, tmp_path / "best.pt")
        refused(tmp_path / "best.pt", "another network than YOLO11, the only one that is read")


@pytest.mark.parametrize(
    "content, message",
    [
        (b'<?xml version="1.0"?>\n<net name="Model0" version="11">', "of an OpenVINO model"),
        (b"\x1c\0\0\0TFL3", "is a TensorFlow Lite model"),
        (b'\xd2\1\0\0{"description": "Ultralytics YOLO11n model"', "a TensorRT engine"),
    ],
)
def test_exported_models_are_called_what_they_are(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "f.bin"
    path.write_bytes(content)
    refused(path, f"{message}.*give the .pt file it was exported from")


def test_the_folder_of_an_exported_model_is_called_that(tmp_path: Path) -> None:
    folder = tmp_path / "yolo11n_openvino_model"
    folder.mkdir()
    refused(folder, "is a folder.*exported model is not read")
