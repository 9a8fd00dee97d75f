"""Whole runs of train.py and eval.py, as a user starts them."""

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import eval as eval_script
import train as train_script
from tests.conftest import ROOT


def run(script, *arguments: object) -> None:
    """Calls a script's main() with a command line, in this process."""
    before = sys.argv
    sys.argv = [script.__name__, *map(str, arguments)]
    try:
        script.main()
    finally:
        sys.argv = before


def newest(folder: Path) -> dict:
    return torch.load(sorted((folder / "ckpt").glob("*.pt"))[-1], weights_only=True)


def assert_equal(one: object, other: object, path: str = "") -> None:
    """Bitwise, through dicts and lists."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), path
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            assert_equal(one[key], other[key], f"{path}/{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), path
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_equal(a, b, f"{path}/{i}")
    else:
        assert one == other, path


@pytest.fixture(scope="module")
def finished(tmp_path_factory, shapes) -> Path:
    """A run of four epochs with a teacher."""
    from tests.conftest import CONFIG, TINY

    folder = tmp_path_factory.mktemp("finished")
    (folder / "config.yaml").write_text(CONFIG.format(run=folder / "run", shapes=shapes, tiny=TINY))
    run(train_script, "--config", folder / "config.yaml")
    return folder


def test_a_run_leaves_config_metrics_table_checkpoints_and_best(finished: Path) -> None:
    folder = finished / "run"
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["epoch"] for r in records] == [-1, 0, 1, 2, 3]
    assert records[-1]["box"] > 0 and records[-1]["images/s"] > 0 and records[-1]["skipped"] == 0
    assert records[-1]["distance/raw"] > 0 and records[-1]["distance/aligned"] > 0
    assert [r["lambda/attention"] for r in records[1:]] == [2.0, 1.0, 0.0, 1.0]
    assert (
        "attention" in records[1] and "attention" not in records[3]
    )  # the teacher rests at lambda 0
    header, *rows = (folder / "results.csv").read_text().splitlines()
    assert header.startswith("epoch,") and len(rows) == 5
    assert len(list((folder / "ckpt").glob("*.pt"))) == 2
    best = torch.load(folder / "best.pt", weights_only=True)
    assert best["names"][0] == "circle" and best["nc"] == 6 and best["imgsz"] == 64
    assert best["card"]["scale"] == [0.5, 0.0625, 1024]
    assert all(key.startswith("model.") for key in best["model"])
    assert {v.dtype for v in best["model"].values()} == {torch.float32, torch.int64}
    assert not list(folder.rglob("*.tmp"))


def test_align_modules_are_saved_and_move_and_the_teacher_is_nowhere(finished: Path) -> None:
    state = newest(finished / "run")
    assert sorted(state["distillation"]) == sorted(
        f"align.layers.{i}.{rest}"
        for i in range(6)
        for rest in ("0.weight", "1.running_mean", "1.running_var", "1.num_batches_tracked")
    )
    assert all(
        state["distillation"][f"align.layers.{i}.1.num_batches_tracked"] == 9 for i in range(6)
    )
    params = sum(len(group["params"]) for group in state["optimizer"]["param_groups"])
    student = sum(1 for key in state["student"] if not re.search("running|num_batches|dfl", key))
    assert (
        params == student + 6
    )  # the student's, and one convolution a tap; nothing of the teacher's
    assert set(state) == {
        "student",
        "ema",
        "distillation",
        "optimizer",
        "scaler",
        "progress",
        "rng",
        "cuda_rng",
        "config",
    }


def test_eval_prints_the_three_metrics_per_class_and_writes_detections(
    finished: Path, tmp_path: Path, capsys
) -> None:
    best = finished / "run/best.pt"
    run(eval_script, "--config", finished / "config.yaml", "--weights", best, "--teacher", "--save", tmp_path,
        f"teacher.weights={best}")  # fmt: skip
    out = capsys.readouterr().out
    for word in (
        "VOC07",
        "VOC",
        "AP50-95",
        "AP75",
        "all classes",
        "circle",
        "cross",
        "pycocotools",
        "teacher",
    ):
        assert word in out
    millions, giga = re.search(
        r"student: ([\d.]+) M parameters, ([\d.]+) GFLOPs at 64 px, [\d.]+ ms an image", out
    ).groups()
    assert float(millions) == pytest.approx(0.33, abs=0.01) and 0 < float(giga) < 1
    student, teacher = (
        json.loads((tmp_path / f"{name}.json").read_text()) for name in ("student", "teacher")
    )
    assert student == teacher


def test_killed_and_resumed_equals_never_killed(
    finished: Path, tmp_path: Path, shapes: Path
) -> None:
    folder = tmp_path / "run"
    command = [
        sys.executable,
        "train.py",
        "--config",
        str(finished / "config.yaml"),
        f"run={folder}",
    ]
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
    }  # as here: sums come out otherwise with other numbers of threads
    with subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        deadline = time.monotonic() + 120
        while not (folder / "ckpt/step_00000006.pt").exists():  # two of four epochs
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
    assert len(list((folder / "ckpt").glob("*.pt"))) <= 3
    run(train_script, "--resume", folder)

    whole, resumed = newest(finished / "run"), newest(folder)
    whole.pop("config"), resumed.pop("config")  # they name different folders
    assert_equal(whole, resumed)
    logs = [
        [json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()]
        for f in (finished / "run", folder)
    ]
    for one, other in zip(*logs, strict=True):
        assert {**one, "images/s": 0} == {**other, "images/s": 0}


def test_a_finished_run_is_not_overwritten_and_resuming_it_changes_no_weights(
    finished: Path, capsys
) -> None:
    before = {p: p.read_bytes() for p in (finished / "run").rglob("*") if p.is_file()}
    with pytest.raises(SystemExit, match="holds a run already"):
        run(train_script, "--config", finished / "config.yaml")
    run(train_script, "--resume", finished / "run")
    assert before == {p: p.read_bytes() for p in (finished / "run").rglob("*") if p.is_file()}


def test_the_teacher_is_bit_identical_after_training(config_file: Path, monkeypatch) -> None:
    make = train_script.make_distillation
    seen = {}

    @functools.wraps(make)
    def watch(student, teacher, **settings):
        distillation = make(student, teacher, **settings)
        seen.update(teacher=teacher, before={k: v.clone() for k, v in teacher.state_dict().items()})
        return distillation

    monkeypatch.setattr(train_script, "make_distillation", watch)
    run(train_script, "--config", config_file, "train.epochs=1")
    assert not any(p.requires_grad for p in seen["teacher"].parameters())
    assert not any(m.training for m in seen["teacher"].modules())
    assert_equal(seen["before"], seen["teacher"].state_dict())


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_a_run_in_half_precision_stays_finite_and_keeps_float32_weights(
    amp: str, config_file: Path, tmp_path: Path
) -> None:
    run(train_script, "--config", config_file, "train.epochs=2", f"train.amp={amp}")
    last = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert all(last[name] > 0 for name in ("box", "cls", "dfl", "attention", "distance/raw"))
    assert last["skipped"] == 0 or amp == "fp16"  # whose scale begins too high
    state = newest(tmp_path / "run")
    assert all(v.dtype != torch.float16 and v.isfinite().all() for v in state["student"].values())
    assert bool(state["scaler"]) == (amp == "fp16")


def test_deterministic_runs_repeat_bit_for_bit_and_leave_the_setting_behind(
    config_file: Path, tmp_path: Path
) -> None:
    for name in ("one", "two"):
        run(
            train_script,
            "--config",
            config_file,
            "train.epochs=1",
            f"run={tmp_path / name}",
            "deterministic=true",
        )
        assert torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.benchmark
    assert_equal(newest(tmp_path / "one")["ema"], newest(tmp_path / "two")["ema"])
    run(train_script, "--config", config_file, "train.epochs=1")
    assert not torch.are_deterministic_algorithms_enabled() and torch.backends.cudnn.benchmark


def test_training_stops_when_nothing_improves(config_file: Path, tmp_path: Path, capsys) -> None:
    run(
        train_script,
        "--config",
        config_file,
        "train.epochs=30",
        "train.lr0=0",
        "train.warmup_bias_lr=0",
        "train.patience=2",
    )
    epochs = [
        json.loads(line)["epoch"]
        for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    ]
    assert epochs == [-1, 0, 1, 2]


def test_a_loss_that_is_never_finite_stops_the_run_by_name(
    config_file: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken.py").write_text(
        "import torch\nfrom torch import nn\n"
        "class NaN(nn.Module):\n    uses = {'feats'}\n"
        "    def forward(self, student, teacher, targets):\n"
        "        return sum(f.sum() for f in student.feats.values()) * float('nan')\n"
    )
    with pytest.raises(SystemExit, match=r"2\d updates in a row.*broken not finite"):
        run(
            train_script,
            "--config",
            config_file,
            "train.epochs=30",
            "distill.broken={build: broken:NaN, weight: 1}",
        )


OUTSIDE = """
import numpy as np
import torch
from torch import nn


class Spots:
    names = ["spot"]

    def __init__(self, count: int):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        image = np.full((64, 48, 3), 30, np.uint8)
        x, y = np.random.default_rng(index).integers(4, 28, 2)
        image[y : y + 16, x : x + 16] = 220
        boxes = np.array([[x, y, x + 16, y + 16]], np.float32)
        target = {"boxes_xyxy": boxes, "labels": np.zeros(1, int), "difficult": np.zeros(1, bool), "id": str(index)}
        return image, target


class OneBox(nn.Module):
    '''One box an image, regressed from the pooled map.'''

    def __init__(self, names: list[str], width: int = 8, weights: str | None = None):
        super().__init__()
        self.names = names
        self.body = nn.Sequential(nn.Conv2d(3, width, 3, 4, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten())
        self.head = nn.Linear(16 * width, 4)
        if weights:
            self.load_state_dict(torch.load(weights, weights_only=True)["model"])

    def forward(self, images):
        return self.head(self.body(images))

    def loss(self, preds, targets):
        return {"l1": (preds * 64 - targets["boxes_xyxy"][:, 0]).abs().mean() / 64}

    def decode(self, preds, score, iou, max_det):
        one, zero = torch.ones(1), torch.zeros(1, dtype=torch.int64)
        return [{"boxes_xyxy": box[None] * 64, "scores": one, "labels": zero} for box in preds]


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


class Count:
    fitness = "images"

    def __init__(self, names: list[str]):
        self.images = 0

    def update(self, detections, targets):
        self.images += len(detections)

    def compute(self):
        return {"images": float(self.images)}
"""


def test_term_detector_dataset_and_metric_from_outside_with_one_config_entry_each(
    tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "outside.py").write_text(OUTSIDE)
    (tmp_path / "config.yaml").write_text(f"""
run: {tmp_path / "run"}
device: cpu
data:
  imgsz: 64
  augment: {{mosaic: 0}}
  train: {{build: outside:Spots, count: 16}}
  val: {{build: outside:Spots, count: 8}}
student: {{build: outside:OneBox, width: 8}}
teacher: {{build: outside:OneBox, width: 16}}
distill:
  taps: [body.1]
  mine: {{build: outside:L2, weight: 0.1, power: 1.5}}
metric: {{build: outside:Count}}
train: {{epochs: 2, batch: 8, warmup_steps: 2, warmup_epochs: 1}}
""")
    run(train_script, "--config", tmp_path / "config.yaml")
    records = [
        json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    ]
    assert (
        records[-1]["mine"] > 0
        and records[-1]["l1"] < records[1]["l1"]
        and records[-1]["images"] == 8
    )
    state = newest(tmp_path / "run")
    assert not torch.equal(state["distillation"]["terms.mine.scale"], torch.ones(1))
    run(eval_script, "--config", tmp_path / "config.yaml", "--weights", tmp_path / "run/best.pt")
    assert "all classes" in capsys.readouterr().out


BAD = {
    "typo in a key": (["train.epoch=3"], r"train: epoch: unknown key; did you mean `epochs`"),
    "typo in a section": (["trian.epochs=3"], r"no `trian`; did you mean `train`"),
    "wrong type": (["train.epochs=ten"], r"train: epochs: expected int, got 'ten'"),
    "missing data set": (["data.root=/nowhere"], r"/nowhere.*(root|download)"),
    "unmatched tap": (["distill.taps=[model.99]"], r"no submodule 'model.99'"),
    "not a term": (["distill.algin=all"], r"distill.algin: neither"),
    "wrong scale": (["student.weights={best}", "student.scale=n"], r"config says YOLO11n"),
    "no such weights": (["teacher.weights=nothing.pt"], r"nothing.pt"),
    "hostile weights": (["teacher.weights={hostile}"], r"hostile.pt.*posix.system"),
    "no teacher": (["teacher=null"], r"distill.attention: needs a teacher"),
    "bad schedule": (["distill.attention.schedule=[[5, 1, 2, 0]]"], r"schedule"),
    "batch too large": (["train.batch=400"], r"train.batch: 400 is more than the 24"),
    "image size": (["data.imgsz=100"], r"data.imgsz: 100 is not a multiple of 32"),
    "unknown device": (["device=gpu"], r"device: 'gpu'"),
}


class Hostile:
    def __reduce__(self):
        return os.system, ("touch CANARY",)


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(
    case: str, config_file: Path, finished: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(Hostile(), tmp_path / "hostile.pt")
    overrides, message = BAD[case]
    overrides = [
        o.format(best=finished / "run/best.pt", hostile=tmp_path / "hostile.pt") for o in overrides
    ]
    with pytest.raises(SystemExit) as stop:
        run(train_script, "--config", config_file, *overrides)
    assert re.search(message, str(stop.value.code)), stop.value.code
    assert str(stop.value.code).count("\n") == 0
    assert not (tmp_path / "CANARY").exists()
    assert not (tmp_path / "run").exists()  # nothing to clean up before the next try


def test_xml_with_an_unknown_class_is_named(
    config_file: Path, shapes: Path, tmp_path: Path
) -> None:
    shutil.copytree(shapes, tmp_path / "copy")
    victim = sorted((tmp_path / "copy/Annotations").iterdir())[0]
    victim.write_text(victim.read_text().replace("<name>", "<name>x", 1))
    with pytest.raises(SystemExit, match=rf"{victim.name}.*unknown class"):
        run(train_script, "--config", config_file, f"data.train.root={tmp_path / 'copy'}")


def test_the_exit_code_and_the_last_line_of_a_mistake(config_file: Path) -> None:
    done = subprocess.run(
        [sys.executable, "train.py", "--config", str(config_file), "train.epoch=3"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: ")
