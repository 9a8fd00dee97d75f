"""The same photographs and weights give the same detections as the reference's predictor, in
pixels of the files.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from oracle import oracle
from witness import witness

from kdmini.data.layout import letterbox
from kdmini.data.loader import ValLoader
from kdmini.data.pictures import shrink
from kdmini.data.store import Store
from kdmini.detection.voc import VOC, VOC_NAMES
from kdmini.detection.yolo11.model import YOLO11
from tests.conftest import ROOT

pytestmark = pytest.mark.parity

AGAINST = "ultralytics 8.3.250"
PHOTOGRAPHS = ROOT / ".." / "shared" / "data" / "voc-original"
SIDE = 320
SCORE = 0.001
IOU = 0.7
MAX_DET = 300

# argv: folder, side, photographs. Writes folder/model.pt as the trainer does, and
# folder/found.pt.
PREDICT = """
import sys
from pathlib import Path
from types import SimpleNamespace
import cv2, torch, torchvision
from ultralytics import __version__
from ultralytics.data.augment import LetterBox
from ultralytics.engine.predictor import BasePredictor
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils.nms import non_max_suppression
from ultralytics.utils.ops import scale_boxes

folder, side = Path(sys.argv[1]), int(sys.argv[2])
torch.manual_seed(0)
model = DetectionModel("yolo11n.yaml", nc=20, verbose=False)
model.names = {k: f"class {k}" for k in range(20)}
files = [cv2.imread(path) for path in sys.argv[3:]]
shape = LetterBox((side, side), auto=False)
predictor = SimpleNamespace(device="cpu", model=SimpleNamespace(fp16=False))
predictor.pre_transform = lambda images: [shape(image=image) for image in images]
images = BasePredictor.preprocess(predictor, files)
for module in model.modules():
    if isinstance(module, torch.nn.BatchNorm2d):
        module.momentum = 1.0  # statistics of a few photographs keep every layer alive
with torch.no_grad():
    model.train()(images[:8])
for boxes, classes in zip(model.model[-1].cv2, model.model[-1].cv3):
    torch.nn.init.normal_(boxes[-1].weight, 0, 0.3)
    torch.nn.init.normal_(classes[-1].weight, 0, 0.1)
    torch.nn.init.normal_(classes[-1].bias, -8.7, 1)
about = {"date": "", "version": __version__, "license": "AGPL-3.0", "docs": "", "train_args": {}}
state = {"epoch": -1, "best_fitness": None, "updates": None, "optimizer": None}
torch.save({**about, **state, "model": model.half(), "ema": None}, folder / "model.pt")
model.float().eval()
with torch.no_grad():
    output = model(images)[0]
    candidates = (output[:, 4:] > 0.001).sum((1, 2))
    # in float32 the offset of 7,680 pixels a class rounds boxes to 1/128, and IoU by 1e-5
    output = output.double()
    placed = non_max_suppression(output, 0.001, 0.7, multi_label=True, max_det=300)
native = [found.clone() for found in placed]
for found, file in zip(native, files):
    scale_boxes((side, side), found[:, :4], file.shape)
found = {"images": images, "placed": placed, "native": native, "candidates": candidates}
torch.save(found, folder / "found.pt")
"""

# argv: folder. For each size in folder/sizes.pt, where a white picture of it comes to lie.
PLACE = """
import sys
import numpy as np, torch
from ultralytics.data.augment import LetterBox
sizes, side = torch.load(sys.argv[1] + "/sizes.pt", weights_only=True)
shape, found = LetterBox((side, side), auto=False), []
for width, height in sizes.tolist():
    lit = shape(image=np.full((height, width, 3), 255, np.uint8))[..., 0] == 255
    x, y = lit.any(0).nonzero()[0], lit.any(1).nonzero()[0]
    found.append([x[0], y[0], x[-1] + 1, y[-1] + 1])
torch.save(torch.tensor(np.array(found)), sys.argv[1] + "/found.pt")
"""


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the reference found in the photographs, and kdmini's detector and loader of the same."""
    if not PHOTOGRAPHS.is_dir():
        pytest.skip(f"no photographs in {PHOTOGRAPHS}")
    folder = tmp_path_factory.mktemp("predictor")
    dataset = VOC(str(PHOTOGRAPHS), ["all"])
    store = Store(dataset, SIDE, workers=1)
    [(images, targets, to_file)] = ValLoader(store, batch=len(dataset))
    names = [target["id"].split("/")[-1] for target in targets]
    files = [PHOTOGRAPHS / "JPEGImages" / f"{name}.jpg" for name in names]
    assert len(files) > 30
    assert all(file.is_file() for file in files)

    oracle(PREDICT, folder, SIDE, *files)
    weights = {"path": str(folder / "model.pt"), "classes": "keep"}
    return {
        "model": YOLO11(VOC_NAMES, "n", weights=weights).eval(),
        "ours": images,
        "to_file": to_file,
        "sizes": store.native,
        **torch.load(folder / "found.pt", weights_only=True),
    }


def test_detections_of_the_same_pixels(both: dict[str, Any]) -> None:
    placed = both["placed"]
    assert min(map(len, placed)) > 0
    assert min(map(len, placed)) < MAX_DET
    assert 1000 < both["candidates"].max() < 30_000
    with torch.no_grad():
        preds = both["model"](both["images"])
        found = both["model"].decode(preds, SCORE, IOU, MAX_DET)

    boxes = []
    scores = []
    for ours, theirs in zip(found, placed, strict=True):
        # paired by place and class, for scores that differ by rounding alone may change places
        apart = torch.cdist(ours["boxes_xyxy"].double(), theirs[:, :4], p=torch.inf)
        apart += 1e6 * (ours["labels"][:, None] != theirs[:, 5])
        distance, match = apart.min(1)
        assert torch.equal(match.sort().values, torch.arange(len(theirs)))
        boxes.append(distance.max().item())
        ratios = ours["scores"] / theirs[match, 4]
        scores.append((ratios - 1).abs().max().item())
    cases = sum(map(len, placed))
    witness("Detections of photographs: boxes, pixels", AGAINST, max(boxes), 1e-3, cases)
    witness("Detections of photographs: scores, relative", AGAINST, max(scores), 1e-4, cases)


def test_the_way_back_to_the_files(both: dict[str, Any]) -> None:
    """The reference divides both sides by one ratio, kdmini each by its own, for the sides
    were rounded to pixels: up to half a pixel of the letterbox apart, and one more where the
    rounding moves the reference's corner.
    """
    given = []
    for rows in both["placed"]:
        given.append({"boxes_xyxy": rows[:, :4], "scores": rows[:, 4], "labels": rows[:, 5]})
    exact: list[float] = []  # where both sides are whole pixels of the letterbox
    rounded: list[float] = []
    images = zip(both["to_file"](given), both["native"], both["sizes"], strict=True)
    for ours, theirs, (height, width) in images:
        ratio = max(width, height) / SIDE
        difference = (ours["boxes_xyxy"] - theirs[:, :4]).abs().max().item() / ratio
        whole = (width / ratio).is_integer() and (height / ratio).is_integer()
        (exact if whole else rounded).append(difference)
    what = "Detections of photographs: mapped back, pixels of the letterbox"
    witness(f"{what}, sides that divide", AGAINST, max(exact), 1e-3, len(exact))
    witness(f"{what}, others", AGAINST, max(rounded), 1.5, len(rounded))


def test_pixels(both: dict[str, Any]) -> None:
    """Another interpolation: kdmini averages where it reduces, the reference does not."""
    grey = 255 * (both["ours"] - both["images"]).abs()
    means = grey.mean((1, 2, 3))
    what = "Letterbox of photographs: mean over an image, grey levels"
    witness(what, AGAINST, means.max().item(), 5, len(means))


def test_where_pictures_are_placed(tmp_path: Path) -> None:
    sizes = np.random.default_rng(0).integers(20, 700, (300, 2))  # width, height
    torch.save((torch.from_numpy(sizes), SIDE), tmp_path / "sizes.pt")
    oracle(PLACE, tmp_path)
    theirs = torch.load(tmp_path / "found.pt", weights_only=True).numpy()
    margins = theirs[:, :2] + SIDE - theirs[:, 2:]
    assert (margins % 2).any()  # odd ones too

    pictures = [np.empty((height, width, 3), np.uint8) for width, height in sizes]
    stored = np.array([shrink(picture, SIDE).shape[:2] for picture in pictures])
    store: Any = SimpleNamespace(sizes=stored)
    layout = letterbox(store, np.arange(len(sizes)), SIDE)
    low = layout.b[:, 0]
    high = low + layout.a[:, 0] * stored[:, ::-1]
    difference = np.abs(np.concatenate([low, high], 1) - theirs).max()
    witness("Letterbox: corners, pixels", AGAINST, difference, 1e-9, len(sizes))
