"""The same weights give the reference's maps, boxes, losses and gradients."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from oracle import oracle
from torch import Tensor, nn
from witness import witness

from kdmini.detection.boxes import select
from kdmini.detection.yolo11.model import YOLO11, decode_maps

pytestmark = pytest.mark.parity

AGAINST = "ultralytics 8.3.250"
TAPS = (6, 8, 13, 16, 19, 22)
PAIRS = [(scale, classes) for scale in ("n", "s", "m") for classes in (80, 20)]
HEIGHT = 128  # pixels
WIDTH = 160

# argv: scale, classes, folder. Reads folder/given.pt, writes folder/model.pt as the trainer
# does, and folder/found.pt.
RUN = """
import sys
from pathlib import Path
from types import SimpleNamespace
import torch
from ultralytics import __version__
from ultralytics.nn.tasks import DetectionModel

scale, classes, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
given = torch.load(folder / "given.pt", weights_only=True)
torch.manual_seed(classes)
model = DetectionModel(f"yolo11{scale}.yaml", nc=classes, verbose=False)
model.names = {k: f"class {k}" for k in range(classes)}
norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
for norm in norms:
    norm.momentum = 1.0
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    torch.nn.init.normal_(norm.bias, 0, 0.1)
# statistics of a batch: with random ones the deep layers die out, and compare nothing
with torch.no_grad():
    model.train()(torch.rand(8, 3, 128, 128))
for norm in norms:
    norm.momentum = 0.03
# as far as from the start of training as the rest, so that classes count
for branch in model.model[-1].cv3:
    torch.nn.init.normal_(branch[-1].bias, -2)
torch.save({
    "date": "", "version": __version__, "license": "AGPL-3.0", "docs": "", "epoch": -1,
    "best_fitness": None, "model": model.half(), "ema": None, "updates": None,
    "optimizer": None, "train_args": {},
}, folder / "model.pt")
model.float()

found = {}
def keep(name):
    return lambda module, args, output: found.__setitem__(name, output.detach().clone())
handles = [
    model.model[i].register_forward_hook(keep(f"tap {i}")) for i in (6, 8, 13, 16, 19, 22)
]
model.eval()
with torch.no_grad():
    found["decoded"], maps = model(given["images"])
for handle in handles:
    handle.remove()
found |= {f"map {i}": level for i, level in enumerate(maps)}

model.train()
model.args = SimpleNamespace(box=7.5, cls=0.5, dfl=1.5)
maps = model(given["images"])
found |= {f"training map {i}": level.detach().clone() for i, level in enumerate(maps)}
total, items = model.init_criterion()(maps, {k: given[k] for k in ("batch_idx", "cls", "bboxes")})
total.sum().backward()
found |= {f"loss {name}": value for name, value in zip(("box", "cls", "dfl"), items)}
found |= {f"grad {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
found |= {f"buffer {name}": b for name, b in model.named_buffers()}
torch.save(found, folder / "found.pt")
"""

SCENES = {  # corners in pixels, and the class
    "crowded": [
        [10, 10, 70, 60, 0],
        [14, 12, 74, 66, 0],
        [8, 20, 66, 70, 5],
        [60, 30, 150, 120, 3],
        [64, 40, 140, 110, 7],
        [20, 70, 60, 125, 19],
        [90, 4, 156, 40, 2],
        [100, 8, 130, 32, 2],
        [40, 40, 110, 90, 11],
        [5, 5, 155, 123, 1],
    ],
    "empty": [],
    "single": [
        [33.25, 20.5, 120.75, 101.5, 4],
    ],
    "tiny": [
        [40, 40, 42, 43, 6],
        [99.5, 63.25, 104, 69, 8],
        [120, 20, 120.5, 20.5, 8],
        [75, 3, 77, 119, 9],
    ],
    "duplicate": [
        [20, 20, 90, 100, 10],
        [20, 20, 90, 100, 10],
        [20, 20, 90, 100, 12],
        [100, 50, 140, 90, 10],
    ],
    "border": [
        [0, 0, 160, 128, 13],
        [0, 0, 24, 20, 14],
        [136, 100, 160, 128, 15],
        [0, 60, 160, 70, 16],
    ],
}


def class_names(count: int) -> list[str]:
    return [f"class {i}" for i in range(count)]


def rows_of_scenes() -> dict[str, Tensor]:
    """The objects in the reference's form: one row each, in shares of the sides."""
    rows = []
    for image, objects in enumerate(SCENES.values()):
        rows += [[image, *item] for item in objects]
    table = torch.tensor(rows)
    left_top = table[:, 1:3]
    right_bottom = table[:, 3:5]
    xywh = torch.cat([(left_top + right_bottom) / 2, right_bottom - left_top], 1)
    return {
        "batch_idx": table[:, 0],
        "cls": table[:, 5:],
        "bboxes": xywh / torch.tensor([WIDTH, HEIGHT, WIDTH, HEIGHT]),
    }


def targets_of_scenes() -> Any:
    """The same in ours: padded."""
    most = max(len(objects) for objects in SCENES.values())
    boxes_xyxy = torch.zeros(len(SCENES), most, 4)
    labels = torch.full((len(SCENES), most), -1)
    for n, objects in enumerate(SCENES.values()):
        for g, (*box, label) in enumerate(objects):
            boxes_xyxy[n, g] = torch.tensor(box)
            labels[n, g] = label
    return {"boxes_xyxy": boxes_xyxy, "labels": labels}


class Both(NamedTuple):
    model: YOLO11  # loaded from the reference's file
    found: dict[str, Tensor]  # by the reference
    images: Tensor
    targets: Any


@pytest.fixture(scope="module", params=PAIRS, ids=lambda pair: f"{pair[0]}{pair[1]}")
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Both:
    scale, classes = request.param
    folder = tmp_path_factory.mktemp("parity")
    torch.manual_seed(0)
    images = torch.rand(len(SCENES), 3, HEIGHT, WIDTH)
    torch.save({"images": images, **rows_of_scenes()}, folder / "given.pt")
    oracle(RUN, scale, classes, folder)
    return Both(
        model=YOLO11(class_names(classes), scale, weights=str(folder / "model.pt")),
        found=torch.load(folder / "found.pt", weights_only=True),
        images=images,
        targets=targets_of_scenes(),
    )


def assert_close(ours: Tensor, theirs: Tensor, what: str) -> None:
    """The largest difference, against the largest value."""
    assert ours.shape == theirs.shape, what
    difference = (ours - theirs).detach().abs().max() / theirs.abs().max()
    witness(f"Model: {what}, relative", AGAINST, difference, 1e-4)


def xyxy_to_xywh(boxes_xyxy: Tensor) -> Tensor:
    left_top, right_bottom = boxes_xyxy.chunk(2, -1)
    return torch.cat([(left_top + right_bottom) / 2, right_bottom - left_top], -1)


def test_maps_and_taps(both: Both) -> None:
    model = both.model.eval()
    feats: dict[int, Tensor] = {}
    handles = []
    for tap in TAPS:
        layer = model.get_submodule(f"model.{tap}")
        handles.append(
            layer.register_forward_hook(lambda m, args, out, tap=tap: feats.update({tap: out}))
        )
    with torch.no_grad():
        preds = model(both.images)
    for handle in handles:
        handle.remove()
    for level, ours in enumerate(preds):
        assert_close(ours, both.found[f"map {level}"], "maps")
    for tap in TAPS:
        assert_close(feats[tap], both.found[f"tap {tap}"], "taps")


def test_boxes_and_scores(both: Both) -> None:
    with torch.no_grad():
        boxes_xyxy, scores = decode_maps(both.model.eval()(both.images))
    theirs = both.found["decoded"].mT
    assert_close(xyxy_to_xywh(boxes_xyxy), theirs[..., :4], "decoded boxes")
    assert_close(scores, theirs[..., 4:], "scores")
    assert scores.max() > 0.2  # classes are alive


def test_training_maps_losses_gradients_and_statistics(both: Both) -> None:
    model = both.model.train()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    preds = model(both.images)
    for level, ours in enumerate(preds):
        assert_close(ours, both.found[f"training map {level}"], "training maps")
    for name, buffer in model.named_buffers():
        if name.endswith("num_batches_tracked"):
            continue  # nothing reads it, and ours stays as the file has it
        theirs = both.found[f"buffer {name}"].float()
        assert_close(buffer.float(), theirs, "BatchNorm statistics")

    losses = model.loss(preds, both.targets)
    for name, value in losses.items():
        theirs = both.found[f"loss {name}"]
        difference = (value.detach() - theirs).abs() / theirs
        witness("Detection loss: components, relative", AGAINST, difference, 1e-4)
        assert value > 0.1, name

    model.zero_grad()
    total = torch.stack(list(losses.values())).sum()
    (len(both.images) * total).backward()
    compare_gradients(model, both.found)
    model.load_state_dict(state)  # the statistics have moved


def compare_gradients(model: YOLO11, found: dict[str, Tensor]) -> None:
    ours = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    theirs = {
        key.removeprefix("grad "): value for key, value in found.items() if key.startswith("grad ")
    }
    assert ours.keys() == theirs.keys()
    whole = torch.stack([value.norm() for value in theirs.values()]).norm()
    for name, value in theirs.items():
        # the floor is for a bias before a BatchNorm, say, whose gradient is all rounding
        floor = torch.maximum(value.norm(), 1e-4 * whole)
        difference = (ours[name] - value).norm() / floor
        witness("Detection loss: gradients times N, relative", AGAINST, difference, 1e-4)


# argv: scale, classes, folder. Reads folder/given.pt, writes folder/found.pt.
LOAD = """
import sys
from pathlib import Path
import torch
from ultralytics.nn.tasks import DetectionModel

scale, classes, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
given = torch.load(folder / "given.pt", weights_only=True)
model = DetectionModel(f"yolo11{scale}.yaml", nc=classes, verbose=False).eval()
print(model.load_state_dict(given["state"], strict=True))
with torch.no_grad():
    torch.save(model(given["images"])[1], folder / "found.pt")
"""


@pytest.mark.parametrize(("scale", "classes"), PAIRS)
def test_a_trained_student_loads_back(tmp_path: Path, scale: str, classes: int) -> None:
    torch.manual_seed(1)
    model = YOLO11(class_names(classes), scale)
    images = torch.rand(2, 3, 96, 64)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.5
    with torch.no_grad():
        model.train()(images)
        preds = model.eval()(images)
    torch.save({"state": model.state_dict(), "images": images}, tmp_path / "given.pt")
    assert "All keys matched" in oracle(LOAD, scale, classes, tmp_path)
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    for ours, theirs in zip(preds, found, strict=True):
        assert_close(ours, theirs, "maps")


# argv: folder. Reads folder/given.pt, writes folder/found.pt.
NMS = """
import sys
import torch
from ultralytics.utils.nms import non_max_suppression

preds, score, iou, most = torch.load(sys.argv[1] + "/given.pt", weights_only=True)
found = non_max_suppression(preds, score, iou, multi_label=True, max_det=most)
torch.save(found, sys.argv[1] + "/found.pt")
"""


@pytest.mark.parametrize(("score", "iou", "most"), [(0.001, 0.7, 300), (0.5, 0.3, 40)])
def test_nms(tmp_path: Path, score: float, iou: float, most: int) -> None:
    torch.manual_seed(2)
    centres = torch.rand(2, 400, 2) * 300
    sides = torch.rand(2, 400, 2) * 90 + 5
    boxes_xyxy = torch.cat([centres - sides / 2, centres + sides / 2], -1)
    scores = torch.rand(2, 400, 6) ** 3
    preds = torch.cat([centres, sides, scores], -1).mT
    torch.save((preds, score, iou, most), tmp_path / "given.pt")
    oracle(NMS, tmp_path)
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    for image, theirs in enumerate(found):
        ours = select(boxes_xyxy[image], scores[image], score, iou, most)
        assert 20 < len(theirs) <= most
        assert torch.allclose(ours["boxes_xyxy"], theirs[:, :4], atol=1e-3)
        assert torch.equal(ours["scores"], theirs[:, 4])
        assert torch.equal(ours["labels"], theirs[:, 5].long())
