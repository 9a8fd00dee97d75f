"""The BiFPN against its equations, and its size against that of the authors' code."""

import pytest
import torch
from torch import nn

from kdmini.terms.pyramid import Pyramid
from tests.terms.self_teacher_equation import ODD, Sorter, make_term, plain_refine, random_feats

RESNET18 = (64, 128, 256, 512)


@pytest.mark.parametrize(
    "width, layers, millions",
    [
        (128, 1, "0.47"),
        (128, 2, "0.73"),
        (128, 3, "0.99"),
        (256, 1, "1.32"),
        (256, 2, "2.34"),
        (256, 3, "3.36"),
        (1.0, 1, "1.98"),
        (2.0, 1, "6.38"),
    ],
)
def test_parameters_on_a_resnet18_are_those_of_the_authors(
    width: float, layers: int, millions: str
) -> None:
    """With a linear layer for 100 classes. Of BiFPN one width, of BiFPNc a multiple."""
    widths = [int(width * c) if isinstance(width, float) else width for c in RESNET18]
    modules = nn.ModuleList([Pyramid(RESNET18, widths, layers), nn.Linear(widths[-1], 100)])
    assert f"{sum(p.numel() for p in modules.parameters()) / 1e6:.2f}" == millions


@pytest.mark.parametrize("first_share", [0.5, -0.3])
@pytest.mark.parametrize("settings", [{"layers": 1}, {"layers": 3}, {"times": 1.5, "layers": 2}])
@pytest.mark.parametrize("levels", [2, 3, 4])
def test_maps_are_those_of_the_equations(levels: int, settings: dict, first_share: float) -> None:
    """Of sides that are not twice the next."""
    shapes = dict(list(ODD.items())[-levels:])
    shares = (first_share, 1.5, 0.7)
    term = make_term(Sorter(), shares, shapes, **settings).double()
    feats = list(random_feats(0, shapes=shapes).values())
    own = term.refine(feats)
    assert [x.shape[2:] for x in own] == [x.shape[2:] for x in feats]
    for x, plain in zip(own, plain_refine(term.refine, feats), strict=True):
        torch.testing.assert_close(x, plain, rtol=1e-9, atol=1e-9)


def test_times_gives_each_level_the_students_channels_in_proportion() -> None:
    term = make_term(Sorter(), shapes=ODD, times=2.0, width=3)
    feats = list(random_feats(0, torch.float32, ODD).values())
    assert [x.shape[1] for x in term.refine(feats)] == [8, 8, 12, 16]


def test_the_last_norms_are_those_of_the_outputs() -> None:
    term = make_term(Sorter(), shapes=ODD, layers=2)
    with torch.no_grad():
        for number, norm in enumerate(term.refine.norms()):
            norm.weight.zero_()
            norm.bias.fill_(number)
    feats = list(random_feats(0, torch.float32, ODD).values())
    assert [x.unique().tolist() for x in term.refine(feats)] == [[0], [1], [2], [3]]
