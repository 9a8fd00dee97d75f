"""Where networks look: which layers are drawn, and how far apart the maps are said to be."""

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
from kdmini.classification.resnet import ResNet
from kdmini.classification.wide_resnet import WideResNet
from kdmini.segmentation.fast_scnn import FastSCNN
from kdmini.segmentation.mamba import VMamba
from kdmini.segmentation.segformer import SegFormer
from kdmini.tools.maps import attention, distances, maps_at, own_taps, received
from kdmini.tools.scenes import Scenes

NAMES = ["ground", "circle"]
IMAGES = torch.rand(2, 3, 64, 64)


@pytest.mark.parametrize(
    "network, count",
    [(FastSCNN, 6), (SegFormer, 5), (VMamba, 5), (ResNet, 4), (WideResNet, 3)],
)
def test_every_stage_of_a_network_has_a_map(network, count: int) -> None:
    model = network(NAMES)
    taps = own_taps(model)
    maps = maps_at(taps, model, IMAGES)
    assert len(maps) == len(set(taps)) == count
    for feat in maps:
        assert feat.shape[0] == 2
        assert feat.shape[2] == feat.shape[3]


def test_of_a_transformer_each_stage_shows_its_last_block() -> None:
    graphs = [
        f"stages.{stage}.blocks.{block}.attn.graph" for stage, block in enumerate([2, 3, 5, 2])
    ]
    assert own_taps(SegFormer(NAMES, "b2")) == [*graphs, "decoder"]


def test_a_position_is_as_bright_as_the_attention_that_it_gets() -> None:
    graph = torch.rand(2, 3, 16, 4)
    maps = received(graph)
    assert maps.shape == (2, 3, 2, 2)
    for position in range(4):
        row, column = divmod(position, 2)
        torch.testing.assert_close(maps[..., row, column], graph[..., position].mean(2))


def test_maps_of_two_sizes_are_compared_at_the_smaller() -> None:
    coarse = torch.rand(2, 5, 4, 4)
    fine = coarse.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert distances(fine, coarse, None) == ["distance 0.000"] * 2
    assert distances(coarse, fine, fine)[0].endswith("to teacher 0.000 → 0.000")
    assert distances(torch.rand(1, 2, 6, 6), torch.rand(1, 3, 4, 4), None)[0] != "distance 0.000"

    pictures = np.zeros((2, 8, 8, 3))
    scenes = Scenes(torch.from_numpy(pictures).movedim(3, 1), [{"id": "a"}, {"id": "b"}], [])
    figure = attention(scenes, {"one": [fine], "other": [coarse]}, ["tap"])
    drawn = [layer.get_array() for layer in figure.axes[1].images[1::2]]
    np.testing.assert_allclose(drawn[0], drawn[1], atol=1e-6)
    assert "tap, 4x4" in [axis.get_title() for axis in figure.axes]


def test_an_untrained_network_has_bright_maps_and_a_true_distance():
    """However weak its features, where the eps of the loss would leave black ones."""
    torch.manual_seed(0)
    strong = torch.randn(2, 4, 6, 6)
    other = torch.randn(2, 8, 6, 6)
    captions = distances(strong, other, None)
    assert distances(1e-12 * strong, other, None) == captions
    to_goal = distances(other, strong, 1e-12 * other)
    assert to_goal[0].endswith(f"to teacher 0.000 → {captions[0][-5:]}")
