"""The run of the competitor's own distillation is on our data, from our weights, by our schedule,
with our teacher.
"""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import oracle
from PIL import Image
from witness import witness

from bench.peer import write_yolo
from bench.peer_training import distil
from kdmini import config
from kdmini.contracts import UserError
from kdmini.data.store import subset
from kdmini.detection.voc import VOC
from kdmini.detection.yolo11 import weights
from kdmini.detection.yolo11.model import YOLO11
from kdmini.optim import Recipe
from tests.conftest import ROOT
from train import save_best

NAMES = ["circle", "square", "triangle", "star", "ring", "cross"]
# nine batches in three epochs, the warm-up over four, up to two batches an update, the last epoch
# without mosaic
CHANGES = [
    "student.scale=n", "train.epochs=3", "train.ema_tau=2000", "data.limit=20",
    "data.augment={close_mosaic: 1, hsv_h: 0.02, translate: 0.2}",
]  # fmt: skip

# argv: repository, folder, config, overrides. Four runs, the first looked into.
RUNS = """
import sys
from pathlib import Path
root, folder = sys.argv[1], Path(sys.argv[2])
sys.path.insert(0, root)
import torch
from bench import peer
from bench.peer_training import distil
from kdmini import config
version = peer.version(folder)
from ultralytics.models.yolo.detect import DetectionTrainer

own, begun, batches = DetectionTrainer.preprocess_batch, [], []
def watched(trainer, batch):
    groups = {group["param_group"]: group for group in trainer.optimizer.param_groups}
    mosaic = trainer.train_loader.dataset.transforms[0][0].p
    batches.append({"accumulate": trainer.accumulate, "mosaic": mosaic, "images": len(batch["img"]),
                    **{key: [groups[kind][key] for kind in ("weight", "bn", "bias")]
                       for key in ("lr", "momentum", "weight_decay")}})
    if not begun:
        begun.append({key: value.clone() for key, value in trainer.model.student_model.state_dict().items()})
    watched.trainer = trainer
    return own(trainer, batch)
DetectionTrainer.preprocess_batch = watched

found = {}
for name, change in (("first", "seed=3"), ("again", "seed=3"), ("other", "seed=4"), ("alone", "teacher=null")):
    settings = config.load(sys.argv[3], [*sys.argv[4:], change])
    (folder / name).mkdir()
    found[name], rate = distil(settings, folder / name)
    if name == "first":
        assert rate > 0
        model = watched.trainer.model
        found |= {"version": version, "batches": batches[:], "begun": begun[0], "args": vars(watched.trainer.args),
                  "teacher": model.teacher_model.state_dict(), "student": model.student_model.state_dict()}
torch.save(found, folder / "found.pt")
"""


@pytest.mark.parity
def test_its_distillation_with_our_teacher_weights_and_schedule(
    tmp_path: Path, config_file: Path
) -> None:
    torch.manual_seed(8)
    teacher = YOLO11(NAMES, "n")
    save_best(tmp_path / "best.pt", teacher, NAMES, 64, 0, 0.5)
    changes = [
        *CHANGES,
        f"teacher={{build: kdmini.detection.yolo11.model:YOLO11, scale: n, weights: {tmp_path / 'best.pt'}}}",
    ]
    oracle(RUNS, ROOT, tmp_path, config_file, *changes, version="newest")
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    against = found["version"]

    # its student begins as ours does, and ends as another, which ours can be
    torch.manual_seed(3)
    student = YOLO11(NAMES, "n")
    difference = max(
        (found["begun"][key] - value).abs().max() for key, value in student.state_dict().items()
    )
    witness("Competitor's run: first weights of the student", against, difference, 0.0)
    student.load_state_dict(found["first"])
    key = "model.22.cv2.conv.weight"
    assert found["first"][key].dtype == torch.float32
    assert not torch.equal(found["first"][key], found["begun"][key])
    assert not torch.equal(
        found["first"][key], found["student"][key]
    )  # the average, not what was averaged

    # its teacher is ours, to the end; and it teaches
    file = weights.read(tmp_path / "first" / "teacher.pt")
    assert file.sppf_act
    for state in (file.state, found["teacher"]):
        difference = max(
            (state[key] - value).abs().max() for key, value in teacher.state_dict().items()
        )
        witness("Competitor's run: weights of the teacher", against, difference, 0.0)
    with open(tmp_path / "first" / "run" / "results.csv") as table:
        epochs = list(csv.DictReader(table))
    assert len(epochs) == 3 and all(float(epoch["train/dis_loss"]) > 0.01 for epoch in epochs)

    # its schedule is ours, batch by batch
    settings = config.load(config_file, changes)
    recipe = Recipe(**settings["train"])
    assert [batch["images"] for batch in found["batches"]] == [
        8,
        8,
        4,
    ] * 3  # ours leaves the last four out
    assert [batch["mosaic"] for batch in found["batches"]] == [1.0] * 6 + [0.0] * 3
    ours = [recipe.at(step, 3) for step in range(9)]
    assert {setting.accumulate for setting in ours} == {1, 2}
    decay = recipe.weight_decay  # stated for a batch of nbs, which accumulation reaches here
    rows = {
        "lr": [[setting.lr, setting.lr, setting.bias_lr] for setting in ours],
        "momentum": [[setting.momentum] * 3 for setting in ours],
        "weight_decay": [[decay, 0.0, 0.0]] * 9,
        "accumulate": [setting.accumulate for setting in ours],
    }
    for name, values in rows.items():
        difference = np.abs(
            np.array(values) - np.array([batch[name] for batch in found["batches"]])
        ).max()
        witness(f"Competitor's run: {name}", against, difference, 1e-12, 9)
    told = {
        "seed": 3,
        "translate": 0.2,
        "hsv_h": 0.02,
        "imgsz": 64,
        "dis": 6.0,
        "mixup": 0.0,
        "amp": False,
    }
    assert {name: found["args"][name] for name in told} == told

    # without a teacher it trains alone
    assert "dis_loss" not in (tmp_path / "alone" / "run" / "results.csv").read_text()
    assert not torch.equal(found["alone"][key], found["begun"][key])

    # the seed decides
    assert all(torch.equal(found["again"][key], value) for key, value in found["first"].items())
    assert not torch.equal(found["other"][key], found["first"][key])
    assert not torch.equal(found["alone"][key], found["first"][key])


@pytest.mark.parametrize(
    ("change", "told"),
    [("clip=1.0", "train.clip: ultralytics has 10"), ("ema_tau=9", "train.ema_tau")],
)
def test_a_recipe_that_it_cannot_follow(
    tmp_path: Path, config_file: Path, change: str, told: str
) -> None:
    with pytest.raises(UserError, match=told):
        distil(config.load(config_file, ["train.ema_tau=2000", f"train.{change}"]), tmp_path)


def test_images_are_written_as_a_store_has_them(tmp_path: Path, shapes: Path) -> None:
    dataset = VOC(str(shapes), ["train"], NAMES)
    write_yolo(dataset, 5, tmp_path, imgsz=32)
    files = sorted((tmp_path / "images").iterdir())
    chosen = subset(len(dataset), 5)
    assert [file.name for file in files] == [f"{index:06}.png" for index in chosen]
    for file, index in zip(files, chosen, strict=True):
        picture, target = dataset[index]
        height, width = picture.shape[:2]
        ratio = 32 / max(height, width)
        small = round(width * ratio), round(height * ratio)
        expected = Image.fromarray(picture).resize(small, Image.Resampling.BILINEAR)
        assert np.array_equal(np.asarray(Image.open(file)), np.asarray(expected))
        rows = np.loadtxt(tmp_path / "labels" / f"{file.stem}.txt", ndmin=2)
        centre, sides = rows[:, 1:3] * [width, height], rows[:, 3:] * [width, height]
        easy = ~target["difficult"]
        assert np.allclose(
            np.hstack([centre - sides / 2, centre + sides / 2]),
            target["boxes_xyxy"][easy],
            atol=1e-3,
        )
        assert (rows[:, 0] == target["labels"][easy]).all()
