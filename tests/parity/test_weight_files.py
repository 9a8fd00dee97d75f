"""kdmini reads from files of the reference implementation what that reads itself."""

import json
from pathlib import Path

import pytest
import torch
from oracle import oracle

from kdmini.contracts import UserError
from kdmini.detection.yolo11 import weights
from kdmini.detection.yolo11.model import YOLO11

pytestmark = pytest.mark.parity

# argv: folder, cases "scale-classes-kind". Writes <case>.pt as the trainer does, and
# what is in it when it is unpickled: <case>.state and <case>.json.
SAVE = """
import json
import sys
from copy import deepcopy
from datetime import datetime
from pathlib import Path

import numpy as np
import torch
from torch import nn
from ultralytics import __version__
from ultralytics.cfg import get_cfg
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils import DEFAULT_CFG
from ultralytics.utils.torch_utils import (
    ModelEMA,
    convert_optimizer_state_dict_to_fp16,
    strip_optimizer,
)


def save(scale, classes, kind, file):
    model = make(scale, classes)
    if kind == "identity":
        model.model[9].cv1.act = nn.Identity()
    optimizer, ema = train(model)
    average = deepcopy(ema.ema)
    if kind == "last":
        average.criterion = deepcopy(model.criterion)  # newer releases keep it
    if kind == "fused":
        average.fuse(verbose=False)
    content = {
        "epoch": 3,
        "best_fitness": np.float64(0.5),
        "model": deepcopy(model) if kind == "last" else None,
        "ema": average.half(),
        "updates": ema.updates,
        "optimizer": convert_optimizer_state_dict_to_fp16(deepcopy(optimizer.state_dict())),
        "scaler": torch.amp.GradScaler("cpu").state_dict(),
        "train_args": vars(model.args),
        "train_metrics": {"fitness": np.float64(0.5)},
        "train_results": {"epoch": [1, 2]},
        "date": datetime.now().isoformat(),
        "version": __version__,
        "git": {"root": None},
        "license": "AGPL-3.0 License (https://ultralytics.com/license)",
        "docs": "https://docs.ultralytics.com",
    }
    torch.save(content, file)
    if kind != "last":
        strip_optimizer(file)
    write_content(file)


def make(scale, classes):
    torch.manual_seed(0)
    model = DetectionModel(f"yolo11{scale}.yaml", nc=classes, verbose=False)
    model.names = {k: f"class {k}" for k in range(classes)}
    model.args = get_cfg(DEFAULT_CFG)
    return model


def train(model):
    # two steps: they move weights, BatchNorm statistics and the average
    optimizer = torch.optim.SGD(model.parameters(), 0.01, 0.937, nesterov=True)
    ema = ModelEMA(model)
    model.train()
    one_box = {
        "cls": torch.zeros(2, 1),
        "bboxes": torch.full((2, 4), 0.5),
        "batch_idx": torch.arange(2.0),
    }
    for _ in range(2):
        batch = {"img": torch.rand(2, 3, 64, 64)} | one_box
        model.loss(batch)[0].sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update(model)
    return optimizer, ema


def write_content(file):
    content = torch.load(file, weights_only=False)
    saved = content["ema"] or content["model"]
    torch.save(dict(saved.float().state_dict()), file.with_suffix(".state"))
    facts = [saved.names, content["license"], content["version"]]
    file.with_suffix(".json").write_text(json.dumps(facts))


for case in sys.argv[2:]:
    scale, classes, kind = case.split("-")
    save(scale, int(classes), kind, Path(sys.argv[1], f"{case}.pt"))
"""

# argv: folder, cases "class of the model:name of its architecture". Writes <name>.pt.
OTHER_MODELS = """
import sys

import torch
from ultralytics.nn import tasks

for case in sys.argv[2:]:
    kind, name = case.split(":")
    model = getattr(tasks, kind)(f"{name}.yaml", verbose=False)
    torch.save({"model": model.half()}, f"{sys.argv[1]}/{name}.pt")
"""

CASES = [
    "n-80-best",
    "n-20-best",
    "s-80-best",
    "s-20-best",
    "m-80-best",
    "m-20-best",
    "l-80-best",
    "s-20-identity",
    "n-80-last",
    "m-20-last",
]
OTHERS = {
    "PoseModel:yolo11n-pose": "is a pose checkpoint",
    "SegmentationModel:yolo11n-seg": "is a segmentation checkpoint",
    "ClassificationModel:yolo11n-cls": "is a classification checkpoint",
    "OBBModel:yolo11n-obb": "is a obb checkpoint",
    "DetectionModel:yolov8n": "C2f' as 'model.2'.*made of 'yolov8n.yaml'",
    "DetectionModel:yolo12n": "A2C2f' as 'model.6'.*made of 'yolo12n.yaml'",
    "DetectionModel:yolov10n": "has a one-to-one head",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    saved = tmp_path_factory.mktemp("saved")
    oracle(SAVE, saved, *CASES, "n-80-fused")
    oracle(OTHER_MODELS, saved, *OTHERS)
    return saved


@pytest.mark.parametrize("case", CASES)
def test_everything_in_a_file_is_read_as_it_was_saved(folder: Path, case: str) -> None:
    path = folder / f"{case}.pt"
    scale, classes, kind = case.split("-")
    state = torch.load(path.with_suffix(".state"), weights_only=True)
    names, license_text, version = json.loads(path.with_suffix(".json").read_text())
    file = weights.read(path)
    assert file.state.keys() == state.keys()
    for key, tensor in state.items():
        assert file.state[key].dtype == tensor.dtype, key
        assert torch.equal(file.state[key], tensor), key
    assert file.names == [names[str(row)] for row in range(int(classes))]
    assert file.scale == scale
    assert file.license == license_text
    assert file.version == version
    assert file.sppf_act is (kind != "identity")
    YOLO11(file.names, scale, weights=str(path))  # loads strictly


@pytest.mark.parametrize("case", OTHERS)
def test_other_files_are_refused_by_name(folder: Path, case: str) -> None:
    name = case.partition(":")[2]
    with pytest.raises(UserError, match=OTHERS[case]):
        weights.read(folder / f"{name}.pt")


def test_a_fused_file_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="is fused"):
        weights.read(folder / "n-80-fused.pt")
