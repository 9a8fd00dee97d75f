"""The schedule, against closed forms; the fused optimiser, against torch's plain one; EMA, against
a plain loop.
"""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from kdmini.detection.yolo11.model import YOLO11
from kdmini.optim import EMA, Recipe, Setting, apply_setting, make_sgd

RECIPES = [
    (Recipe(epochs=50, batch=64), 100),
    (
        Recipe(epochs=12, batch=16, lr0=0.02, lrf=0.1),
        7,
    ),  # 100 steps of warm-up: over fourteen epochs
    (Recipe(epochs=30, batch=5, nbs=64), 41),  # 12.8 batches an update; warm-up over 123 steps
    (Recipe(epochs=10, batch=128, nbs=64, warmup_epochs=1.25, warmup_steps=1), 33),  # 41.25 steps
    (Recipe(epochs=6, batch=16, nbs=16, warmup_epochs=0), 9),
    (Recipe(epochs=1, batch=8, warmup_bias_lr=0.0, warmup_momentum=0.5), 300),
]


@pytest.mark.parametrize(("recipe", "per_epoch"), RECIPES)
def test_the_whole_run_follows_the_closed_forms(recipe, per_epoch):
    total = recipe.epochs * per_epoch
    warm = (
        max(round(recipe.warmup_epochs * per_epoch), recipe.warmup_steps)
        if recipe.warmup_epochs
        else -1
    )
    for step in range(total):
        epoch = step // per_epoch
        lowest = recipe.lr0 * recipe.lrf
        lr = lowest + (recipe.lr0 - lowest) * math.cos(math.pi * epoch / recipe.epochs / 2) ** 2
        bias_lr, momentum, accumulate = (
            lr,
            recipe.momentum,
            max(round(recipe.nbs / recipe.batch), 1),
        )
        if step <= warm:
            between = [0, warm]
            bias_lr = np.interp(step, between, [recipe.warmup_bias_lr, lr])
            accumulate = max(
                1, int(np.interp(step, between, [1, recipe.nbs / recipe.batch]).round())
            )
            momentum = np.interp(step, between, [recipe.warmup_momentum, recipe.momentum])
            lr = np.interp(step, between, [0.0, lr])
        found = recipe.at(step, per_epoch)
        assert (found.lr, found.bias_lr, found.momentum) == pytest.approx(
            (lr, bias_lr, momentum), rel=1e-12, abs=1e-15
        )
        assert found.accumulate == accumulate


def test_landmarks_of_the_public_recipe():
    recipe = Recipe(epochs=100, batch=16)
    assert recipe.at(0, 1000) == Setting(0.0, 0.1, 0.8, 1)
    assert recipe.at(3000, 1000).lr == pytest.approx(recipe.at(3000, 1000).bias_lr)
    assert (
        recipe.at(3000, 1000).momentum == pytest.approx(0.937)
        and recipe.at(3000, 1000).accumulate == 4
    )
    assert recipe.at(50_000, 1000).lr == pytest.approx(0.01 * 0.505)
    assert (
        recipe.at(99_999, 1000).lr == recipe.at(99_000, 1000).lr
    )  # epoch by epoch, not step by step
    assert recipe.at(99_999, 1000).lr == pytest.approx(0.01 * 0.01, rel=0.03)
    assert recipe.accumulate == 4 and Recipe(epochs=1, batch=200).accumulate == 1
    lrs = [recipe.at(step, 10).lr for step in range(100, 1000)]
    assert lrs == sorted(lrs, reverse=True)  # no sawtooth


@pytest.mark.parametrize(
    ("batch", "nbs", "decay"),
    [(16, 64, 5e-4), (64, 64, 5e-4), (128, 64, 1e-3), (5, 64, 5e-4 * 65 / 64)],
)
def test_weight_decay_is_scaled_and_on_convolutions_alone(batch, nbs, decay):
    detector = YOLO11(names=[str(i) for i in range(80)], scale="n")
    groups = {
        group["name"]: group for group in make_sgd([detector], Recipe(1, batch, nbs)).param_groups
    }
    # what the public trainer prints for yolo11n: 81 norms, 88 weights with DFL's frozen one, 87
    # biases
    assert {name: len(group["params"]) for name, group in groups.items()} == {
        "norms": 81,
        "weights": 87,
        "biases": 87,
    }
    assert groups["weights"]["weight_decay"] == pytest.approx(decay)
    assert groups["norms"]["weight_decay"] == groups["biases"]["weight_decay"] == 0
    decayed = {id(parameter) for parameter in groups["weights"]["params"]}
    convolutions = [
        m.weight for m in detector.modules() if isinstance(m, nn.Conv2d) and m.weight.requires_grad
    ]
    assert decayed == {id(weight) for weight in convolutions}
    norms = [m.weight for m in detector.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {id(parameter) for parameter in groups["norms"]["params"]} == {
        id(weight) for weight in norms
    }


def small(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 4, 1))


def fill_gradients(model, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator) * scale


def momenta(optimizer, model):
    return [optimizer.state[p]["momentum_buffer"] for p in model.parameters()]


def test_several_modules_share_the_groups_and_frozen_ones_are_left_out():
    model, align, frozen = small(), nn.Conv2d(4, 4, 1, bias=False), small(1).requires_grad_(False)
    optimizer = make_sgd([model, align, frozen], Recipe(1, 64))
    counts = {group["name"]: len(group["params"]) for group in optimizer.param_groups}
    assert counts == {"weights": 3, "norms": 1, "biases": 3}
    assert any(p is align.weight for p in optimizer.param_groups[0]["params"])


def test_a_module_without_norms_or_biases_is_optimised():
    layer = nn.Conv2d(2, 2, 1, bias=False)
    optimizer = make_sgd([layer], Recipe(1, 64))
    before = layer.weight.detach().clone()
    fill_gradients(layer, 0)
    optimizer.step()
    assert not torch.equal(layer.weight, before)


def test_a_setting_reaches_the_groups():
    optimizer = make_sgd([small()], Recipe(1, 64))
    apply_setting(optimizer, Setting(lr=0.3, bias_lr=0.7, momentum=0.55, accumulate=2))
    assert {group["name"]: group["lr"] for group in optimizer.param_groups} == {
        "weights": 0.3,
        "norms": 0.3,
        "biases": 0.7,
    }
    assert {group["momentum"] for group in optimizer.param_groups} == {0.55}


def test_steps_equal_the_plain_optimiser_of_torch():
    recipe = Recipe(epochs=4, batch=64, weight_decay=0.05)
    model, plain = small(), small()
    optimizer = make_sgd([model], recipe)
    named = dict(plain.named_parameters())
    reference = torch.optim.SGD(
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
    for step in range(12):
        setting = recipe.at(step * 10, 30)
        apply_setting(optimizer, setting)
        for group, lr in zip(
            reference.param_groups, (setting.lr, setting.lr, setting.bias_lr), strict=True
        ):
            group["lr"], group["momentum"] = lr, setting.momentum
        for side, rule in ((model, optimizer), (plain, reference)):
            fill_gradients(side, step)
            rule.step()
        for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-7)
    assert not torch.allclose(model[0].weight, small()[0].weight, atol=1e-2)


@pytest.mark.parametrize("steps_before", [0, 3])
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1.0])
def test_a_step_with_found_inf_changes_nothing(steps_before, bad):
    model = small()
    optimizer = make_sgd([model], Recipe(1, 64))
    for step in range(steps_before):
        fill_gradients(model, step)
        optimizer.step()
    weights = [p.detach().clone() for p in model.parameters()]
    buffers = [m.clone() for m in momenta(optimizer, model)]
    assert all((m == 0).all() for m in buffers) == (steps_before == 0)
    fill_gradients(model, 9, bad)
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))
    assert all(torch.equal(m, b) for m, b in zip(momenta(optimizer, model), buffers, strict=True))
    fill_gradients(model, 10)
    optimizer.found_inf = torch.tensor(0.0)  # and the next one is made as if nothing had happened
    optimizer.step()
    assert not any(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))
    assert all(p.isfinite().all() for p in model.parameters())


def test_the_optimiser_goes_on_from_its_saved_state():
    model = small()
    optimizer = make_sgd([model], Recipe(1, 64))
    for step in range(3):
        fill_gradients(model, step)
        optimizer.step()
    other = small(5)
    other.load_state_dict(model.state_dict())
    resumed = make_sgd([other], Recipe(1, 64))
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for side, rule in ((model, optimizer), (other, resumed)):
        fill_gradients(side, 3)
        rule.step()
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True)
    )


def moving(model, step):
    """Changes weights and BatchNorm statistics."""
    torch.manual_seed(step)
    model.train()(torch.randn(2, 3, 8, 8) * 3 + step)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)


def test_ema_equals_a_plain_loop_over_weights_and_statistics():
    model = small()
    ema = EMA(model, decay=0.9, tau=5.0)
    expected = {name: value.double() for name, value in model.state_dict().items()}
    names = [name for name, value in expected.items() if "num_batches" not in name]
    assert {"1.running_mean", "1.running_var", "1.weight", "3.bias"} <= set(names)
    for step in range(1, 11):
        moving(model, step)
        ema.update(model)
        decay = 0.9 * (1 - math.exp(-step / 5.0))
        for name in names:
            expected[name] = (
                decay * expected[name] + (1 - decay) * model.state_dict()[name].double()
            )
        found = ema.average.state_dict()
        for name in names:
            assert torch.allclose(found[name].double(), expected[name], rtol=1e-5, atol=1e-6), name
        assert found["1.num_batches_tracked"] == model[1].num_batches_tracked
    assert not torch.allclose(found["1.running_mean"], model[1].running_mean, atol=0.1)


def test_ema_is_a_frozen_copy_in_evaluation_mode():
    model = small().train()
    ema = EMA(model, 0.9, 5.0)
    assert not any(module.training for module in ema.average.modules())
    assert not any(p.requires_grad for p in ema.average.parameters())
    assert not {p.data_ptr() for p in model.parameters()} & {
        p.data_ptr() for p in ema.average.parameters()
    }
    assert model.training and all(p.requires_grad for p in model.parameters())


def test_ema_stays_where_the_update_was_skipped():
    model = small()
    ema = EMA(model, 0.9, 5.0)
    moving(model, 1)
    ema.update(model)
    before = {name: value.clone() for name, value in ema.average.state_dict().items()}
    moving(model, 2)
    ema.update(model, torch.tensor(1.0))
    after = ema.average.state_dict()
    assert all(
        torch.equal(after[name], before[name]) for name in before if "num_batches" not in name
    )
    plain, told = copy.deepcopy(ema), copy.deepcopy(ema)
    plain.update(model)
    told.update(model, torch.tensor(0.0))
    moved = plain.average.state_dict(), told.average.state_dict()
    assert all(
        torch.allclose(moved[0][name].float(), moved[1][name].float(), atol=1e-7) for name in before
    )
    assert not torch.equal(moved[1]["0.weight"], before["0.weight"])


@pytest.mark.parametrize("skipped", [0.0, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_statistics_that_are_not_finite_are_replaced_by_those_of_the_average(bad, skipped):
    model = nn.Sequential(small(), nn.BatchNorm1d(3).double())  # of two types
    model.register_buffer("count", torch.tensor(7))
    ema = EMA(model, 0.9, 5.0)
    moving(model[0], 1)
    ema.update(model, torch.tensor(0.0))
    moving(model[0], 2)
    model[0][1].running_mean[3] = model[0][1].running_var[0] = model[1].running_mean[2] = bad
    before = {name: value.clone() for name, value in model.state_dict().items()}
    average = {name: value.clone() for name, value in ema.average.state_dict().items()}
    ema.update(model, torch.tensor(skipped))
    for name, value in model.state_dict().items():
        assert torch.equal(
            value, torch.where(before[name].isfinite(), before[name], average[name])
        ), name
        assert value.dtype == before[name].dtype
    after = ema.average.state_dict()
    assert all(value.isfinite().all() for value in after.values())
    moved = {name for name in after if not torch.equal(after[name], average[name])}
    assert (
        moved == ({"0.1.num_batches_tracked"} if skipped else moved)
        and "0.1.num_batches_tracked" in moved
    )
    assert ("0.1.running_mean" in moved) == (skipped == 0)


def test_a_model_without_buffers_has_an_average_too():
    layer = nn.Linear(2, 1)
    ema, before = EMA(layer, 0.9, 5.0), layer.weight.detach().clone()
    with torch.no_grad():
        layer.weight += 1
    ema.update(layer, torch.tensor(0.0))
    assert torch.allclose(
        ema.average.weight - before, torch.tensor(1 - 0.9 * (1 - math.exp(-1 / 5.0)))
    )


def test_ema_goes_on_from_its_saved_state():
    model = small()
    ema = EMA(model, 0.9, 5.0)
    for step in range(3):
        moving(model, step)
        ema.update(model)
    other = EMA(small(7), 0.9, 5.0)
    other.load_state_dict(copy.deepcopy(ema.state_dict()))
    moving(model, 3)
    ema.update(model)
    other.update(model)
    assert other.updates == ema.updates == 4
    for name, value in ema.average.state_dict().items():
        assert torch.equal(value, other.average.state_dict()[name]), name
