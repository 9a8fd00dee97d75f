"""Every config of a term that has a teacher: it teaches the student, and it trains.

That of the self-teacher stands in test_self_teacher_run.py.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from kdmini import config
from tests.conftest import ROOT
from tests.terms.teaching import SMALL, teach, train

NO_TARGETS: Any = {}
ONE_BOX: Any = {
    "boxes_xyxy": torch.tensor([[[8.0, 8.0, 40.0, 50.0]]] * 4),
    "labels": torch.ones(4, 1).long(),
}


class Case(NamedTuple):
    imgsz: int = 64
    targets: Any = NO_TARGETS
    steps: int = 10
    falls_to: float = 0.9  # the loss of the last step, times that of the first
    epochs: int = 2
    lr0: float = 0.2  # of those steps


CASES = {
    "logits": Case(),
    "cross_head": Case(),
    "gradient_weighted": Case(),
    "localisation": Case(),
    "centred": Case(),
    "channelwise": Case(),
    "masked": Case(),
    "pearson": Case(),
    # at 0.2 it goes up and down, and where it ends is another place on every processor
    "score_weighted": Case(steps=16, lr0=0.1),
    "spatial": Case(),
    "standardised": Case(),
    "hybrid": Case(),
    "affinity": Case(targets=ONE_BOX, steps=12, falls_to=0.8, epochs=1),
    "frequency": Case(imgsz=128, steps=12, falls_to=0.8, epochs=1),
}


def path_of(name: str) -> Path:
    return ROOT / f"configs/terms/{name}.yaml"


def test_no_config_is_left_out() -> None:
    names = {path.stem for path in (ROOT / "configs/terms").glob("*.yaml")}
    assert names == {*CASES, "self_teacher"}


@pytest.mark.parametrize("name", CASES)
def test_each_config_teaches_the_student_and_leaves_the_teacher(name: str) -> None:
    """The terms alone, without the task and with `align` as it begins: their sum falls."""
    case = CASES[name]
    losses = teach(path_of(name), case.imgsz, case.targets, case.steps, case.lr0)
    assert losses[-1] < case.falls_to * losses[0]


OTHER_FREQUENCIES = ["distill.frequency.strategy=teacher", "distill.frequency.low={model.16: 0.7}"]


@pytest.mark.parametrize(
    "name, overrides",
    [*((name, []) for name in CASES), ("frequency", OTHER_FREQUENCIES)],
)
def test_each_config_trains(name: str, overrides: list[str], tmp_path: Path, shapes: Path) -> None:
    """A few steps: every term is logged, and finite; parameters are saved where it has some."""
    case = CASES[name]
    folder = tmp_path / "run"
    records = train(
        path_of(name),
        folder,
        *SMALL,
        *overrides,
        f"data.root={shapes}",
        f"data.imgsz={case.imgsz}",
        "data.limit=8",
        "device=cpu",
        f"train.epochs={case.epochs}",
        f"train.val_every={case.epochs}",
        "train.batch=4",
    )
    terms = config.load(path_of(name))["distill"].keys() - {"taps", "align", "kd_scale"}
    trained = [record for record in records if record["epoch"] >= 0]
    assert len(trained) == case.epochs
    for record in trained:
        assert record["skipped"] == 0
        for term in terms:
            assert 0 < record[f"loss/{term}"] < math.inf

    newest = sorted((folder / "ckpt").glob("*.pt"))[-1]
    saved = torch.load(newest, weights_only=True)["distillation"]
    assert any(key.startswith("terms.") for key in saved) == (name == "masked")
