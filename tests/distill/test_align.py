"""Alignment: which taps get a convolution, and what it computes."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kdmini.distill.align import Align
from tests.distill.small import distil, pair

SHAPES = {"a": (4, 6, 5, 5), "b.0": (8, 8, 3, 3)}  # student and teacher C, H, W


@pytest.fixture
def feats() -> dict[str, Tensor]:
    torch.manual_seed(3)
    return {tap: torch.randn(4, cs, h, w) for tap, (cs, _, h, w) in SHAPES.items()}


@pytest.mark.parametrize(
    "mode, weights, learn",
    [
        ("all", [24, 64], True),
        ("unequal", [24], True),
        ("none", [], False),
        ("frozen", [24, 64], False),
    ],
)
def test_which_parameters_an_alignment_has(mode: Any, weights: list[int], learn: bool) -> None:
    align = Align(SHAPES, mode)
    assert [p.numel() for p in align.parameters()] == weights
    assert all(p.requires_grad == learn for p in align.parameters())
    norms = [m for m in align.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == len(weights)
    assert not any(m.affine for m in norms)
    assert all(m.bias is None for m in align.modules() if isinstance(m, nn.Conv2d))


@pytest.mark.parametrize(
    "mode, channels", [("all", [6, 8]), ("unequal", [6, 8]), ("none", [4, 8]), ("frozen", [6, 8])]
)
def test_channels_after_an_alignment(mode: Any, channels: list[int], feats) -> None:
    aligned = Align(SHAPES, mode)(feats)
    assert list(aligned) == list(SHAPES)
    assert [feat.shape[1] for feat in aligned.values()] == channels
    if mode in ("none", "unequal"):
        assert torch.equal(aligned["b.0"], feats["b.0"])


def test_alignment_of_all_is_the_default() -> None:
    student, teacher = pair()
    assert len(list(Align(SHAPES).parameters())) == 2
    assert len(list(distil(student, teacher, {}).align.parameters())) == 2


def test_alignment_is_a_1x1_convolution_and_batchnorm(feats) -> None:
    align = Align(SHAPES)
    for (tap, aligned), layer in zip(align(feats).items(), align.layers, strict=True):
        mixed = torch.einsum("nchw,oc->nohw", feats[tap], layer[0].weight[:, :, 0, 0])
        mean = mixed.mean((0, 2, 3), keepdim=True)
        var = mixed.var((0, 2, 3), keepdim=True, unbiased=False)
        assert torch.allclose(aligned, (mixed - mean) / (var + 1e-5).sqrt(), atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_a_bias_would_be_inert(training: bool, feats) -> None:
    align = Align(SHAPES)
    with_bias = copy.deepcopy(align)
    for layer, (cs, ct, _, _) in zip(with_bias.layers, SHAPES.values(), strict=True):
        conv = nn.Conv2d(cs, ct, 1, bias=True)
        conv.weight = layer[0].weight
        layer[0] = conv
    for module in (align, with_bias):
        for layer in module.layers:
            layer[1].momentum = 1.0  # so that one step is all that the running mean knows
        module.train()(feats)
        module.train(training)
    plain = align(feats)
    biased = with_bias(feats)
    for tap in SHAPES:
        assert torch.allclose(plain[tap], biased[tap], atol=1e-5)


def test_a_missing_tap_is_refused(feats) -> None:
    with pytest.raises(KeyError):
        Align(SHAPES)({"a": feats["a"]})
