"""Fast-SCNN: its size to the digit, its taps, its own weight files."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from kdmini.checkpoint import save_best
from kdmini.contracts import UserError
from kdmini.distill.taps import feats_of
from kdmini.segmentation.fast_scnn import FastSCNN, means


@pytest.mark.parametrize("classes, count", [(19, 1_138_051), (21, 1_138_309)])
def test_parameters_to_the_digit(classes: int, count: int) -> None:
    network = FastSCNN([f"class {row}" for row in range(classes)])
    sizes = {name: value.numel() for name, value in network.named_parameters()}
    assert sum(size for name, size in sizes.items() if not name.startswith("aux_")) == count


def test_its_taps_give_maps() -> None:
    taps = ["higher", "stages.0", "stages.1", "stages.2", "pooled", "fusion"]
    feats = feats_of(FastSCNN(["cat"]), taps, torch.rand(2, 3, 64, 96))
    shapes = [tuple(feats[tap].shape) for tap in taps]
    assert shapes == [
        (2, 64, 8, 12),
        (2, 64, 4, 6),
        (2, 96, 2, 3),
        (2, 128, 2, 3),
        (2, 128, 2, 3),
        (2, 128, 8, 12),
    ]


def test_the_auxiliary_heads_always_answer() -> None:
    """As many preds in evaluation as in training; what is scored is the first."""
    network = FastSCNN(["cat", "dog"])
    images = torch.rand(2, 3, 64, 64)
    sizes = [[tuple(p.shape) for p in network.train(mode)(images)] for mode in (True, False)]
    assert sizes[0] == sizes[1] == [(2, 2, 8, 8), (2, 2, 8, 8), (2, 2, 2, 2)]


@pytest.mark.parametrize("size", [(16, 16), (7, 11), (3, 6), (1, 2)])
@pytest.mark.parametrize("bins", [1, 2, 3, 6])
def test_means_are_those_of_adaptive_pooling(size: tuple[int, int], bins: int) -> None:
    """Also where a map has fewer cells than bins, as that of a small image."""
    x = torch.rand(2, 3, *size).double()
    torch.testing.assert_close(means(x, bins), F.adaptive_avg_pool2d(x, bins))


def test_a_pixel_to_the_left_is_not_a_pixel_to_the_right() -> None:
    """Without padding in its first convolution, as in a well-known port, all maps would lie
    one pixel aside.
    """
    network = FastSCNN(["cat"]).eval()
    images = torch.zeros(1, 3, 64, 64)
    images[:, :, 0, 0] = 1
    blank = network.higher[0][0](torch.zeros(1, 3, 64, 64))
    seen = (network.higher[0][0](images) - blank).abs().sum(1)[0]
    assert seen.shape == (32, 32)
    assert seen.nonzero().tolist() == [[0, 0]]


def test_a_best_pt_comes_back_and_another_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "best.pt"
    network = FastSCNN(["cat", "dog"])
    save_best(path, network, imgsz=64, epoch=0, fitness=0.5)
    again = FastSCNN(["cat", "dog"], weights=str(path), aux=0.1)
    for key, value in network.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    assert again.card == network.card

    with pytest.raises(UserError, match=r"best.pt has the classes .*'dog'.*the data \['cat'\]"):
        FastSCNN(["cat"], weights=str(path))
