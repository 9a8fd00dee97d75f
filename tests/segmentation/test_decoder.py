"""The head of MLPs against itself as the paper writes it, in float64."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdmini.segmentation.decoder import Decoder
from kdmini.segmentation.maps import Segmenter

DIMS = [4, 6, 8, 10]
WIDTH = 5


@pytest.fixture
def decoder() -> Decoder:
    torch.manual_seed(0)
    decoder = Decoder(DIMS, WIDTH).double()
    for parameter in decoder.parameters():
        nn.init.normal_(parameter)
    return decoder


@pytest.fixture
def feats() -> list[Tensor]:
    torch.manual_seed(1)
    sizes = [(12, 8), (6, 4), (3, 2), (2, 1)]
    return [torch.randn(2, c, *size).double() for c, size in zip(DIMS, sizes, strict=True)]


def as_written(decoder: Decoder, feats: list[Tensor]) -> Tensor:
    """All maps enlarged and side by side, deepest first, and one layer over them."""
    levels = []
    for linear, feat in zip(decoder.linear, feats, strict=True):
        level = linear(feat.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        levels.append(F.interpolate(level, (12, 8), mode="bilinear", align_corners=False))
    return decoder.fuse(torch.cat(levels[::-1], dim=1))


@pytest.mark.parametrize("training", [True, False])
def test_the_sum_of_small_maps_is_the_paper_s(decoder, feats, training):
    decoder.train(training)
    written = copy.deepcopy(decoder)
    ours = decoder(feats)
    theirs = as_written(written, feats)
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)

    (ours * ours.detach().cos()).sum().backward()
    (theirs * theirs.detach().cos()).sum().backward()
    expected = dict(written.named_parameters())
    for name, parameter in decoder.named_parameters():
        assert parameter.grad.any(), name
        assert torch.allclose(parameter.grad, expected[name].grad, rtol=0, atol=1e-9), name
    for name, value in decoder.named_buffers():
        assert torch.allclose(value.double(), written.get_buffer(name).double(), atol=1e-12)


def test_a_merged_batchnorm_keeps_its_bias(decoder, feats):
    decoder.eval()
    nn.init.uniform_(decoder.fuse.norm.running_var)
    nn.init.normal_(decoder.fuse.norm.running_mean)
    expected = decoder(feats)

    class Network(Segmenter):
        """The least that can be folded."""

    network = Network(["a", "b"])
    network.decoder = decoder
    network.fold()
    assert isinstance(decoder.fuse.norm, nn.Identity)
    assert torch.allclose(decoder(feats), expected, rtol=0, atol=1e-12)


def test_nothing_of_the_largest_size_is_wider_than_the_outcome(decoder, feats):
    """As written, a map of 4 * WIDTH channels would be there."""
    widest = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            outcome = func(*args, **(kwargs or {}))
            if isinstance(outcome, Tensor) and outcome.shape[2:] == (12, 8):
                widest.append(outcome.shape[1])
            return outcome

    with Watch():
        decoder(feats)
    assert max(widest) == WIDTH
