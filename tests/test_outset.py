"""What is said of the phases of a run, against the loop that goes through them."""

import pytest

from kdmini.optim import Recipe
from kdmini.outset import highest_lr, updates

RECIPES = {
    "no accumulation": Recipe(3, 8, nbs=8),
    "accumulated": Recipe(5, 4, nbs=16, warmup_epochs=1.5, warmup_steps=2),
    "odd": Recipe(4, 6, nbs=32, warmup_epochs=0.3, warmup_steps=1),
    "no warm-up": Recipe(4, 4, nbs=64, warmup_epochs=0),
    "all warm-up": Recipe(2, 4, nbs=64, warmup_steps=1000),
}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("steps", [1, 6, 17])
def test_updates_and_the_highest_learning_rate(name: str, steps: int) -> None:
    recipe = RECIPES[name]
    count = 0
    micro_batches = 0
    rates = []
    for step in range(recipe.epochs * steps):
        setting = recipe.at(step, steps)
        rates.append(setting.lr)
        micro_batches += 1
        if micro_batches >= setting.accumulate or (step + 1) % steps == 0:
            count += 1
            micro_batches = 0
    assert updates(recipe, steps) == count
    assert highest_lr(recipe, steps) == max(rates)
