"""kdmini reads from files of the reference implementation what that reads from them itself."""

import json
from pathlib import Path

import pytest
import torch
from oracle import oracle

from kdmini.contracts import UserError
from kdmini.detection.yolo11 import weights
from kdmini.detection.yolo11.model import YOLO11

pytestmark = pytest.mark.parity

# Saves <case>.pt as the trainer does, and what is in it when it is unpickled: <case>.state and
# <case>.json.
SAVE = """
import json, sys
from argparse import Namespace
from copy import deepcopy
from datetime import datetime
from pathlib import Path
import numpy as np, torch
from torch import nn
from ultralytics import __version__
from ultralytics.cfg import get_cfg
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils import DEFAULT_CFG
from ultralytics.utils.torch_utils import ModelEMA, convert_optimizer_state_dict_to_fp16, strip_optimizer

def save(scale, classes, kind, file):
    torch.manual_seed(0)
    model = DetectionModel(f"yolo11{scale}.yaml", nc=classes, verbose=False)
    model.names = {k: f"class {k}" for k in range(classes)}
    model.args = get_cfg(DEFAULT_CFG)
    if kind == "identity":
        model.model[9].cv1.act = nn.Identity()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, 0.937, nesterov=True)
    ema = ModelEMA(model)
    model.train()
    one_box = {"cls": torch.zeros(2, 1), "bboxes": torch.full((2, 4), 0.5), "batch_idx": torch.arange(2.0)}
    for _ in range(2):  # moves weights, BatchNorm statistics and the average
        model.loss({"img": torch.rand(2, 3, 64, 64)} | one_box)[0].sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update(model)
    average = deepcopy(ema.ema)
    if kind == "last":
        average.criterion = deepcopy(model.criterion)  # newer releases keep it
    if kind == "fused":
        average.fuse(verbose=False)
    torch.save({
        "epoch": 3, "best_fitness": np.float64(0.5), "model": deepcopy(model) if kind == "last" else None,
        "ema": average.half(), "updates": ema.updates,
        "optimizer": convert_optimizer_state_dict_to_fp16(deepcopy(optimizer.state_dict())),
        "scaler": torch.amp.GradScaler("cpu").state_dict(), "train_args": vars(model.args),
        "train_metrics": {"fitness": np.float64(0.5)}, "train_results": {"epoch": [1, 2]},
        "date": datetime.now().isoformat(), "version": __version__, "git": {"root": None},
        "license": "AGPL-3.0 License (https://ultralytics.com/license)", "docs": "https://docs.ultralytics.com",
    }, file)
    if kind != "last":
        strip_optimizer(file)
    content = torch.load(file, weights_only=False)
    saved = content["ema"] or content["model"]
    torch.save(dict(saved.float().state_dict()), file.with_suffix(".state"))
    file.with_suffix(".json").write_text(json.dumps([saved.names, content["license"], content["version"]]))

for case in sys.argv[2:]:
    scale, classes, kind = case.split("-")
    save(scale, int(classes), kind, Path(sys.argv[1], f"{case}.pt"))
"""

OTHER_TASKS = """
import sys
import torch
from ultralytics.nn import tasks
for case in sys.argv[2:]:
    task, config = case.split(":")
    torch.save({"model": getattr(tasks, task)(f"{config}.yaml", verbose=False).half()}, f"{sys.argv[1]}/{config}.pt")
"""

CASES = [
    *("n-80-best", "n-20-best", "s-80-best", "s-20-best", "m-80-best", "m-20-best"),
    *("l-80-best", "s-20-identity", "n-80-last", "m-20-last"),
]
OTHERS = {
    "PoseModel:yolo11n-pose": "is a pose checkpoint",
    "SegmentationModel:yolo11n-seg": "is a segmentation checkpoint",
    "ClassificationModel:yolo11n-cls": "is a classification checkpoint",
    "OBBModel:yolo11n-obb": "is a obb checkpoint",
    "DetectionModel:yolov8n": "names '.*C2f'",
    "DetectionModel:yolo12n": "names '.*A2C2f'",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("saved")
    oracle(SAVE, made, *CASES, "n-80-fused")
    oracle(OTHER_TASKS, made, *OTHERS)
    return made


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_is_the_same(folder: Path, case: str) -> None:
    path = folder / f"{case}.pt"
    scale, classes, kind = case.split("-")
    state = torch.load(path.with_suffix(".state"), weights_only=True)
    names, license_text, version = json.loads(path.with_suffix(".json").read_text())
    file = weights.read(path)
    assert file.state.keys() == state.keys()
    for key, tensor in state.items():
        assert file.state[key].dtype == tensor.dtype and torch.equal(file.state[key], tensor), key
    assert file.names == [names[str(row)] for row in range(int(classes))]
    assert (file.scale, file.license, file.version) == (scale, license_text, version)
    assert file.sppf_act is (kind != "identity")
    YOLO11(file.names, scale, weights=str(path))  # loads strictly


@pytest.mark.parametrize("case", OTHERS)
def test_other_files_are_refused_by_name(folder: Path, case: str) -> None:
    with pytest.raises(UserError, match=OTHERS[case]):
        weights.read(folder / f"{case.split(':')[1]}.pt")


def test_a_fused_file_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="getattr"):
        weights.read(folder / "n-80-fused.pt")
