"""Files of several releases, stripped and from mid-training, give the outputs of the
release that saved them.
"""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from oracle import oracle
from torch import Tensor, nn
from witness import witness

from kdmini.data.voc import VOC_NAMES
from kdmini.detection.yolo11 import weights
from kdmini.detection.yolo11.model import YOLO11, decode_maps

pytestmark = pytest.mark.parity

# argv: scale, height, width, folder. Writes best.pt (stripped), the same by protocol 4,
# last.pt (from mid-training), whole.pt (the model by itself), state.pt (its tensors), and
# outputs.pt: what the release makes of two images.
SAVE = """
import sys
from copy import deepcopy
from pathlib import Path

import torch
import yaml
from torch import nn
from ultralytics import __version__
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils import ROOT

scale, height, width, folder = sys.argv[1:]
folder = Path(folder)


def facts_of(model, norms):
    head = model.model[-1]
    branches = (head.cv2, head.cv3)
    return {
        "keys": {key: tuple(value.shape) for key, value in model.state_dict().items()},
        "bias": [[level[-1].bias.detach().clone() for level in branch] for branch in branches],
        "eps": sorted({norm.eps for norm in norms}),
        "momentum": sorted({norm.momentum for norm in norms}),
        "act": type(model.model[9].cv1.act).__name__,
    }


def move(model, norms):
    # statistics of a batch: with random ones the deep layers die out, and nothing that
    # is compared depends on them
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.rand(8, 3, 128, 128))
    for norm in norms:
        norm.momentum = 0.03
    for level in model.model[-1].cv3:
        nn.init.normal_(level[-1].bias, -2)


torch.manual_seed(1)
model = DetectionModel(f"yolo11{scale}.yaml", nc=80, verbose=False)
model.names = yaml.safe_load((ROOT / "cfg/datasets/coco.yaml").read_text())["names"]
norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
fresh = facts_of(model, norms)
move(model, norms)
model = model.half().float()

common = {
    "date": "",
    "version": __version__,
    "license": "AGPL-3.0",
    "docs": "",
    "best_fitness": None,
    "train_args": {},
}
best = {
    "epoch": -1,
    "model": deepcopy(model).half(),
    "ema": None,
    "updates": None,
    "optimizer": None,
}
torch.save(common | best, folder / "best.pt")

optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
broken = deepcopy(model).half()
nn.init.zeros_(broken.model[0].conv.weight)  # what is evaluated is `ema`, not `model`
last = {
    "epoch": 3,
    "model": broken,
    "ema": deepcopy(model).half(),
    "updates": 7,
    "optimizer": optimizer.state_dict(),
}
torch.save(common | last, folder / "last.pt")
torch.save(deepcopy(model), folder / "whole.pt")
torch.save(model.state_dict(), folder / "state.pt")
torch.save(common | best, folder / "protocol4.pt", pickle_protocol=4)

model.eval()
images = torch.rand(2, 3, int(height), int(width))
with torch.no_grad():
    decoded = model(images)[0]
outputs = {"fresh": fresh, "images": images, "decoded": decoded, "version": __version__}
torch.save(outputs, folder / "outputs.pt")
"""

# release, scale, height, width
CASES = [
    ("8.3.0", "s", 320, 320),
    ("8.3.250", "m", 320, 192),
    ("8.3.250", "n", 640, 640),
    ("8.4.0", "n", 128, 160),
    ("newest", "s", 160, 128),
]


class Saved(NamedTuple):
    """What a release wrote, and what it makes of it."""

    folder: Path
    release: str  # as it was asked for
    version: str  # as it says itself
    scale: str
    fresh: dict[str, Any]  # facts of its model as first made
    images: Tensor  # (N, 3, H, W)
    decoded: Tensor  # (N, 4 + 80, A): boxes_cxcywh and scores

    @property
    def oracle(self) -> str:
        return f"ultralytics {self.version}"


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(map(str, case)))
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    release, scale, height, width = request.param
    folder = tmp_path_factory.mktemp("release")
    oracle(SAVE, scale, height, width, folder, version=release)
    outputs = torch.load(folder / "outputs.pt", weights_only=True)
    return Saved(folder=folder, release=release, scale=scale, **outputs)


# --- outputs


@pytest.mark.parametrize(
    "file_name", ["best.pt", "last.pt", "protocol4.pt", "whole.pt", "state.pt"]
)
def test_a_file_gives_what_its_release_gives(saved: Saved, file_name: str) -> None:
    path = saved.folder / file_name
    names = weights.read(saved.folder / "best.pt").names
    assert len(names) == 80
    assert names[0] == "person"
    source: dict[str, Any] = {"path": str(path)}
    if file_name == "state.pt":  # which says neither
        source |= {"names": names, "sppf_act": saved.fresh["act"] == "SiLU"}
    elif file_name != "whole.pt":
        assert weights.read(path).version == saved.version

    model = YOLO11(names, saved.scale, weights=source).eval()
    with torch.no_grad():
        boxes_xyxy, scores = decode_maps(model(saved.images))
    boxes = boxes_cxcywh(boxes_xyxy).mT
    witness_outputs("boxes", boxes, saved.decoded[:, :4], saved.oracle)
    witness_outputs("scores", scores.mT, saved.decoded[:, 4:], saved.oracle)


def boxes_cxcywh(boxes_xyxy: Tensor) -> Tensor:
    low = boxes_xyxy[..., :2]
    high = boxes_xyxy[..., 2:]
    return torch.cat([(low + high) / 2, high - low], -1)


def witness_outputs(what: str, ours: Tensor, theirs: Tensor, against: str) -> None:
    difference = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    row = f"Files of other releases: decoded {what}, relative"
    witness(row, against, difference, 1e-4, len(theirs))


# --- the model as first made


def test_the_default_is_that_of_8_3(saved: Saved) -> None:
    if not saved.release.startswith("8.3"):
        pytest.skip("8.4 builds SPPF and the biases of the head otherwise")
    model = YOLO11([str(k) for k in range(80)], saved.scale)
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    act = model.get_submodule("model.9.cv1.act")
    assert shapes == saved.fresh["keys"]
    assert sorted({norm.eps for norm in norms}) == saved.fresh["eps"]
    assert sorted({norm.momentum for norm in norms}) == saved.fresh["momentum"]
    assert type(act).__name__ == saved.fresh["act"] == "SiLU"

    head = model.get_submodule("model.23")
    for branch, biases in zip((head.cv2, head.cv3), saved.fresh["bias"], strict=True):
        for level, theirs in zip(branch, biases, strict=True):
            difference = (level[-1].bias.detach() - theirs).abs().max()
            witness("Model: first biases of the head", saved.oracle, difference, 1e-6)


# --- class rows

SYNONYMS = {
    "aeroplane": "airplane",
    "diningtable": "dining table",
    "motorbike": "motorcycle",
    "pottedplant": "potted plant",
    "sofa": "couch",
    "tvmonitor": "tv",
}


def test_class_rows_are_carried_over_one_by_one(saved: Saved) -> None:
    path = saved.folder / "best.pt"
    file = weights.read(path)
    source = {"path": str(path), "classes": "by_name"}
    state = YOLO11(VOC_NAMES, saved.scale, weights=source).state_dict()
    rows = 0
    for key, tensor in state.items():
        if not has_class_rows(key):
            assert torch.equal(tensor, file.state[key]), key
            continue
        for label, name in enumerate(VOC_NAMES):
            row = file.names.index(SYNONYMS.get(name, name))
            difference = (tensor[label] - file.state[key][row]).abs().max()
            witness(
                "Model: class rows carried from COCO to VOC",
                f"rows of the file of {saved.version}",
                difference,
                0.0,
            )
            rows += 1
    assert rows == 20 * 6


def has_class_rows(key: str) -> bool:
    """Whether it is in the last convolution of a class branch: model.23.cv3.N.2."""
    parts = key.split(".")
    return parts[:3] == ["model", "23", "cv3"] and parts[4] == "2"
