"""Learning rates, momentum, accumulation, EMA decay and lambda over whole runs, against closed
forms in numpy.
"""

from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import nn
from witness import witness

from kdmini.distill.schedule import piecewise_linear
from kdmini.optim import EMA, Recipe, apply_setting, make_sgd
from tests.conftest import ROOT
from tests.distill.test_schedule import lambda_of_the_notes

pytestmark = pytest.mark.parity

AGAINST = "closed forms in numpy"
RUNS = [
    (Recipe(150, 64), 268),  # the notes' run: 17,125 images
    (Recipe(150, 16), 37),
    (Recipe(40, 5, warmup_epochs=2.5), 61),  # 12.8 batches an update, warm-up over 152.5 steps
    (
        Recipe(12, 24, lr0=0.02, lrf=0.1, warmup_momentum=0.5, warmup_bias_lr=0.0),
        7,
    ),  # warm-up longer than the run
    (Recipe(9, 128, momentum=0.9, warmup_epochs=1, warmup_steps=1), 50),
    (Recipe(5, 8, nbs=20, warmup_epochs=0), 11),
]


@pytest.mark.parametrize(("recipe", "per_epoch"), RUNS)
def test_learning_rates_momentum_and_accumulation(recipe: Recipe, per_epoch: int) -> None:
    step = np.arange(recipe.epochs * per_epoch)
    batches = recipe.nbs / recipe.batch
    lr = recipe.lr0 * (
        recipe.lrf + (1 - recipe.lrf) * np.cos(np.pi / 2 * (step // per_epoch) / recipe.epochs) ** 2
    )
    share = np.ones(len(step))  # of the warm-up that is done
    if recipe.warmup_epochs:
        share = np.interp(
            step, [0, max(round(recipe.warmup_epochs * per_epoch), recipe.warmup_steps)], [0, 1]
        )
    begun = np.array([0.0, 0.0, recipe.warmup_bias_lr])  # weights, norms, biases
    expected = {
        "learning rates": begun * (1 - share[:, None]) + lr[:, None] * share[:, None],
        "momentum": np.full((1, 3), recipe.warmup_momentum) * (1 - share[:, None])
        + recipe.momentum * share[:, None],
        "accumulate": np.maximum(np.rint(1 - share + batches * share), 1)[:, None],
    }

    module = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1))
    optimizer = make_sgd([module], recipe)
    assert [group["name"] for group in optimizer.param_groups] == ["weights", "norms", "biases"]
    found: dict[str, list[list[float]]] = {name: [] for name in expected}
    for number in step.tolist():
        setting = recipe.at(number, per_epoch)
        apply_setting(optimizer, setting)
        found["learning rates"].append([group["lr"] for group in optimizer.param_groups])
        found["momentum"].append([group["momentum"] for group in optimizer.param_groups])
        found["accumulate"].append([setting.accumulate])
    for name, values in expected.items():
        witness(
            f"Schedules: {name}",
            AGAINST,
            np.abs(np.array(found[name]) - values).max(),
            1e-15,
            len(step),
        )


@pytest.mark.parametrize(("decay", "tau", "updates"), [(0.9999, 2000, 6000), (0.999, 100, 1500)])
def test_ema_decay(decay: float, tau: float, updates: int) -> None:
    model: Any = nn.Linear(1, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    ema = EMA(model, decay, tau)
    found = []
    for _ in range(updates):  # a one that moves towards zero: what is left is the decay
        nn.init.ones_(ema.average.weight)
        ema.update(model)
        found.append(ema.average.weight.item())
    expected = -decay * np.expm1(-np.arange(1, updates + 1) / tau)
    witness(
        "Schedules: EMA decay", AGAINST, np.abs(np.array(found) - expected).max(), 1e-15, updates
    )


def test_lambda_of_the_notes() -> None:
    settings = yaml.safe_load((ROOT / "configs" / "voc.yaml").read_text())
    segments = [
        [float(x) for x in segment] for segment in settings["distill"]["attention"]["schedule"]
    ]
    assert settings["train"]["epochs"] == 150
    difference = max(
        abs(piecewise_linear(segments, epoch) - lambda_of_the_notes(epoch)) for epoch in range(151)
    )
    witness("Schedules: lambda", "the notes' code", difference, 1e-15, 151)
    weight = settings["distill"]["attention"]["weight"]
    effective = [weight * piecewise_linear(segments, epoch) for epoch in (0, 20, 70, 105)]
    assert torch.tensor(effective).tolist() == pytest.approx(
        [1.5, 0.75, 0.1125, 0.0375]
    )  # the notes' table
