"""Every config of a term for segmentation: `--check` is green, with a teacher that has weights."""

from pathlib import Path

import pytest
import torch

import train as train_script
from examples.shapes import SHAPE_NAMES
from kdmini import checkpoint
from kdmini.segmentation.segformer import SegFormer
from tests.commands import run
from tests.conftest import ROOT
from tests.terms.teaching import settle

FOLDER = ROOT / "configs/segmentation/terms"
NAMES = ["ground", *SHAPE_NAMES]
SOME = "metric={build: tests.test_check:Seen}"  # the teacher has not learned anything

# overrides: what else the notes ask for, by the settings alone
VARIANTS = {
    "logits": [],
    "channelwise": [],
    "attention": [],
    "pixels": [],
    "frequency": [],
    "frequency reversed": ["frequency.low={higher: 0, stages.0: 0, pooled: 0, fusion: 1}"],
    "frequency teacher": ["frequency.strategy=teacher", "frequency.filter=haar"],
    "frequency_mamba": [],
    "affinity": [],
    "affinity learnt": ["affinity.student_graph=query_key", "affinity.matrix=laplacian"],
    "affinity_mamba": [],
    "self_teacher": [],
}
ALONE = ("self_teacher",)  # these have no teacher


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(7)
    model = SegFormer(NAMES)
    settle(model, torch.rand(4, 3, 128, 128))
    path = tmp_path_factory.mktemp("teacher") / "best.pt"
    checkpoint.save_best(path, model, 128, 0, 0.0)
    return path


def test_no_config_is_left_out() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == {name.split()[0] for name in VARIANTS}


@pytest.mark.parametrize("name", VARIANTS)
def test_distillation_is_on_in_each(
    name: str, teacher_file: Path, shapes: Path, tmp_path: Path, capsys
) -> None:
    """Every tap says something, the terms reach the student and what learns with it, the
    teacher stays, and two steps of training are made.
    """
    of_teacher = [] if name in ALONE else [f"teacher.weights={teacher_file}"]
    run(
        train_script,
        "--config",
        FOLDER / f"{name.split()[0]}.yaml",
        "--check",
        SOME,
        *of_teacher,
        f"data.root={shapes}",
        f"data.train.names={NAMES}",
        f"data.val.names={NAMES}",
        f"run={tmp_path / 'run'}",
        "device=cpu",
        "train.batch=4",
        "train.nbs=4",
        *(f"distill.{override}" for override in VARIANTS[name]),
    )
    text = capsys.readouterr().out
    assert text.endswith("--check: distillation is on\n")
    assert "ok   KD gradient, student " in text
    # of channels that are the same, or graphs, nothing is aligned
    learns = name not in ("logits", "affinity", "affinity_mamba")
    assert ("KD gradient, align and terms" in text) == learns
