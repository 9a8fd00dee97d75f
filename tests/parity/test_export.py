"""An exported state_dict loads strictly into the reference implementation, and gives the
same outputs there; an exported ONNX model, the same detections.
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
from kdmini.tools.export import export
from kdmini.tools.load import load_detector

pytestmark = pytest.mark.parity

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
    """As the reference has it: (N, 4 + K, A) with centres and sides."""
    with torch.no_grad():
        boxes_xyxy, scores = decode_maps(model.eval()(images))
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
    images = torch.rand(2, 3, 128, 160)
    torch.save(images, tmp_path / "images.pt")
    oracle(RUN, scale, classes, tmp_path, version=release)

    found = torch.load(tmp_path / "found.pt", weights_only=True)
    ours = decoded(model, images)
    against = f"ultralytics {found['version']}"
    for kind, rows in (("boxes", slice(0, 4)), ("scores", slice(4, None))):
        theirs = found["decoded"][:, rows]
        difference = (ours[:, rows] - theirs).abs().max() / theirs.abs().max()
        what = f"Exported state_dict: decoded {kind}, relative"
        witness(what, against, difference, 1e-4, len(images))
    assert found["about"]["scale"] == scale
    assert found["about"]["imgsz"] == "128"


# --- ONNX

SIDE = 128

# argv: folder, side, least score. Predicts folder/image.png by folder/best.onnx; nothing is
# suppressed, for boxes that overlap by nearly the limit may go either way.
PREDICT = """
import sys
import cv2, torch
from ultralytics import YOLO, __version__

folder, side, conf = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
model = YOLO(folder + "/best.onnx", task="detect")
settings = dict(imgsz=side, conf=conf, iou=1.0, max_det=1000, verbose=False)
(result,) = model.predict(cv2.imread(folder + "/image.png"), **settings)
found = {"rows": result.boxes.data.cpu(), "names": result.names, "version": __version__}
torch.save(found, folder + "/found.pt")
"""


@pytest.fixture(scope="module")
def onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with best.onnx, the best.pt that it is from, and image.png."""
    pytest.importorskip("onnxscript", reason="kdmini[export] is not installed")
    pytest.importorskip("onnxruntime", reason="kdmini[export] is not installed")
    folder = tmp_path_factory.mktemp("onnx")
    save_best(folder / "best.pt", lively(6, "n"), SIDE, 0, 0.5)
    export(str(folder / "best.pt"), "onnx")
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "image.png")
    return folder


@pytest.mark.parametrize("release", ["8.3.0", "8.3.250", "8.4.0", "newest"])
def test_the_exported_onnx_gives_the_same_detections_there(onnx: Path, release: str) -> None:
    model, _ = load_detector(onnx / "best.pt")
    pixels = torch.from_numpy(np.array(Image.open(onnx / "image.png")))
    with torch.no_grad():
        boxes_xyxy, scores = decode_maps(model(pixels.permute(2, 0, 1)[None] / 255))
    best, labels = scores[0].max(1)  # (A,)
    ranked = best.sort(descending=True).values[20:200]
    gap = int((ranked[:-1] - ranked[1:]).argmax())
    conf = float(ranked[gap : gap + 2].mean())  # between two scores, far from both
    oracle(PREDICT, onnx, SIDE, conf, version=release)

    found = torch.load(onnx / "found.pt", weights_only=True)
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
    witness("Exported ONNX: boxes of detections, pixels", against, off[:4].max(), 0.05, len(ours))
    witness("Exported ONNX: scores of detections", against, off[4], 1e-3, len(ours))
