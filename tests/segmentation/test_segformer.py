"""SegFormer: its sizes to the digit, its taps, its attention."""

from typing import Any

import pytest
import torch

from kdmini.check import is_even
from kdmini.distill.taps import Taps, feats_of
from kdmini.segmentation.segformer import SegFormer
from kdmini.segmentation.segformer_files import SIZES

# parameters with 150 classes, with 21, and of the encoder with ImageNet's head
COUNTS = {
    "b0": (3_752_694, 3_719_541, 3_576_392),
    "b1": (13_715_798, 13_682_645, 13_664_424),
    "b2": (27_461_974, 27_362_773, 24_709_288),
    "b3": (47_337_814, 47_238_613, 44_585_128),
    "b4": (64_108_374, 64_009_173, 61_355_688),
    "b5": (84_708_694, 84_609_493, 81_956_008),
}
# the same of PVTv2, as timm has them, with ImageNet's head
PVT_V2 = {"b0": 3_666_760, "b1": 14_009_000, "b2": 25_362_856, "b3": 45_238_696, "b4": 62_556_072}


def on_meta(size: Any, classes: int = 21, **settings: Any) -> SegFormer:
    with torch.device("meta"):
        return SegFormer([f"class {row}" for row in range(classes)], size, **settings)


def with_imagenet_head(network: SegFormer) -> int:
    channels = SIZES[network.card["size"]][1][3]
    encoder = sum(parameter.numel() for parameter in network.stages.parameters())
    return encoder + 1000 * (channels + 1)


@pytest.mark.parametrize("size", COUNTS)
def test_parameters_to_the_digit(size: str) -> None:
    counts = []
    for classes in (150, 21):
        network = on_meta(size, classes)
        counts.append(sum(parameter.numel() for parameter in network.parameters()))
    assert (*counts, with_imagenet_head(network)) == COUNTS[size]


@pytest.mark.parametrize("size", PVT_V2)
def test_with_other_ratios_it_has_the_parameters_of_pvt_v2(size: str) -> None:
    assert with_imagenet_head(on_meta(size, ratios=(8, 8, 4, 4))) == PVT_V2[size]


def test_every_stage_and_the_decoder_give_a_map() -> None:
    taps = ["stages.0", "stages.1", "stages.2", "stages.3", "decoder"]
    feats = feats_of(SegFormer(["cat"]), taps, torch.rand(2, 3, 64, 96))
    shapes = [tuple(feats[tap].shape) for tap in taps]
    assert shapes == [
        (2, 32, 16, 24),
        (2, 64, 8, 12),
        (2, 160, 4, 6),
        (2, 256, 2, 3),
        (2, 256, 16, 24),
    ]


def test_a_tap_before_the_norm_of_a_stage_shows_where_it_fires() -> None:
    """After a LayerNorm every cell is as strong as another."""
    torch.manual_seed(0)
    network = SegFormer(["cat"]).eval()
    for parameter in network.stages[1].blocks.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # as if they had learned
    taps = ["stages.1", "stages.1.before_norm"]
    feats = feats_of(network, taps, torch.rand(2, 3, 64, 96))
    after, before = (feats[tap] for tap in taps)
    normed = network.stages[1].norm(before.flatten(2).mT).mT.unflatten(2, (8, 12))
    assert torch.equal(normed, after)
    assert is_even(after)
    assert not is_even(before)


def test_attention_is_a_graph_whose_keys_are_the_same_positions_in_all_stages() -> None:
    """Its own test of the numbers is that of the parity tests."""
    taps = [f"stages.{stage}.blocks.1.attn.graph" for stage in range(4)]
    graphs = feats_of(SegFormer(["cat"]), taps, torch.rand(2, 3, 64, 96))
    for stage, (tap, heads) in enumerate(zip(taps, (1, 2, 5, 8), strict=True)):
        queries = 16 * 24 // 4**stage
        assert graphs[tap].shape == (2, heads, queries, 6)
        assert torch.allclose(graphs[tap].sum(3), torch.ones(2, heads, queries))


def test_attention_weights_are_made_only_where_they_are_tapped() -> None:
    network = SegFormer(["cat"])
    softmaxes = []
    whole = torch.Tensor.softmax

    def counted(tensor: torch.Tensor, dim: int) -> torch.Tensor:
        softmaxes.append(tensor.shape)
        return whole(tensor, dim)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "softmax", counted)
        network(torch.rand(1, 3, 64, 64))
        assert softmaxes == []
        taps = Taps(network, ["stages.2.blocks.0.attn.graph"])
        network(torch.rand(1, 3, 64, 64))
        assert softmaxes == [(1, 5, 16, 4)]
        taps.remove()
        network(torch.rand(1, 3, 64, 64))
    assert len(softmaxes) == 1


def test_branches_are_skipped_in_training_alone_and_more_so_the_deeper() -> None:
    network = SegFormer(["cat"], drop_path=0.7)
    rates = [block.drop_path.p for stage in network.stages for block in stage.blocks]
    assert rates == pytest.approx([0.1 * number for number in range(8)])
    images = torch.rand(1, 3, 64, 64)
    network.eval()
    assert torch.equal(network(images)[0], network(images)[0])

    tokens = torch.rand(64, 4, 256)
    block = network.stages[3].blocks[1].train()
    with torch.no_grad():
        untouched = (block(tokens, (2, 2)) == tokens).all(2).all(1)
    assert 0.3 < untouched.float().mean() < 0.7  # both branches, 0.49


def test_the_first_layers_begin_as_the_authors_have_it() -> None:
    torch.manual_seed(0)
    network = SegFormer(["cat"], "b1")
    deviations = {
        "stages.0.embed.proj": (2 / (49 * 64)) ** 0.5,
        "stages.1.blocks.0.mlp.dwconv": (2 / 9) ** 0.5,
        "stages.2.blocks.0.attn.kv": 0.02,
    }
    for name, deviation in deviations.items():
        module = network.get_submodule(name)
        assert module.weight.std().item() == pytest.approx(deviation, rel=0.03)
        assert not module.bias.any()


def test_its_card_is_enough_to_build_it_again() -> None:
    network = on_meta("b1", ratios=(8, 8, 4, 4))
    card = network.card
    again = on_meta(card["size"], ratios=card["ratios"])
    shapes = {key: value.shape for key, value in again.state_dict().items()}
    assert shapes == {key: value.shape for key, value in network.state_dict().items()}
    assert card == {"network": "SegFormer", "size": "b1", "ratios": [8, 8, 4, 4], "license": ""}
