"""ResNet and wide ResNets: their sizes to the digit, their taps."""

import pytest
import torch

from kdmini.classification.resnet import ResNet
from kdmini.classification.wide_resnet import Block, WideResNet
from kdmini.distill.taps import feats_of

TEN = [f"class {row}" for row in range(10)]


def parameters(network: torch.nn.Module) -> int:
    return sum(value.numel() for value in network.parameters())


def by_hand(depth: int, width: int) -> int:
    """Of convolutions, norms and the last layer of a WRN for ten classes, layer by layer."""
    total = 3 * 16 * 9
    channels = 16
    for own in (16 * width, 32 * width, 64 * width):
        for _ in range((depth - 4) // 6):
            total += 2 * channels + 9 * channels * own
            total += 2 * own + 9 * own * own
            total += channels * own if channels != own else 0
            channels = own
    return total + 2 * channels + 10 * channels + 10


@pytest.mark.parametrize(
    ("depth", "width", "count", "millions"),
    [  # millions: as the paper on attention transfer prints them
        (16, 1, 175_066, "0.2"),
        (16, 2, 691_674, "0.7"),
        (40, 1, 563_930, "0.6"),
        (40, 2, 2_243_546, "2.2"),
    ],
)
def test_wide_resnets_are_of_the_size_of_the_paper(
    depth: int, width: int, count: int, millions: str
) -> None:
    network = WideResNet(TEN, depth, width)
    assert parameters(network) == by_hand(depth, width) == count
    assert f"{count / 1e6:.1f}" == millions
    convolutions = [m for m in network.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len([m for m in convolutions if m.kernel_size == (3, 3)]) + 1 == depth - 2


@pytest.mark.parametrize(("depth", "count"), [(18, 11_689_512), (34, 21_797_672), (50, 25_557_032)])
def test_resnets_are_of_the_size_of_torchvision(depth: int, count: int) -> None:
    assert parameters(ResNet([f"class {row}" for row in range(1000)], depth)) == count


def shapes_of(network: torch.nn.Module, taps: list[str], size: int) -> list[tuple[int, ...]]:
    feats = feats_of(network, taps, torch.rand(2, 3, size, size))
    return [tuple(feats[tap].shape) for tap in taps]


def test_the_groups_are_taps() -> None:
    network = WideResNet(TEN, depth=10, width=2)
    shapes = shapes_of(network, ["group1", "group2", "group3"], 32)
    assert shapes == [(2, 32, 32, 32), (2, 64, 16, 16), (2, 128, 8, 8)]


@pytest.mark.parametrize(("stem", "stride"), [("imagenet", 4), ("cifar", 1)])
def test_the_layers_are_taps(stem, stride: int) -> None:
    network = ResNet(TEN, stem=stem)
    taps = ["layer1", "layer2", "layer3", "layer4"]
    sides = [64 // stride // 2**level for level in range(4)]
    channels = (64, 128, 256, 512)
    expected = [(2, c, side, side) for c, side in zip(channels, sides, strict=True)]
    assert shapes_of(network, taps, 64) == expected


def test_features_runs_all_but_the_head() -> None:
    network = WideResNet(TEN, depth=10).eval()
    calls = []
    for name in ("group3", "fc"):
        network.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.append(name))
    assert network.features(torch.rand(1, 3, 32, 32)) is None
    assert calls == ["group3"]


def test_a_shortcut_of_another_width_reads_what_is_activated() -> None:
    """As in the authors' code; one of the same width passes the input itself."""
    block = Block(4, 6, stride=2).eval()
    torch.nn.init.zeros_(block.conv2.weight)
    x = torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(block(x), block.shortcut(block.norm1(x).relu()))
    same = Block(4, 4, stride=1).eval()
    torch.nn.init.zeros_(same.conv2.weight)
    assert torch.equal(same(x), x)
