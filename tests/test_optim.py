"""The schedule, against closed forms; the optimiser, against torch's plain one."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from kdmini.detection.yolo11.model import YOLO11
from kdmini.optim import Recipe, Setting, apply_setting, make_optimizer

# --- the schedule

RECIPES = [  # recipe, steps of an epoch
    (Recipe(epochs=50, batch=64), 100),
    # 100 steps of warm-up: over fourteen epochs
    (Recipe(epochs=12, batch=16, lr0=0.02, lrf=0.1), 7),
    # 12.8 batches an update; warm-up over 123 steps
    (Recipe(epochs=30, batch=5, nbs=64), 41),
    # a warm-up of 41.25 steps
    (Recipe(epochs=10, batch=128, nbs=64, warmup_epochs=1.25, warmup_steps=1), 33),
    (Recipe(epochs=6, batch=16, nbs=16, warmup_epochs=0), 9),
    (Recipe(epochs=1, batch=8, warmup_bias_lr=0.0, warmup_momentum=0.5), 300),
]


def closed_form(recipe: Recipe, step: int, per_epoch: int) -> Setting:
    """A cosine from lr0 to lrf * lr0, epoch by epoch; straight lines in the warm-up."""
    lowest = recipe.lr0 * recipe.lrf
    quarter = math.pi * (step // per_epoch) / recipe.epochs / 2
    lr = lowest + (recipe.lr0 - lowest) * math.cos(quarter) ** 2
    batches = recipe.nbs / recipe.batch
    warmup = max(round(recipe.warmup_epochs * per_epoch), recipe.warmup_steps)
    if not recipe.warmup_epochs or step > warmup:
        return Setting(lr, lr, recipe.momentum, max(round(batches), 1))

    def line(first: float, last: float) -> float:
        return float(np.interp(step, [0, warmup], [first, last]))

    return Setting(
        lr=line(0.0, lr),
        bias_lr=line(recipe.warmup_bias_lr, lr),
        momentum=line(recipe.warmup_momentum, recipe.momentum),
        accumulate=max(1, round(line(1, batches))),
    )


@pytest.mark.parametrize(("recipe", "per_epoch"), RECIPES)
def test_the_whole_run_follows_the_closed_forms(recipe, per_epoch):
    for step in range(recipe.epochs * per_epoch):
        setting = recipe.at(step, per_epoch)
        expected = closed_form(recipe, step, per_epoch)
        for name in ("lr", "bias_lr", "momentum"):
            number = getattr(setting, name)
            assert number == pytest.approx(getattr(expected, name), rel=1e-12, abs=1e-15), name
        assert setting.accumulate == expected.accumulate


PUBLIC = Recipe(epochs=100, batch=16)


def test_the_public_recipe_begins_with_its_warm_up():
    assert PUBLIC.at(0, 1000) == Setting(lr=0.0, bias_lr=0.1, momentum=0.8, accumulate=1)
    after = PUBLIC.at(3000, 1000)
    assert after.lr == pytest.approx(after.bias_lr)
    assert after.momentum == pytest.approx(0.937)
    assert after.accumulate == 4


def test_the_public_recipe_falls_by_a_cosine_epoch_by_epoch():
    assert PUBLIC.at(50_000, 1000).lr == pytest.approx(0.01 * 0.505)
    assert PUBLIC.at(99_999, 1000).lr == PUBLIC.at(99_000, 1000).lr  # not step by step
    assert PUBLIC.at(99_999, 1000).lr == pytest.approx(0.01 * 0.01, rel=0.03)
    lrs = [PUBLIC.at(step, 10).lr for step in range(100, 1000)]
    assert lrs == sorted(lrs, reverse=True)  # no sawtooth


def test_small_batches_are_accumulated_to_the_nominal_one():
    assert PUBLIC.accumulate == 4
    assert Recipe(epochs=1, batch=200).accumulate == 1


@pytest.mark.parametrize(("recipe", "per_epoch"), RECIPES)
def test_updates_follow_one_another_and_an_epoch_ends_with_one(recipe, per_epoch):
    """An update is due once as many batches are there as hold at the step."""
    step = 0
    last = recipe.epochs * per_epoch
    while step < last:
        count = recipe.micro_batches(step, per_epoch)
        steps = range(step, step + count)
        due = [taken >= recipe.at(at, per_epoch).accumulate for taken, at in enumerate(steps, 1)]
        ends = [(at + 1) % per_epoch == 0 for at in steps]
        assert not any(due[:-1])
        assert not any(ends[:-1])
        assert due[-1] or ends[-1]
        step += count
    assert step == last


def test_an_update_grows_while_it_is_filled_and_is_cut_at_the_end_of_an_epoch():
    """Of a warm-up of 10 steps to 8 batches an update: 1, 1.7, 2.4, 3.1, 3.8, 4.5, 5.2, ..."""
    recipe = Recipe(epochs=2, batch=8, warmup_epochs=0.1, warmup_steps=10)
    assert recipe.micro_batches(0, 18) == 1
    assert recipe.micro_batches(1, 18) == 2
    assert recipe.micro_batches(3, 18) == 7  # begun at 3, it waits for what the last asks for
    assert recipe.micro_batches(11, 18) == 7
    assert recipe.micro_batches(16, 18) == 2
    assert recipe.micro_batches(18, 18) == 8


# --- the groups


def small(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 4, 1))


def ids(parameters):
    return {id(parameter) for parameter in parameters}


@pytest.fixture(scope="module")
def yolo11n():
    return YOLO11(names=[str(i) for i in range(80)], scale="n")


@pytest.mark.parametrize(
    ("batch", "nbs", "decay"),
    [(16, 64, 5e-4), (64, 64, 5e-4), (128, 64, 1e-3), (5, 64, 5e-4 * 65 / 64)],
)
def test_weight_decay_is_scaled_and_on_convolutions_alone(yolo11n, batch, nbs, decay):
    optimizer = make_optimizer([yolo11n], Recipe(1, batch, nbs))
    groups = {group["name"]: group for group in optimizer.param_groups}
    assert groups["weights"]["weight_decay"] == pytest.approx(decay)
    assert groups["norms"]["weight_decay"] == 0
    assert groups["biases"]["weight_decay"] == 0

    modules = list(yolo11n.modules())
    convolutions = [m.weight for m in modules if isinstance(m, nn.Conv2d)]
    learning = [weight for weight in convolutions if weight.requires_grad]
    assert ids(groups["weights"]["params"]) == ids(learning)
    norms = [m.weight for m in modules if isinstance(m, nn.BatchNorm2d)]
    assert ids(groups["norms"]["params"]) == ids(norms)


def counts(optimizer):
    return {group["name"]: len(group["params"]) for group in optimizer.param_groups}


def test_the_groups_are_as_large_as_the_public_trainers(yolo11n):
    # it prints for yolo11n: 81 norms, 88 weights with DFL's frozen one, 87 biases
    optimizer = make_optimizer([yolo11n], Recipe(1, 64))
    assert counts(optimizer) == {"norms": 81, "weights": 87, "biases": 87}


def test_several_modules_share_the_groups_and_frozen_ones_are_left_out():
    align = nn.Conv2d(4, 4, 1, bias=False)
    frozen = small(1).requires_grad_(False)
    optimizer = make_optimizer([small(), align, frozen], Recipe(1, 64))
    assert counts(optimizer) == {"weights": 3, "norms": 1, "biases": 3}
    assert id(align.weight) in ids(optimizer.param_groups[0]["params"])


def test_a_setting_reaches_the_groups():
    optimizer = make_optimizer([small()], Recipe(1, 64))
    apply_setting(optimizer, Setting(lr=0.3, bias_lr=0.7, momentum=0.55, accumulate=2))
    lrs = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert lrs == {"weights": 0.3, "norms": 0.3, "biases": 0.7}
    assert {group["momentum"] for group in optimizer.param_groups} == {0.55}


# --- updates


def fill_gradients(model, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator) * scale


def update(model, optimizer, seed):
    fill_gradients(model, seed)
    optimizer.step()


def same(ones, others):
    """Which of the tensors are equal to the bit."""
    return [torch.equal(one, other) for one, other in zip(ones, others, strict=True)]


def test_a_module_without_norms_or_biases_is_optimised():
    layer = nn.Conv2d(2, 2, 1, bias=False)
    before = layer.weight.detach().clone()
    update(layer, make_optimizer([layer], Recipe(1, 64)), seed=0)
    assert not torch.equal(layer.weight, before)


def plain_sgd(model):
    """torch's own, over the groups written out."""
    named = dict(model.named_parameters())
    return torch.optim.SGD(
        [
            {"params": [named["0.weight"], named["3.weight"]], "weight_decay": 0.05},
            {"params": [named["1.weight"]]},
            {"params": [named["0.bias"], named["1.bias"], named["3.bias"]]},
        ],
        lr=1.0,
        momentum=0.9,
        nesterov=True,
        fused=False,
        foreach=False,
    )


def test_updates_equal_the_plain_optimiser_of_torch():
    recipe = Recipe(epochs=4, batch=64, weight_decay=0.05)
    model = small()
    optimizer = make_optimizer([model], recipe)
    plain = small()
    reference = plain_sgd(plain)
    for step in range(12):
        setting = recipe.at(step * 10, 30)
        apply_setting(optimizer, setting)
        lrs = [setting.lr, setting.lr, setting.bias_lr]
        for group, lr in zip(reference.param_groups, lrs, strict=True):
            group["lr"] = lr
            group["momentum"] = setting.momentum
        update(model, optimizer, step)
        update(plain, reference, step)
        for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-7)
    assert not torch.allclose(model[0].weight, small()[0].weight, atol=1e-2)


def momenta(optimizer, model):
    return [optimizer.state[p]["momentum_buffer"] for p in model.parameters()]


@pytest.mark.parametrize("updates_before", [0, 3])
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1.0])
def test_an_update_with_found_inf_changes_nothing(updates_before, bad):
    model = small()
    optimizer = make_optimizer([model], Recipe(1, 64))
    for seed in range(updates_before):
        update(model, optimizer, seed)
    weights = [p.detach().clone() for p in model.parameters()]
    buffers = [m.clone() for m in momenta(optimizer, model)]
    assert all((m == 0).all() for m in buffers) == (updates_before == 0)

    fill_gradients(model, 9, bad)
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert all(same(model.parameters(), weights))
    assert all(same(momenta(optimizer, model), buffers))

    optimizer.found_inf = torch.tensor(0.0)  # and the next one is made as if nothing had happened
    update(model, optimizer, seed=10)
    assert not any(same(model.parameters(), weights))
    assert all(p.isfinite().all() for p in model.parameters())


def test_the_optimiser_goes_on_from_its_saved_state():
    model = small()
    optimizer = make_optimizer([model], Recipe(1, 64))
    for seed in range(3):
        update(model, optimizer, seed)
    other = small(5)
    other.load_state_dict(model.state_dict())
    resumed = make_optimizer([other], Recipe(1, 64))
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))

    update(model, optimizer, seed=3)
    update(other, resumed, seed=3)
    assert all(same(model.parameters(), other.parameters()))


# --- other schedules, and AdamW


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("linear", [1.0, 1.0, 0.8, 0.8, 0.6, 0.6, 0.4, 0.4, 0.2, 0.2]),  # epoch by epoch
        ("constant", [1.0] * 10),
        ("poly", [(1 - step / 10) ** 0.5 for step in range(10)]),  # step by step
    ],
)
def test_the_learning_rate_falls_as_the_schedule_says(schedule: str, expected: list) -> None:
    recipe = Recipe(5, 8, lr0=2.0, lrf=0.1, warmup_epochs=0, schedule=schedule, power=0.5)
    rates = [recipe.at(step, 2).lr for step in range(10)]
    assert rates == pytest.approx([2.0 * (0.1 + 0.9 * height) for height in expected])


def test_adamw_has_the_groups_and_the_momentum_of_the_recipe() -> None:
    recipe = Recipe(1, 64, optimizer="adamw", lr0=0.001, momentum=0.9, weight_decay=0.01)
    optimizer = make_optimizer([small()], recipe)
    assert isinstance(optimizer, torch.optim.AdamW)
    decays = {group["name"]: group["weight_decay"] for group in optimizer.param_groups}
    assert decays == {"weights": 0.01, "norms": 0.0, "biases": 0.0}
    apply_setting(optimizer, Setting(lr=0.5, bias_lr=0.25, momentum=0.8, accumulate=1))
    for group in optimizer.param_groups:
        assert group["betas"] == (0.8, 0.999)
        assert group["lr"] == (0.25 if group["name"] == "biases" else 0.5)
        assert "momentum" not in group


def test_adamw_leaves_out_a_step_without_a_finite_gradient() -> None:
    """The very first one too."""
    model = small()
    optimizer = make_optimizer([model], Recipe(1, 64, optimizer="adamw"))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, torch.nan)
    optimizer.found_inf = torch.ones(())  # type: ignore
    optimizer.step()
    assert all(map(torch.equal, before, model.parameters()))
    optimizer.found_inf = torch.zeros(())  # type: ignore
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for parameter, old in zip(model.parameters(), before, strict=True):
        assert parameter.isfinite().all()
        assert not torch.equal(parameter, old)
