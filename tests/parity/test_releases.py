"""Files of several releases, stripped and from mid-training, give the outputs of the release that
saved them.
"""

from pathlib import Path

import pytest
import torch
from oracle import oracle
from torch import nn
from witness import witness

from kdmini.detection.voc import VOC_NAMES
from kdmini.detection.yolo11 import weights
from kdmini.detection.yolo11.model import YOLO11, decode_maps

pytestmark = pytest.mark.parity

# argv: scale, height, width, folder. Writes best.pt (stripped), last.pt (mid-training) and
# found.pt.
SAVE = """
import sys
from copy import deepcopy
from pathlib import Path
import torch
from ultralytics import __version__
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils import ROOT
import yaml

scale, height, width, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
torch.manual_seed(1)
model = DetectionModel(f"yolo11{scale}.yaml", nc=80, verbose=False)
model.names = yaml.safe_load((ROOT / "cfg/datasets/coco.yaml").read_text())["names"]
fresh = {"keys": {k: tuple(v.shape) for k, v in model.state_dict().items()},
         "bias": [[b[-1].bias.detach().clone() for b in getattr(model.model[-1], name)] for name in ("cv2", "cv3")],
         "eps": sorted({m.eps for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)}),
         "momentum": sorted({m.momentum for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)}),
         "act": type(model.model[9].cv1.act).__name__}
norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
for norm in norms:
    norm.momentum = 1.0
with torch.no_grad():  # statistics of a batch: with random ones the deep layers die out, and nothing there is compared
    model.train()(torch.rand(8, 3, 128, 128))
for norm in norms:
    norm.momentum = 0.03
for branch in model.model[-1].cv3:
    torch.nn.init.normal_(branch[-1].bias, -2)
model = model.half().float()
common = {"date": "", "version": __version__, "license": "AGPL-3.0", "docs": "", "best_fitness": None, "train_args": {}}
torch.save({**common, "epoch": -1, "model": deepcopy(model).half(), "ema": None, "updates": None, "optimizer": None},
           folder / "best.pt")
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
broken = deepcopy(model).half()
torch.nn.init.zeros_(broken.model[0].conv.weight)  # what is evaluated is `ema`, not `model`
torch.save({**common, "epoch": 3, "model": broken, "ema": deepcopy(model).half(), "updates": 7,
            "optimizer": optimizer.state_dict()}, folder / "last.pt")
model.eval()
images = torch.rand(2, 3, height, width)
with torch.no_grad():
    decoded = model(images)[0]
torch.save({"fresh": fresh, "images": images, "decoded": decoded, "version": __version__}, folder / "found.pt")
"""

CASES = [
    ("8.3.0", "s", 320, 320),
    ("8.3.250", "m", 320, 192),
    ("8.3.250", "n", 640, 640),
    ("8.4.0", "n", 128, 160),
    ("newest", "s", 160, 128),
]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(map(str, case)))
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict:
    version, scale, height, width = request.param
    folder = tmp_path_factory.mktemp("release")
    oracle(SAVE, scale, height, width, folder, version=version)
    found = torch.load(folder / "found.pt", weights_only=True)
    return {**found, "folder": folder, "scale": scale, "release": version}


@pytest.mark.parametrize("file", ["best.pt", "last.pt"])
def test_a_file_gives_what_its_release_gives(saved: dict, file: str) -> None:
    path = saved["folder"] / file
    read = weights.read(path)
    assert read.version == saved["version"] and read.names[0] == "person" and len(read.names) == 80
    model = YOLO11(read.names, saved["scale"], weights=str(path)).eval()
    with torch.no_grad():
        boxes, scores = decode_maps(model(saved["images"]))
    sides = boxes[..., 2:] - boxes[..., :2]
    ours = torch.cat([(boxes[..., :2] + boxes[..., 2:]) / 2, sides, scores], -1).mT
    against = f"ultralytics {saved['version']}"
    for what, rows in (("boxes", slice(0, 4)), ("scores", slice(4, None))):
        theirs = saved["decoded"][:, rows]
        difference = ((ours[:, rows] - theirs).abs().max() / theirs.abs().max()).item()
        witness(
            f"Files of other releases: decoded {what}, relative",
            against,
            difference,
            1e-4,
            len(theirs),
        )


def test_the_default_is_that_of_8_3(saved: dict) -> None:
    if not saved["release"].startswith("8.3"):
        pytest.skip("8.4 builds SPPF and the biases of the head otherwise")
    model = YOLO11([str(i) for i in range(80)], saved["scale"])
    fresh = saved["fresh"]
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == fresh["keys"]
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert sorted({module.eps for module in norms}) == fresh["eps"]
    assert sorted({module.momentum for module in norms}) == fresh["momentum"]
    assert type(model.get_submodule("model.9.cv1.act")).__name__ == fresh["act"] == "SiLU"
    head = model.get_submodule("model.23")
    for branch, theirs in zip((head.cv2, head.cv3), fresh["bias"], strict=True):
        for level, bias in zip(branch, theirs, strict=True):
            difference = (level[-1].bias.detach() - bias).abs().max()
            witness(
                "Model: first biases of the head",
                f"ultralytics {saved['version']}",
                difference,
                1e-6,
            )


def test_class_rows_are_carried_over_one_by_one(saved: dict) -> None:
    if saved["scale"] == "n":
        pytest.skip("the class branch of n changes its width: nothing is carried over")
    synonym = {
        "aeroplane": "airplane", "diningtable": "dining table", "motorbike": "motorcycle",
        "pottedplant": "potted plant", "sofa": "couch", "tvmonitor": "tv",
    }  # fmt: skip
    path = Path(saved["folder"] / "best.pt")
    file = weights.read(path)
    ours = YOLO11(
        VOC_NAMES, saved["scale"], weights={"path": str(path), "classes": "by_name"}
    ).state_dict()
    rows = 0
    for key, value in ours.items():
        if key.startswith("model.23.cv3") and ".2." in key and key.split(".")[4] == "2":
            for label, name in enumerate(VOC_NAMES):
                row = file.names.index(synonym.get(name, name))
                witness("Model: class rows carried from COCO to VOC", f"rows of the file of {saved['version']}",
                        (value[label] - file.state[key][row]).abs().max(), 0.0)  # fmt: skip
                rows += 1
        else:
            assert torch.equal(value, file.state[key]), key
    assert rows == 20 * 6
