"""A small generated data set and a small detector: a whole run takes seconds."""

import signal
from pathlib import Path

import pytest
import torch

import train as train_script
from examples.shapes import SHAPE_NAMES, write_set
from kdmini import checkpoint
from kdmini.signals import SIGNALS
from tests.commands import run

ROOT = Path(__file__).resolve().parents[1]

HANDLERS = {signum: signal.getsignal(signum) for signum in SIGNALS}

TINY = "[0.5, 0.0625, 1024]"  # a YOLO11 of 0.2 M parameters

# lambda is 0 in the third epoch
CONFIG = """
run: {run}
seed: 3
device: cpu
allow_void: true  # the teacher has learned nothing
data:
  root: {shapes}
  imgsz: 64
  workers: 2
  train: &set
    build: kdmini.detection.voc:VOC
    splits: [train]
    names: [circle, square, triangle, star, ring, cross]
  val: {{<<: *set, splits: [val]}}
student: {{build: kdmini.detection.yolo11.model:YOLO11, scale: {tiny}}}
teacher: {{build: kdmini.detection.yolo11.model:YOLO11, scale: {tiny}}}
distill:
  taps: [model.6, model.8, model.13, model.16, model.19, model.22]
  attention:
    build: kdmini.distill.attention:AttentionTransfer
    weight: 0.75
    schedule: [[0, 2.0, 2, 0.0], [3, 1.0, 4, 1.0]]
metric: {{build: kdmini.detection.average_precision:DetectionMetric}}
train: {{epochs: 4, batch: 8, nbs: 16, warmup_steps: 4, warmup_epochs: 1, ema_tau: 10}}
"""

# overrides that make it a run of segmentation
SEGMENTED = ["ground", *SHAPE_NAMES]
SET = f"build: kdmini.segmentation.voc:VOC, names: [{', '.join(SEGMENTED)}]"
NETWORK = "{build: kdmini.segmentation.fast_scnn:FastSCNN}"
ATTENTION = """
build: kdmini.distill.attention:AttentionTransfer, weight: 0.75,
schedule: [[0, 2.0, 2, 0.0], [3, 1.0, 4, 1.0]]
"""
SEGMENTATION = (
    f"data.train={{{SET}, splits: [train]}}",
    f"data.val={{{SET}, splits: [val]}}",
    f"student={NETWORK}",
    f"teacher={NETWORK}",
    f"distill={{taps: [fusion, pooled], attention: {{{ATTENTION}}}}}",
    "metric={build: kdmini.segmentation.mean_iou:MeanIoU}",
)

# and of classification, on mixed images
LABELLED = f"build: tests.classification.first_shape:FirstShape, names: [{', '.join(SHAPE_NAMES)}]"
CLASSIFIER = "{build: kdmini.classification.wide_resnet:WideResNet, depth: 10}"
CLASSIFICATION = (
    f"data.train={{{LABELLED}, splits: [train]}}",
    f"data.val={{{LABELLED}, splits: [val]}}",
    "data.augment={mosaic: 0, cutmix: 0.5, mixup: 0.4}",
    f"student={CLASSIFIER}",
    f"teacher={CLASSIFIER}",
    f"distill={{taps: [group2, group3], align: none, attention: {{{ATTENTION}}}}}",
    "metric={build: kdmini.classification.accuracy:Accuracy}",
)


def write_config(folder: Path, shapes: Path) -> Path:
    """The config of a run in folder/run."""
    path = folder / "config.yaml"
    path.write_text(CONFIG.format(run=folder / "run", shapes=shapes, tiny=TINY))
    return path


@pytest.fixture(scope="session", autouse=True)
def _threads() -> None:
    torch.set_num_threads(1)  # the detectors are too small for two


@pytest.fixture(autouse=True)
def _signals() -> None:
    """As at the beginning. A command that a signal ended in this process leaves it ignored, and
    children inherit that.
    """
    for signum, handler in HANDLERS.items():
        signal.signal(signum, handler)


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VOC-layout folder of 24 training and 8 validation scenes of 64 pixels."""
    root = tmp_path_factory.mktemp("data") / "shapes"
    write_set(root, train=24, val=8, size=64, seed=0)
    return root


@pytest.fixture
def config_file(tmp_path: Path, shapes: Path) -> Path:
    """The config of a run of four epochs in tmp_path/run."""
    return write_config(tmp_path, shapes)


@pytest.fixture(scope="session")
def teacher_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A best.pt of the tiny detector, whose BatchNorm statistics are as if it were trained: all
    its maps are of one order of magnitude.
    """
    # here: in a tree without detection everything else is used
    from kdmini.detection.yolo11.model import YOLO11

    torch.manual_seed(7)
    model = YOLO11(SHAPE_NAMES, [0.5, 0.0625, 1024])
    for _ in range(60):
        model(torch.rand(4, 3, 64, 64))
    path = tmp_path_factory.mktemp("teacher") / "best.pt"
    checkpoint.save_best(path, model, 64, 0, 0.0)
    return path


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, shapes: Path) -> Path:
    """A folder with a config, and in `run` all that its four epochs left."""
    folder = tmp_path_factory.mktemp("finished")
    run(train_script, "--config", write_config(folder, shapes))
    return folder
