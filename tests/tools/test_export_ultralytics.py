"""The file of ultralytics, read by the reader of such files; their own is asked in tests/parity."""

import sys
import zipfile
from pathlib import Path

import pytest
import torch

from kdmini.checkpoint import save_best
from kdmini.detection.yolo11 import weights as weight_files
from kdmini.detection.yolo11.model import YOLO11
from kdmini.tools.export import export
from kdmini.tools.load import load_detector
from kdmini.weights.pickled import interpret

NAMES = ["cup", "잔"]


@pytest.fixture(scope="module", params=[True, False], ids=["SiLU", "no SiLU"])
def model(request: pytest.FixtureRequest) -> YOLO11:
    """An n whose class branch is as wide as the public one, of other classes."""
    torch.manual_seed(0)
    model = YOLO11(NAMES, "n")
    head = model.model[23]
    model.model[23] = type(head)((64, 128, 256), len(NAMES), cls_width=80)
    model.sppf_act = request.param
    if not model.sppf_act:
        model.get_submodule("model.9.cv1").act = torch.nn.Identity()
    model.license = "AGPL-3.0"
    return model.eval()


@pytest.fixture(scope="module")
def written(model: YOLO11, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "best.pt"
    save_best(path, model, 96, 0, 0.5)
    return export(str(path), "ultralytics")


def test_it_is_read_as_a_file_of_ultralytics(model: YOLO11, written: Path) -> None:
    assert written.name == "best_ultralytics.pt"
    file = weight_files.read(written)
    assert file.names == NAMES
    assert file.scale == "n"
    assert file.sppf_act == model.sppf_act
    assert file.cls_width == 80
    assert file.license == "AGPL-3.0"

    read, imgsz = load_detector(written)
    assert imgsz == 96
    state = read.state_dict()
    expected = model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in expected)


def test_it_names_classes_of_torch_and_of_modules_of_ultralytics_alone(written: Path) -> None:
    with zipfile.ZipFile(written) as archive:
        (pickled,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        names = interpret(archive.read(pickled)).names
    theirs = {name.split(" ")[0] for name in names if name.startswith("ultralytics")}
    assert theirs == {
        "ultralytics.nn.tasks",
        "ultralytics.nn.modules.block",
        "ultralytics.nn.modules.conv",
        "ultralytics.nn.modules.head",
    }
    others = {name for name in names if not name.startswith(("ultralytics", "torch"))}
    assert others == {"__builtin__ set", "collections OrderedDict"}


def test_no_module_is_left_behind(written: Path) -> None:
    assert not [name for name in sys.modules if name.split(".")[0] == "ultralytics"]
