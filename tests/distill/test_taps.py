"""Taps: found by name, fire in every forward pass, or say so."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from kdmini.contracts import UserError
from kdmini.distill.taps import Taps


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.stage = nn.ModuleList([nn.Conv2d(4, 4, 1), nn.Conv2d(4, 5, 1)])
        self.aside = nn.Conv2d(3, 3, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.stem(images)
        for layer in self.stage:
            x = layer(x)
        return x


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def test_keeps_the_outputs_under_their_names() -> None:
    net = Net()
    images = torch.rand(2, 3, 4, 4)
    taps = Taps(net, ["stage.1", "stem"])
    output = net(images)
    feats = taps.take()
    assert set(feats) == {"stage.1", "stem"}
    assert feats["stage.1"] is output
    assert torch.equal(feats["stem"], net.stem(images))
    assert feats["stem"].requires_grad  # the student learns through it


@pytest.mark.parametrize("name", ["stage.11", "module.stem", "stam", ""])
def test_an_unmatched_tap_is_refused_by_name(name: str) -> None:
    with pytest.raises(UserError, match=f"Net has no submodule {name!r}"):
        Taps(Net(), ["stem", name])


@pytest.mark.parametrize("name, near", [("stage.11", "stage.1"), ("stam", "stem")])
def test_the_nearest_submodule_is_proposed(name: str, near: str) -> None:
    with pytest.raises(UserError, match=f"did you mean {near}"):
        Taps(Net(), ["stem", name])


def test_a_refused_tap_leaves_no_hook() -> None:
    net = Net()
    with pytest.raises(UserError):
        Taps(net, ["stem", "steam"])
    assert hooks(net) == 0


def test_a_tap_that_does_not_fire_raises() -> None:
    net = Net()
    taps = Taps(net, ["stem", "aside"])
    net(torch.rand(1, 3, 4, 4))
    with pytest.raises(UserError, match="aside did not fire"):
        taps.take()


def test_feats_are_forgotten_once_taken() -> None:
    net = Net()
    taps = Taps(net, ["stem"])
    net(torch.rand(1, 3, 4, 4))
    taps.take()
    with pytest.raises(UserError, match="did not fire"):  # not those of the last step again
        taps.take()
    assert not taps._feats  # nor is memory held until the next step


class InPlace(Net):
    """With an activation behind the stem that overwrites the stem's map."""

    def __init__(self) -> None:
        super().__init__()
        self.stage.insert(0, nn.SiLU(inplace=True))


@pytest.mark.parametrize("gradients", [True, False])
def test_a_map_that_a_later_layer_overwrites_is_refused(gradients: bool) -> None:
    net = InPlace().requires_grad_(gradients)
    taps = Taps(net, ["stem"])
    net(torch.rand(1, 3, 4, 4))
    with pytest.raises(UserError, match="the map of 'stem' is overwritten by a later layer"):
        taps.take()


def test_the_layer_that_overwrites_may_be_tapped() -> None:
    net = InPlace()
    taps = Taps(net, ["stage.0"])
    images = torch.rand(1, 3, 4, 4)
    for _ in range(2):
        net(images)
        assert torch.equal(taps.take()["stage.0"], nn.functional.silu(net.stem(images)))


COMPILED = "before the model is compiled"


def test_a_model_compiled_in_place_is_refused() -> None:
    net = Net()
    net.compile()
    with pytest.raises(RuntimeError, match=COMPILED):
        Taps(net, ["stem"])


def test_a_compiled_copy_is_refused() -> None:
    compiled: Any = torch.compile(Net())
    with pytest.raises(RuntimeError, match=COMPILED):
        Taps(compiled, ["_orig_mod.stem"])


def test_a_model_with_a_compiled_part_is_refused() -> None:
    net = Net()
    net.stage[0].compile()
    with pytest.raises(RuntimeError, match=COMPILED):
        Taps(net, ["stem"])


def test_a_copy_made_before_has_no_hooks_and_one_made_after_has() -> None:
    """Why the average is built first."""
    net = Net()
    before = copy.deepcopy(net)
    taps = Taps(net, ["stem", "stage.0"])
    assert hooks(before) == 0
    assert hooks(net) == 2
    assert hooks(copy.deepcopy(net)) == 2
    before(torch.rand(1, 3, 4, 4))
    with pytest.raises(UserError, match="did not fire"):
        taps.take()


def test_removed_taps_leave_the_model_as_it_was() -> None:
    net = Net()
    taps = Taps(net, ["stem", "stage.0"])
    taps.remove()
    assert hooks(net) == 0


def test_names_in_the_state_dict_do_not_change() -> None:
    net = Net()
    keys = list(net.state_dict())
    Taps(net, ["stem"])
    assert list(net.state_dict()) == keys
