"""Learning rates, momentum, accumulation, EMA decay and lambda over whole runs, against
closed forms in numpy.
"""

from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import nn
from witness import witness

from kdmini.distill.schedule import piecewise_linear
from kdmini.optim import EMA, Recipe, apply_setting, make_optimizer
from tests.conftest import ROOT
from tests.distill.test_schedule import lambda_of_the_notes

pytestmark = pytest.mark.parity

AGAINST = "closed forms in numpy"
BOUND = 1e-15
LONG_WARMUP = Recipe(12, 24, lr0=0.02, lrf=0.1, warmup_momentum=0.5, warmup_bias_lr=0.0)
RUNS = [  # recipe, steps an epoch
    (Recipe(150, 64), 268),  # the notes' run: 17,125 images
    (Recipe(150, 16), 37),
    (Recipe(40, 5, warmup_epochs=2.5), 61),  # 12.8 batches an update, warm-up over 152.5 steps
    (LONG_WARMUP, 7),  # longer than the run
    (Recipe(9, 128, momentum=0.9, warmup_epochs=1, warmup_steps=1), 50),
    (Recipe(5, 8, nbs=20, warmup_epochs=0), 11),
]


def expected(recipe: Recipe, per_epoch: int) -> dict[str, np.ndarray]:
    """Of every step, for weights, norms and biases: (steps, 3), or what spreads to it."""
    step = np.arange(recipe.epochs * per_epoch)
    share = np.ones(len(step))  # of the warm-up that is done
    if recipe.warmup_epochs:
        warmup = max(round(recipe.warmup_epochs * per_epoch), recipe.warmup_steps)
        share = np.interp(step, [0, warmup], [0, 1])
    share = share[:, None]

    angle = np.pi / 2 * (step // per_epoch) / recipe.epochs
    lr = recipe.lr0 * (recipe.lrf + (1 - recipe.lrf) * np.cos(angle) ** 2)
    first_lr = np.array([0.0, 0.0, recipe.warmup_bias_lr])
    first_momentum = np.full(3, recipe.warmup_momentum)
    batches = 1 - share + recipe.nbs / recipe.batch * share
    return {
        "learning rates": first_lr * (1 - share) + lr[:, None] * share,
        "momentum": first_momentum * (1 - share) + recipe.momentum * share,
        "accumulate": np.maximum(np.rint(batches), 1),
    }


@pytest.mark.parametrize(("recipe", "per_epoch"), RUNS)
def test_learning_rates_momentum_and_accumulation(recipe: Recipe, per_epoch: int) -> None:
    module = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1))
    optimizer = make_optimizer([module], recipe)
    groups = optimizer.param_groups
    assert [group["name"] for group in groups] == ["weights", "norms", "biases"]
    steps = recipe.epochs * per_epoch
    lrs = []
    momenta = []
    accumulates = []
    for step in range(steps):
        setting = recipe.at(step, per_epoch)
        apply_setting(optimizer, setting)
        lrs.append([group["lr"] for group in groups])
        momenta.append([group["momentum"] for group in groups])
        accumulates.append([setting.accumulate])

    found = {"learning rates": lrs, "momentum": momenta, "accumulate": accumulates}
    for name, values in expected(recipe, per_epoch).items():
        difference = np.abs(np.array(found[name]) - values).max()
        witness(f"Schedules: {name}", AGAINST, difference, BOUND, steps)


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
    closed_form = -decay * np.expm1(-np.arange(1, updates + 1) / tau)
    difference = np.abs(np.array(found) - closed_form).max()
    witness("Schedules: EMA decay", AGAINST, difference, BOUND, updates)


def test_lambda_of_the_notes() -> None:
    settings = yaml.safe_load((ROOT / "configs" / "voc.yaml").read_text())
    attention = settings["distill"]["attention"]
    segments = [[float(number) for number in segment] for segment in attention["schedule"]]
    assert settings["train"]["epochs"] == 150
    ours = np.array([piecewise_linear(segments, epoch) for epoch in range(151)])
    notes = np.array([lambda_of_the_notes(epoch) for epoch in range(151)])
    witness("Schedules: lambda", "the notes' code", np.abs(ours - notes).max(), BOUND, 151)

    epochs = [0, 20, 70, 105]  # the notes' table
    effective = torch.tensor(attention["weight"] * ours[epochs])
    assert effective.tolist() == pytest.approx([1.5, 0.75, 0.1125, 0.0375])
