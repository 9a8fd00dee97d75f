"""An exported state_dict loads strictly into the reference implementation, and gives the
same outputs there; an exported model of another form, the same detections.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import oracle
from PIL import Image
from torch import Tensor, nn
from witness import witness

from kdmini.checkpoint import save_best
from kdmini.detection.yolo11.model import YOLO11, decode_maps
from kdmini.tools.export import How, export
from kdmini.tools.load import load_detector

pytestmark = pytest.mark.parity

CLOSE = 1e-5  # to the largest output: maps of float64, decoded in float32

# argv: scale, classes, folder. The file is read by the format's own package.
RUN = """
import sys
from pathlib import Path
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from ultralytics import __version__
from ultralytics.nn.tasks import DetectionModel

scale, classes, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
model = DetectionModel(f"yolo11{scale}.yaml", nc=classes, verbose=False).eval()
model.load_state_dict(load_file(folder / "best.safetensors"), strict=True)
model.double()
with torch.no_grad():
    decoded = model(torch.load(folder / "images.pt", weights_only=True))[0]
with safe_open(folder / "best.safetensors", "pt") as file:
    about = file.metadata()
torch.save({"decoded": decoded, "version": __version__, "about": about}, folder / "found.pt")
"""


def lively(classes: int, scale: str) -> YOLO11:
    """A detector in which every layer matters: with random BatchNorm statistics the deep ones
    die out, so its own are those of a batch.
    """
    torch.manual_seed(classes)
    model = YOLO11([f"class {k}" for k in range(classes)], scale)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
    with torch.no_grad():
        model.train()(torch.rand(8, 3, 128, 128))
    for level in range(3):
        nn.init.normal_(model.get_parameter(f"model.23.cv3.{level}.2.bias"), -2)
    return model


def decoded(model: YOLO11, images: Tensor) -> Tensor:
    """As the reference has it: (N, 4 + K, A) with centres and sides.

    Maps are of float64, as the reference's are: so many layers of random weights enlarge the
    last bit of a float32, which is another on every processor, to 2e-3 of the output.
    """
    with torch.no_grad():
        boxes_xyxy, scores = decode_maps(model.eval().double()(images))
    low, high = boxes_xyxy.chunk(2, -1)
    return torch.cat([(low + high) / 2, high - low, scores], -1).mT


@pytest.mark.parametrize(
    "release, scale, classes", [("8.3.250", "n", 20), ("8.3.250", "s", 80), ("newest", "m", 20)]
)
def test_the_exported_state_gives_the_same_outputs_there(
    tmp_path: Path, release: str, scale: str, classes: int
) -> None:
    pytest.importorskip("safetensors", reason="kdmini[parity] is not installed")
    model = lively(classes, scale)
    save_best(tmp_path / "best.pt", model, 128, 0, 0.5)
    export(str(tmp_path / "best.pt"), "safetensors")
    images = torch.rand(2, 3, 128, 160, dtype=torch.float64)
    torch.save(images, tmp_path / "images.pt")
    oracle(RUN, scale, classes, tmp_path, version=release)

    found = torch.load(tmp_path / "found.pt", weights_only=True)
    ours = decoded(model, images)
    against = f"ultralytics {found['version']}"
    for kind, rows in (("boxes", slice(0, 4)), ("scores", slice(4, None))):
        theirs = found["decoded"][:, rows]
        difference = (ours[:, rows] - theirs).abs().max() / theirs.abs().max()
        what = f"Exported state_dict: decoded {kind}, relative"
        witness(what, against, difference, CLOSE, len(images))
    assert found["about"]["scale"] == scale
    assert found["about"]["imgsz"] == "128"


# --- files that it opens

SIDE = 128
LIMIT = SIDE * 1e-4  # pixels

# argv: folder, name of a file in it, side, least score. Predicts folder/image.png; nothing is
# suppressed, for boxes that overlap by nearly the limit may go either way.
PREDICT = """
import sys
import cv2, torch
from ultralytics import YOLO, __version__

folder, name, side, conf = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
model = YOLO(folder + "/" + name, task="detect")
settings = dict(imgsz=side, conf=conf, iou=1.0, max_det=1000, verbose=False)
(result,) = model.predict(cv2.imread(folder + "/image.png"), **settings)
found = {"rows": result.boxes.data.cpu(), "names": result.names, "version": __version__}
torch.save(found, folder + "/found.pt")
"""

# file -> what a witness calls it, and the bounds of boxes in pixels, and of scores
FILES = {
    "best.onnx": ("Exported ONNX", 0.05, 1e-3),
    "nms.onnx": ("Exported ONNX with NMS", 0.05, 1e-3),
    "best.torchscript": ("Exported TorchScript", LIMIT, 1e-4),
    "best_ultralytics.pt": ("Exported to ultralytics", LIMIT, 1e-4),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With FILES, the best.pt that they are from, and image.png."""
    pytest.importorskip("onnxscript", reason="kdmini[export] is not installed")
    pytest.importorskip("onnxruntime", reason="kdmini[export] is not installed")
    folder = tmp_path_factory.mktemp("exported")
    save_best(folder / "best.pt", lively(6, "n"), SIDE, 0, 0.5)
    for to in ("onnx", "torchscript", "ultralytics"):
        export(str(folder / "best.pt"), to)
    suppressed = How(nms=True, iou=1.0)
    export(str(folder / "best.pt"), "onnx", folder / "nms.onnx", how=suppressed)
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "image.png")
    return folder


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("release", ["8.3.0", "8.3.250", "8.4.0", "newest"])
def test_an_exported_file_gives_the_same_detections_there(
    folder: Path, release: str, name: str
) -> None:
    model, _ = load_detector(folder / "best.pt")
    pixels = torch.from_numpy(np.array(Image.open(folder / "image.png")))
    with torch.no_grad():
        boxes_xyxy, scores = decode_maps(model(pixels.permute(2, 0, 1)[None] / 255))
    best, labels = scores[0].max(1)  # (A,)
    ranked = best.sort(descending=True).values[20:200]
    gap = int((ranked[:-1] - ranked[1:]).argmax())
    conf = float(ranked[gap : gap + 2].mean())  # between two scores, far from both
    oracle(PREDICT, folder, name, SIDE, conf, version=release)

    found = torch.load(folder / "found.pt", weights_only=True)
    assert found["names"] == dict(enumerate(model.names))
    theirs = found["rows"]
    ours = torch.cat([boxes_xyxy[0].clamp(0, SIDE), best[:, None], labels[:, None]], 1)
    ours = ours[best > conf]
    assert len(ours) == len(theirs) > 20
    # a class counts like a thousand pixels, a score like a hundred
    weight = torch.tensor([1, 1, 1, 1, 100, 1000])
    match = torch.cdist(ours * weight, theirs * weight, p=torch.inf).argmin(1)
    assert torch.equal(match.sort().values, torch.arange(len(theirs)))
    off = (ours - theirs[match]).abs().amax(0)
    assert off[5] == 0
    against = f"ultralytics {found['version']}"
    what, box_limit, score_limit = FILES[name]
    witness(f"{what}: boxes of detections, pixels", against, off[:4].max(), box_limit, len(ours))
    witness(f"{what}: scores of detections", against, off[4], score_limit, len(ours))


# argv: file, folder. What its trainer does with a file: a model is built of the description in
# it, and the tensors are put into that.
REBUILD = """
import inspect, sys
import torch
from ultralytics import YOLO, __version__
from ultralytics.nn import tasks

path, folder = sys.argv[1:]
if "safe_only" in inspect.signature(tasks.torch_safe_load).parameters:
    tasks.torch_safe_load(path, safe_only=True)
model = YOLO(path).model.eval().double()
again = tasks.DetectionModel(model.yaml, nc=len(model.names), verbose=False).eval().double()
again.load_state_dict(model.state_dict(), strict=True)
images = torch.load(folder + "/images.pt", weights_only=True)
with torch.no_grad():
    decoded = {"file": model(images)[0], "rebuilt": again(images)[0]}
torch.save({"decoded": decoded, "version": __version__}, folder + "/found.pt")
"""


@pytest.mark.parametrize("release, scale", [("8.3.0", "n"), ("8.3.250", "m"), ("newest", "l")])
def test_the_file_of_ultralytics_can_be_trained_there(
    tmp_path: Path, release: str, scale: str
) -> None:
    model = lively(3, scale)
    save_best(tmp_path / "best.pt", model, SIDE, 0, 0.5)
    path = export(str(tmp_path / "best.pt"), "ultralytics")
    images = torch.rand(2, 3, 128, 160, dtype=torch.float64)
    torch.save(images, tmp_path / "images.pt")
    oracle(REBUILD, path, tmp_path, version=release)

    found = torch.load(tmp_path / "found.pt", weights_only=True)
    ours = decoded(model, images)
    for which, theirs in found["decoded"].items():
        difference = (ours - theirs).abs().amax((0, 2)) / theirs.abs().amax((0, 2))
        what = f"Exported to ultralytics: decoded by the model {which}, relative"
        against = f"ultralytics {found['version']}"
        witness(what, against, difference.max(), CLOSE, len(images))


def test_a_wide_class_branch_without_silu_is_the_same_there(tmp_path: Path) -> None:
    """As a YOLO11n has it that began from the public file of 80 classes."""
    model = lively(80, "n")
    model.get_submodule("model.9.cv1").act = nn.Identity()
    model.sppf_act = False
    for level in range(3):
        branch = model.get_submodule(f"model.23.cv3.{level}")
        branch[2] = nn.Conv2d(80, 2, 1)
    model.names = ["cup", "bowl"]
    save_best(tmp_path / "best.pt", model, SIDE, 0, 0.5)
    path = export(str(tmp_path / "best.pt"), "ultralytics")
    images = torch.rand(2, 3, 128, 160, dtype=torch.float64)
    torch.save(images, tmp_path / "images.pt")
    narrow = REBUILD.replace("again.load_state_dict(model.state_dict(), strict=True)", "")
    oracle(narrow, path, tmp_path, version="newest")

    found = torch.load(tmp_path / "found.pt", weights_only=True)
    ours = decoded(model, images)
    difference = (ours - found["decoded"]["file"]).abs().amax() / ours.abs().amax()
    what = "Exported to ultralytics: a wide class branch, relative"
    witness(what, f"ultralytics {found['version']}", difference, CLOSE, len(images))
