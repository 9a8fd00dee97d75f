"""A task from outside: data set, truth, model, term and metric, by config alone."""

from pathlib import Path

import pytest
import torch

import eval as eval_script
import train as train_script
from tests.commands import newest, records, run

# a bright square in every image, whose centre is to be found
OUTSIDE = '''
import numpy as np
import torch
from torch import nn


class Points:
    """One point in each image, which travels with its pixels; there is no mosaic."""

    def __init__(self, store):
        self.points = np.stack([target["point"] for target in store.targets])

    @staticmethod
    def split(target):
        return None, target

    def rendered(self, layout, plane):
        points = self.points[layout.image[:, 0]] * layout.a[:, 0] + layout.b[:, 0]
        return {"points": torch.from_numpy(points).float()}

    @staticmethod
    def to_file(predictions, frames):
        moved = []
        for prediction, frame in zip(predictions, frames, strict=True):
            point = (prediction["point"].numpy() - frame.corner) * frame.scale
            moved.append({"point": torch.from_numpy(point)})
        return moved


class Spots:
    names = ["spot"]
    truth = Points

    def __init__(self, count: int):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        image = np.full((64, 48, 3), 30, np.uint8)
        x, y = np.random.default_rng(index).integers(4, 28, 2)
        image[y : y + 16, x : x + 16] = 220
        return image, {"point": np.array([x + 8.0, y + 8.0]), "id": str(index)}


class OnePoint(nn.Module):
    """One point an image, regressed from the pooled map."""

    def __init__(self, names: list[str], width: int = 8, weights: str | None = None):
        super().__init__()
        self.names = names
        convolution = nn.Conv2d(3, width, 3, 4, 1)
        self.body = nn.Sequential(convolution, nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten())
        self.head = nn.Linear(16 * width, 2)
        if weights:
            self.load_state_dict(torch.load(weights, weights_only=True)["model"])

    def forward(self, images):
        return self.head(self.body(images))

    def loss(self, preds, targets):
        return {"l1": (preds * 64 - targets["points"]).abs().mean() / 64}

    def decode(self, preds):
        return [{"point": point * 64} for point in preds]


class L2(nn.Module):
    uses = {"feats", "preds"}

    def __init__(self, shapes: dict, power: float = 2.0):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(len(shapes)))
        self.power = power

    def forward(self, student, teacher, targets):
        pairs = zip(student.feats.values(), teacher.feats.values())
        apart = torch.stack([(s - t).abs().pow(self.power).mean() for s, t in pairs])
        return (apart * self.scale.exp()).sum() + (student.preds - teacher.preds).abs().mean()


class Nearness:
    fitness = "nearness"

    def __init__(self, names: list[str]):
        self.records = []  # the distances of each batch

    def update(self, predictions, targets):
        apart = [
            prediction["point"].numpy() - target["point"]
            for prediction, target in zip(predictions, targets, strict=True)
        ]
        self.records.append([float(np.linalg.norm(vector)) for vector in apart])

    def compute(self):
        distances = np.concatenate(self.records)
        return {"images": float(len(distances)), "nearness": 1 / (1 + float(distances.mean()))}
'''
CONFIG = """
run: {run}
device: cpu
allow_void: true  # the teacher has no weights
data:
  imgsz: 64
  augment: {{mosaic: 0}}
  train: {{build: outside:Spots, count: 16}}
  val: {{build: outside:Spots, count: 8}}
student: {{build: outside:OnePoint, width: 8}}
teacher: {{build: outside:OnePoint, width: 16}}
distill:
  taps: [body.1]
  mine: {{build: outside:L2, weight: 0.1, power: 1.5}}
metric: {{build: outside:Nearness}}
train: {{epochs: 2, batch: 8, warmup_steps: 2, warmup_epochs: 1}}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of the finished run, whose config is beside it."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "outside.py").write_text(OUTSIDE)
    (tmp_path / "config.yaml").write_text(CONFIG.format(run=tmp_path / "run"))
    run(train_script, "--config", tmp_path / "config.yaml")
    return tmp_path / "run"


def test_a_task_from_outside_is_trained_and_evaluated(folder: Path, capsys) -> None:
    before, first, last = records(folder)
    assert before["distance/raw"] > 0
    assert last["loss/mine"] > 0
    assert last["loss/l1"] < first["loss/l1"]
    assert last["score/images"] == 8
    assert last["score/nearness"] > first["score/nearness"]
    terms = newest(folder)["distillation"]
    assert not torch.equal(terms["terms.mine.scale"], torch.ones(1))

    config = folder.parent / "config.yaml"
    run(eval_script, "--config", config, "--weights", folder / "best.pt")
    assert "all classes" in capsys.readouterr().out
