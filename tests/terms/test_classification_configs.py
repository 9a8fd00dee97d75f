"""Every config of a term for classification: `--check` is green, with a teacher that has
weights.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

import train as train_script
from kdmini import checkpoint, config
from kdmini.classification.resnet import ResNet
from kdmini.classification.wide_resnet import WideResNet
from tests.commands import run
from tests.conftest import ROOT
from tests.terms.teaching import settle

FOLDER = ROOT / "configs/classification"
NAMES = [f"class_{label}" for label in range(10)]
WIDE = ("student.depth=10", "teacher.depth=16")
SET = "{build: kdmini.classification.cifar:CIFAR, split: train}"
DEEP = ("teacher.depth=18", f"data.train={SET}", f"data.val={SET.replace('train', 'test')}")
# config -> overrides: smaller networks, and the same images
TERMS = {"wrn_attention": WIDE, "wrn_logits": WIDE, "wrn_both": WIDE, "groceries_both": DEEP}
SOME = "metric={build: tests.test_check:Seen}"  # the teacher has not learned anything


@pytest.fixture(scope="module")
def teacher_files(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, ...], Path]:
    """By the overrides that they belong to."""
    torch.manual_seed(7)
    files = {}
    for overrides, model in {WIDE: WideResNet(NAMES, 16, 2), DEEP: ResNet(NAMES)}.items():
        settle(model, torch.rand(4, 3, 64, 64))
        files[overrides] = tmp_path_factory.mktemp("teacher") / "best.pt"
        checkpoint.save_best(files[overrides], model, 64, 0, 0.0)
    return files


@pytest.fixture(scope="module")
def cifar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CIFAR-10 of five images a file, of noise."""
    folder = tmp_path_factory.mktemp("cifar-10-batches-bin")
    (folder / "batches.meta.txt").write_text("\n".join(NAMES))
    rng = np.random.default_rng(0)
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        records = rng.integers(0, 256, (5, 3073), np.uint8)
        records[:, 0] %= 10
        (folder / f"{name}.bin").write_bytes(records.tobytes())
    return folder


def test_no_config_is_left_out() -> None:
    distilling = [path for path in FOLDER.glob("*.yaml") if "distill" in config.load(path)]
    assert {path.stem for path in distilling} == {*TERMS, "demo"}


@pytest.mark.parametrize("name", TERMS)
def test_distillation_is_on_in_each(
    name: str, teacher_files: dict[tuple[str, ...], Path], cifar: Path, tmp_path: Path, capsys
) -> None:
    run(
        train_script,
        "--config",
        FOLDER / f"{name}.yaml",
        "--check",
        SOME,
        f"teacher.weights={teacher_files[TERMS[name]]}",
        f"data.root={cifar}",
        f"run={tmp_path / 'run'}",
        "device=cpu",
        *("train.batch=4", "train.nbs=4"),
        *TERMS[name],
    )
    assert_on(capsys.readouterr().out)


def test_distillation_is_on_in_the_demo(cifar: Path, tmp_path: Path, capsys) -> None:
    """Which has no teacher."""
    small = (f"data.root={cifar}", "train.batch=4", "train.nbs=4", "data.imgsz=64", "device=cpu")
    demo = ("--config", FOLDER / "demo.yaml", f"run={tmp_path / 'run'}")
    run(train_script, *demo, "--check", SOME, *small, *DEEP[1:])
    assert_on(capsys.readouterr().out)


def assert_on(text: str) -> None:
    assert text.endswith("--check: distillation is on\n")
    assert "ok   KD gradient, student " in text
