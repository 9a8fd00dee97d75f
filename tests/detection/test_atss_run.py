"""Whole runs of ATSS with a teacher, and the weights that it begins from."""

import json
from pathlib import Path

import pytest
import torch
from torchvision.models import resnet

import eval as eval_script
import train as train_script
from kdmini import config
from kdmini.contracts import UserError
from kdmini.detection.atss import ATSS
from tests.commands import run

NAMES = ["circle", "square", "triangle", "star", "ring", "cross"]

CONFIG = """
run: {run}
seed: 3
device: cpu
data:
  root: {shapes}
  imgsz: 64
  limit: 8
  train: &set
    build: kdmini.detection.voc:VOC
    splits: [train]
    names: [circle, square, triangle, star, ring, cross]
  val: {{<<: *set, splits: [val]}}
student: {{build: kdmini.detection.atss:ATSS, backbone: resnet18, width: 8}}
teacher: {{build: kdmini.detection.atss:ATSS, backbone: resnet18, width: 16}}
allow_void: true
distill:
  taps: [p3, p4, p5]
  align: all
  attention: {{build: kdmini.distill.attention:AttentionTransfer, weight: 0.75}}
  logits: {{build: kdmini.terms.logits:LogitDistillation, weight: 0.1}}
metric: {{build: kdmini.detection.average_precision:DetectionMetric}}
train: {{epochs: 2, batch: 8, nbs: 8, loss_scale: none, warmup_epochs: 0, ema_tau: 2}}
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, shapes: Path) -> Path:
    """Two epochs of one step, with attention and logits of a teacher."""
    folder = tmp_path_factory.mktemp("atss")
    (folder / "config.yaml").write_text(CONFIG.format(run=folder / "run", shapes=shapes))
    run(train_script, "--config", folder / "config.yaml")
    return folder


def test_a_run_with_a_teacher_records_all_its_losses(finished: Path) -> None:
    lines = (finished / "run/metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["epoch"] for record in records] == [-1, 0, 1]
    for name in ("box", "cls", "centerness", "attention", "logits"):
        assert 0 < records[-1][f"loss/{name}"] < 100, name


def test_a_run_is_resumed_bit_for_bit(finished: Path) -> None:
    last = finished / "run/ckpt/step_00000002.pt"
    whole = torch.load(last, weights_only=True)
    last.unlink()
    run(train_script, "--resume", finished / "run")
    resumed = torch.load(last, weights_only=True)
    for part in ("student", "distillation"):
        assert whole[part].keys() == resumed[part].keys()
        for key, tensor in whole[part].items():
            assert torch.equal(tensor, resumed[part][key]), key


def test_a_run_is_scored(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    best = finished / "run/best.pt"
    run(eval_script, "--config", finished / "config.yaml", "--weights", best)
    assert "all classes" in capsys.readouterr().out


# --- weights and settings


def test_best_pt_is_loaded_whole(finished: Path) -> None:
    path = finished / "run/best.pt"
    saved = torch.load(path, weights_only=True)
    assert saved["card"] == {"detector": "ATSS", "backbone": "resnet18", "width": 8}
    model = ATSS(NAMES, "resnet18", weights=str(path), width=8)
    for key, value in model.state_dict().items():
        assert torch.equal(value, saved["model"][key]), key


SMALL = {"backbone": "resnet18", "width": 8}
WRONG_SETTINGS = [
    ({"backbone": "resnet51"}, "resnet50"),
    (SMALL | {"width": 12}, "multiple of 8"),
    (SMALL | {"weights": "BEST", "backbone": "resnet34"}, "resnet34"),
    (SMALL | {"weights": "BEST", "width": 16}, "'width': 8"),
    (SMALL | {"weights": "BEST", "names": NAMES[::-1]}, "has the classes ['circle'"),
    (SMALL | {"weights": "absent.pt"}, "no such file"),
    (SMALL | {"weights": "PLAIN"}, "no best.pt of kdmini"),
    (SMALL | {"weights": "DAMAGED"}, "damaged"),
    (SMALL | {"backbone_weights": "TEXT"}, "no file of weights"),
    (SMALL | {"backbone_weights": "BEST"}, "does not fit"),
]


@pytest.fixture
def files(finished: Path, tmp_path: Path) -> dict[str, str]:
    """What the names in WRONG_SETTINGS stand for."""
    best = finished / "run/best.pt"
    (tmp_path / "text").write_text("weights")
    torch.save({"conv1.weight": torch.zeros(3)}, tmp_path / "plain")
    content = bytearray(best.read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "damaged").write_bytes(content)
    return {
        "BEST": str(best),
        "TEXT": str(tmp_path / "text"),
        "PLAIN": str(tmp_path / "plain"),
        "DAMAGED": str(tmp_path / "damaged"),
    }


@pytest.mark.parametrize(("settings", "message"), WRONG_SETTINGS)
def test_wrong_settings_are_refused_in_one_line(
    files: dict[str, str], settings: dict, message: str
) -> None:
    section = {"build": "kdmini.detection.atss:ATSS", "names": NAMES}
    for key, value in settings.items():
        section[key] = files.get(value, value) if isinstance(value, str) else value
    with pytest.raises(UserError) as refusal:
        config.build(section, "student")
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_backbone_begins_from_a_file_of_torchvision(tmp_path: Path, zipped: bool) -> None:
    """Old files are no zip, hold parameters, and lack the counters of BatchNorm."""
    source = resnet.resnet18()
    tensors = source.state_dict(keep_vars=not zipped)
    if not zipped:
        tensors = {key: value for key, value in tensors.items() if "num_batches" not in key}
    path = tmp_path / "resnet18.pth"
    torch.save(tensors, path, _use_new_zipfile_serialization=zipped)

    model = ATSS(NAMES, "resnet18", backbone_weights=str(path), width=8)
    body = model.body.state_dict()
    assert len(body) == 120
    for key, value in body.items():
        assert torch.equal(value, source.state_dict()[key]), key
