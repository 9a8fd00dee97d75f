"""The average of the weights, against a plain loop."""

import copy
import math

import pytest
import torch
from torch import nn

from kdmini.optim import EMA
from tests.pretended import Operations
from tests.test_optim import small


def move(model, seed):
    """Changes weights and BatchNorm statistics."""
    torch.manual_seed(seed)
    model.train()(torch.randn(2, 3, 8, 8) * 3 + seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)


def copied(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def decay_after(updates, decay=0.9, tau=5.0):
    return decay * (1 - math.exp(-updates / tau))


def test_it_equals_a_plain_loop_over_weights_and_statistics():
    model = small()
    ema = EMA(model, decay=0.9, tau=5.0)
    expected = {name: value.double() for name, value in model.state_dict().items()}
    del expected["1.num_batches_tracked"]
    assert {"1.running_mean", "1.running_var", "1.weight", "3.bias"} <= set(expected)
    for step in range(1, 11):
        move(model, step)
        ema.update(model)
        share = decay_after(step)
        state = model.state_dict()
        average = ema.average.state_dict()
        for name, value in expected.items():
            expected[name] = share * value + (1 - share) * state[name].double()
            assert torch.allclose(average[name].double(), expected[name], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(average["1.running_mean"], model[1].running_mean, atol=0.1)


def test_the_count_of_batches_is_copied():
    model = small()
    ema = EMA(model, decay=0.9, tau=5.0)
    for step in range(1, 4):
        move(model, step)
        ema.update(model)
        assert ema.average[1].num_batches_tracked == model[1].num_batches_tracked == step


def test_it_is_a_frozen_copy_in_evaluation_mode():
    model = small().train()
    ema = EMA(model, 0.9, 5.0)
    assert not any(module.training for module in ema.average.modules())
    assert not any(p.requires_grad for p in ema.average.parameters())
    ours = {p.data_ptr() for p in ema.average.parameters()}
    assert not ours & {p.data_ptr() for p in model.parameters()}
    assert model.training
    assert all(p.requires_grad for p in model.parameters())


@pytest.fixture
def moved():
    """-> a model that has moved on since the last update, and its average."""
    model = small()
    ema = EMA(model, 0.9, 5.0)
    move(model, 1)
    ema.update(model)
    move(model, 2)
    return model, ema


def test_it_stays_where_the_update_was_skipped(moved):
    model, ema = moved
    before = copied(ema.average)
    ema.update(model, torch.tensor(1.0))
    after = ema.average.state_dict()
    for name in before.keys() - {"1.num_batches_tracked"}:
        assert torch.equal(after[name], before[name]), name


def test_an_update_that_was_not_skipped_is_one_like_any_other(moved):
    model, ema = moved
    before = copied(ema.average)
    plain = copy.deepcopy(ema)
    plain.update(model)
    ema.update(model, torch.tensor(0.0))
    after = ema.average.state_dict()
    for name, value in plain.average.state_dict().items():
        assert torch.allclose(value.float(), after[name].float(), atol=1e-7), name
    assert not torch.equal(after["0.weight"], before["0.weight"])


@pytest.fixture
def two_types():
    """-> a model of float32 and float64, with a buffer of integers, and its average."""
    model = nn.Sequential(small(), nn.BatchNorm1d(3).double())
    model.register_buffer("count", torch.tensor(7))
    ema = EMA(model, 0.9, 5.0)
    move(model[0], 1)
    ema.update(model, torch.tensor(0.0))
    move(model[0], 2)
    return model, ema


SKIPPED = pytest.mark.parametrize("skipped", [0.0, 1.0])
BAD = pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])


def spoil(model, bad):
    """Three numbers among the statistics."""
    model[0][1].running_mean[3] = bad
    model[0][1].running_var[0] = bad
    model[1].running_mean[2] = bad


@SKIPPED
@BAD
def test_statistics_that_are_not_finite_are_replaced_by_those_of_the_average(
    two_types, bad, skipped
):
    model, ema = two_types
    spoil(model, bad)
    before = copied(model)
    average = copied(ema.average)
    ema.update(model, torch.tensor(skipped))
    for name, value in model.state_dict().items():
        mended = torch.where(before[name].isfinite(), before[name], average[name])
        assert torch.equal(value, mended), name
        assert value.dtype == before[name].dtype


@SKIPPED
@BAD
def test_they_do_not_reach_the_average(two_types, bad, skipped):
    model, ema = two_types
    spoil(model, bad)
    before = copied(ema.average)
    ema.update(model, torch.tensor(skipped))
    after = ema.average.state_dict()
    assert all(value.isfinite().all() for value in after.values())
    differ = {name for name in after if not torch.equal(after[name], before[name])}
    if skipped:
        assert differ == {"0.1.num_batches_tracked"}
    else:
        assert {"0.1.num_batches_tracked", "0.1.running_mean"} <= differ


def test_a_model_without_buffers_has_an_average_too():
    layer = nn.Linear(2, 1)
    ema = EMA(layer, 0.9, 5.0)
    before = layer.weight.detach().clone()
    with torch.no_grad():
        layer.weight += 1
    ema.update(layer, torch.tensor(0.0))
    way = torch.tensor(1 - decay_after(1))
    assert torch.allclose(ema.average.weight - before, way)


def test_it_goes_on_from_its_saved_state():
    model = small()
    ema = EMA(model, 0.9, 5.0)
    for step in range(3):
        move(model, step)
        ema.update(model)
    other = EMA(small(7), 0.9, 5.0)
    other.load_state_dict(copy.deepcopy(ema.state_dict()))
    move(model, 3)
    ema.update(model)
    other.update(model)
    assert other.updates == ema.updates == 4
    for name, value in ema.average.state_dict().items():
        assert torch.equal(value, other.average.state_dict()[name]), name


def test_a_state_of_fewer_updates_than_none_is_refused():
    ema = EMA(nn.Linear(1, 1), decay=0.9, tau=10)
    with pytest.raises(ValueError, match="an average of -1 updates"):
        ema.load_state_dict({**ema.state_dict(), "updates": -1})


def test_an_update_takes_no_more_operations_for_a_larger_model():
    counts = []
    for size in (1, 5):
        model = nn.Sequential(*[small() for _ in range(size)])
        ema = EMA(model, decay=0.9, tau=5.0)
        with Operations() as operations:
            ema.update(model)
        counts.append(sum(n for name, n in operations.counts.items() if name != "detach"))
    assert counts[0] == counts[1]
