"""The run of the competitor's own distillation is on our data, from our weights, by our
schedule, with our teacher.
"""

import csv
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from oracle import oracle
from PIL import Image
from torch import Tensor
from witness import witness

from bench.peer import write_yolo
from bench.peer_training import distil
from kdmini import config
from kdmini.checkpoint import save_best
from kdmini.contracts import UserError
from kdmini.data.store import subset
from kdmini.detection.voc import VOC
from kdmini.detection.yolo11 import weights
from kdmini.detection.yolo11.model import YOLO11, build_layers
from kdmini.detection.yolo11.sizes import sizes_of
from kdmini.optim import Recipe
from tests.conftest import CONFIG, ROOT, TINY

NAMES = ["circle", "square", "triangle", "star", "ring", "cross"]
# nine batches in three epochs, the warm-up over four, up to two batches an update, the last
# epoch without mosaic
CHANGES = [
    "student.scale=n",
    "train.epochs=3",
    "train.ema_tau=2000",
    "data.limit=20",
    "data.augment={close_mosaic: 1, hsv_h: 0.02, translate: 0.2}",
]
STEPS = 3  # an epoch
KEY = "model.22.cv2.conv.weight"  # one of the weights, to tell models apart by

# argv: repository, folder, config, overrides. Five runs, the first looked into.
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

own = DetectionTrainer.preprocess_batch
begun = {}
batches = []

def watched(trainer, batch):
    groups = {group["param_group"]: group for group in trainer.optimizer.param_groups}
    about = {"accumulate": trainer.accumulate, "images": len(batch["img"])}
    about["mosaic"] = trainer.train_loader.dataset.transforms[0][0].p
    for key in ("lr", "momentum", "weight_decay"):
        about[key] = [groups[kind][key] for kind in ("weight", "bn", "bias")]
    batches.append(about)
    if not begun:
        state = trainer.model.student_model.state_dict()
        begun.update({key: value.clone() for key, value in state.items()})
    watched.trainer = trainer
    return own(trainer, batch)

DetectionTrainer.preprocess_batch = watched

found = {}
changes = {
    "first": "seed=3",
    "again": "seed=3",
    "other": "seed=4",
    "alone": "teacher=null",
    "frozen": "train.freeze=[model.0, model.1]",
}
for name, change in changes.items():
    settings = config.load(sys.argv[3], [*sys.argv[4:], change])
    (folder / name).mkdir()
    found[name], rate = distil(settings, folder / name)
    if name == "first":
        assert rate > 0
        found |= {"version": version, "batches": batches[:], "begun": begun}
        found["args"] = vars(watched.trainer.args)
        found["teacher"] = watched.trainer.model.teacher_model.state_dict()
        found["student"] = watched.trainer.model.student_model.state_dict()
torch.save(found, folder / "found.pt")
"""


class Peer(NamedTuple):
    """Five runs of its trainer, and what they were given."""

    folder: Path  # of the runs
    teacher: YOLO11
    settings: dict[str, Any]  # the config
    found: dict[str, Any]  # what the script above found

    def compare(self, what: str, difference: Any, bound: float = 0.0, cases: int = 1) -> None:
        witness(f"Competitor's run: {what}", self.found["version"], difference, bound, cases)


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory, shapes: Path) -> Peer:
    folder = tmp_path_factory.mktemp("peer")
    config_file = folder / "config.yaml"
    config_file.write_text(CONFIG.format(run=folder / "run", shapes=shapes, tiny=TINY))
    torch.manual_seed(8)
    teacher = YOLO11(NAMES, "n")
    # as it is where the classes are some of COCO's
    teacher.model = build_layers(sizes_of("n"), len(NAMES), cls_width=80)
    save_best(folder / "best.pt", teacher, 64, 0, 0.5)
    build = "kdmini.detection.yolo11.model:YOLO11"
    changes = [
        *CHANGES,
        f"teacher={{build: {build}, scale: n, weights: {folder / 'best.pt'}}}",
    ]
    oracle(RUNS, ROOT, folder, config_file, *changes, version="newest")
    found = torch.load(folder / "found.pt", weights_only=True)
    return Peer(folder, teacher, config.load(config_file, changes), found)


def largest_difference(state: dict[str, Tensor], model: YOLO11) -> float:
    """Of the weights, by the names that the model has."""
    largest = 0.0
    for key, value in model.state_dict().items():
        difference = (state[key] - value).abs().max().item()
        assert not math.isnan(difference), key
        largest = max(largest, difference)
    return largest


@pytest.mark.parity
def test_its_student_begins_as_ours_does_and_ends_as_one_that_ours_can_be(peer: Peer) -> None:
    torch.manual_seed(3)
    student = YOLO11(NAMES, "n")
    begun = peer.found["begun"]
    first = peer.found["first"]
    peer.compare("first weights of the student", largest_difference(begun, student))
    student.load_state_dict(first)
    assert first[KEY].dtype == torch.float32
    assert not torch.equal(first[KEY], begun[KEY])
    # the average, not what was averaged
    assert not torch.equal(first[KEY], peer.found["student"][KEY])


@pytest.mark.parity
def test_its_teacher_is_ours_to_the_end_and_teaches(peer: Peer) -> None:
    file = weights.read(peer.folder / "first" / "teacher.pt")
    assert file.sppf_act
    for state in (file.state, peer.found["teacher"]):
        peer.compare("weights of the teacher", largest_difference(state, peer.teacher))
    with open(peer.folder / "first" / "run" / "results.csv") as table:
        epochs = list(csv.DictReader(table))
    assert len(epochs) == 3
    assert all(float(epoch["train/dis_loss"]) > 0.01 for epoch in epochs)


@pytest.mark.parity
def test_its_schedule_is_ours_batch_by_batch(peer: Peer) -> None:
    batches = peer.found["batches"]
    recipe = Recipe(**peer.settings["train"])
    assert [batch["images"] for batch in batches] == [8, 8, 4] * 3  # ours leaves the four out
    assert [batch["mosaic"] for batch in batches] == [1.0] * 6 + [0.0] * 3
    ours = [recipe.at(step, STEPS) for step in range(3 * STEPS)]
    assert {setting.accumulate for setting in ours} == {1, 2}
    decay = recipe.weight_decay  # stated for a batch of nbs, which accumulation reaches here
    columns = {  # of weights, norms and biases
        "lr": [[setting.lr, setting.lr, setting.bias_lr] for setting in ours],
        "momentum": [[setting.momentum] * 3 for setting in ours],
        "weight_decay": [[decay, 0.0, 0.0] for _ in ours],
        "accumulate": [setting.accumulate for setting in ours],
    }
    for name, expected in columns.items():
        theirs = [batch[name] for batch in batches]
        difference = np.abs(np.array(expected) - np.array(theirs)).max()
        peer.compare(name, difference, 1e-12, 9)


@pytest.mark.parity
def test_its_settings_are_those_of_the_config(peer: Peer) -> None:
    expected = {
        "seed": 3,
        "translate": 0.2,
        "hsv_h": 0.02,
        "imgsz": 64,
        "dis": 6.0,
        "mixup": 0.0,
        "amp": False,
    }
    assert {name: peer.found["args"][name] for name in expected} == expected


@pytest.mark.parity
def test_without_a_teacher_it_trains_alone(peer: Peer) -> None:
    assert "dis_loss" not in (peer.folder / "alone" / "run" / "results.csv").read_text()
    alone = peer.found["alone"]
    assert not torch.equal(alone[KEY], peer.found["begun"][KEY])
    assert not torch.equal(alone[KEY], peer.found["first"][KEY])


@pytest.mark.parity
def test_what_the_config_freezes_stays_with_its_statistics(peer: Peer) -> None:
    torch.manual_seed(peer.settings["seed"])
    begun = YOLO11(NAMES, "n").state_dict()
    ended = peer.found["frozen"]
    stayed = [key for key in begun if torch.equal(ended[key], begun[key])]
    frozen = [key for key in begun if key.startswith(("model.0.", "model.1."))]
    counters = [key for key in begun if key.endswith("num_batches_tracked")]
    assert set(frozen) <= set(stayed)
    assert not {key for key in stayed if key.startswith("model.2.")} - set(counters)


def test_the_seed_decides(peer: Peer) -> None:
    first = peer.found["first"]
    assert all(torch.equal(peer.found["again"][key], value) for key, value in first.items())
    assert not torch.equal(peer.found["other"][KEY], first[KEY])


# argv: repository, folder, config, overrides. One run from public weights.
TUNES = """
import sys
from pathlib import Path
root, folder = sys.argv[1], Path(sys.argv[2])
sys.path.insert(0, root)
import torch
from bench.peer_training import tune
from kdmini import config
settings = config.load(sys.argv[3], sys.argv[4:])
(folder / "tuned").mkdir()
tuned = tune(settings, {"optimizer": "SGD", "lr0": 1e-9, "warmup_bias_lr": 0}, folder / "tuned")
found = {"scores": tuned.scores, "speed": tuned.speed, "weights": str(tuned.weights)}
torch.save(found, folder / "tuned.pt")
"""


@pytest.mark.parity
def test_it_tunes_the_weights_that_the_config_names(peer: Peer, config_file: Path) -> None:
    """At a learning rate of next to nothing its file has the weights that it was given, and
    the images of the config are those that it trained on.
    """
    begun = peer.folder / "public.pt"
    whole = peer.folder / "first" / "run" / "weights" / "last.pt"
    begun.write_bytes(whole.read_bytes())
    changes = [*CHANGES, f"student.weights={{path: '{begun}', classes: by_name}}"]
    oracle(TUNES, ROOT, peer.folder, config_file, *changes, version="newest")

    found = torch.load(peer.folder / "tuned.pt", weights_only=True)
    assert found["speed"] > 0
    assert set(found["scores"]) == {"AP50-95 by ultralytics", "AP50 by ultralytics"}
    assert len(list((peer.folder / "tuned" / "train" / "images").iterdir())) == 20
    assert len(list((peer.folder / "tuned" / "val" / "images").iterdir())) == 8  # all
    before = weights.read(begun).state
    after = weights.read(found["weights"]).state
    drift = max(
        (after[key] - value).abs().max() / value.abs().max()
        for key, value in before.items()
        if key.endswith("conv.weight")
    )
    peer.compare("tuned at no learning rate: weights, relative", drift, 1e-3)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("clip=1.0", "train.clip: ultralytics has 10"),
        ("ema_tau=9", "train.ema_tau"),
        ("freeze=[model.1]", "train.freeze: ultralytics freezes the first layers"),
        ("freeze_statistics=true", "train.freeze_statistics"),
        ("optimizer=adamw", "optimizer: sgd"),
    ],
)
def test_a_recipe_that_it_cannot_follow(
    tmp_path: Path, config_file: Path, change: str, reason: str
) -> None:
    settings = config.load(config_file, ["train.ema_tau=2000", f"train.{change}"])
    with pytest.raises(UserError, match=reason):
        distil(settings, tmp_path)


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
        size = (round(width * ratio), round(height * ratio))
        expected = Image.fromarray(picture).resize(size, Image.Resampling.BILINEAR)
        assert np.array_equal(np.asarray(Image.open(file)), np.asarray(expected))

        rows = np.loadtxt(tmp_path / "labels" / f"{file.stem}.txt", ndmin=2)
        centre = rows[:, 1:3] * [width, height]
        sides = rows[:, 3:] * [width, height]
        boxes_xyxy = np.hstack([centre - sides / 2, centre + sides / 2])
        easy = ~target["difficult"]
        assert np.allclose(boxes_xyxy, target["boxes_xyxy"][easy], atol=1e-3)
        assert (rows[:, 0] == target["labels"][easy]).all()
