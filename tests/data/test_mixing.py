"""CutMix and MixUp, counted pixel by pixel in pictures of one colour each."""

from typing import Any

import numpy as np
import pytest
import torch

from kdmini.contracts import UserError
from kdmini.data.layout import areas
from kdmini.data.loader import Augment, TrainLoader, draw
from kdmini.data.mixing import beta
from kdmini.data.render import PAD, render
from kdmini.data.store import Store
from kdmini.sections import make_sets
from kdmini.segmentation.truth import VOID, Masks
from tests.data.arrays import NoTruth, Pictures

SIZE = 32
SIZES = [(32, 32), (20, 32), (32, 9), (32, 31), (12, 17), (32, 24), (16, 32), (32, 32)]
LEVELS = np.linspace(8, 248, len(SIZES)).astype(np.uint8)  # of the pictures, one each
NAMES = [f"class {label}" for label in range(len(SIZES))]
PLAIN = {"mosaic": 0, "scale": 0, "translate": 0, "hsv_h": 0, "hsv_s": 0, "hsv_v": 0}
MOVED = {**PLAIN, "scale": 0.4, "translate": 0.3}
EPOCHS = range(6)


class Flat(Pictures):
    """Pictures of one grey level, whose mask says which."""

    names = NAMES

    def __init__(self) -> None:
        super().__init__([np.full((*s, 3), g) for s, g in zip(SIZES, LEVELS, strict=True)])

    def __getitem__(self, index: int) -> tuple[np.ndarray, dict[str, Any]]:
        image, target = super().__getitem__(index)
        return image, {**target, "mask": np.full(image.shape[:2], index, np.uint8)}


class FlatMasks(Flat):
    truth = Masks


def loader_of(dataset: Any = None, seed: int = 0, **augment: Any) -> TrainLoader:
    store = Store(dataset or Flat(), SIZE, storage="resident", workers=1, training=True)
    return TrainLoader(store, len(SIZES), 99, Augment(close_mosaic=0, **augment), seed)


EVERYONE = np.arange(len(SIZES))


def counted(picture: torch.Tensor) -> np.ndarray:
    """(3, S, S) -> the cells of each level."""
    grey = (picture[0] * 255).round().int().numpy()
    assert set(np.unique(grey)) <= {*LEVELS.tolist(), PAD}
    return np.array([(grey == level).sum() for level in LEVELS])


@pytest.mark.parametrize(
    "augment", [{**PLAIN, "cutmix": 1}, {**MOVED, "cutmix": 1}, {**MOVED, "mosaic": 1}]
)
def test_areas_are_those_of_the_pixels(augment: dict[str, Any]) -> None:
    """Of each tile, in rectangles and mosaics, letterboxed, shifted, zoomed and mirrored."""
    loader = loader_of(**augment)
    of_two = 0
    for epoch in EPOCHS:
        layout = loader.layout(epoch, EVERYONE)
        cells = areas(layout, SIZE)
        for n, picture in enumerate(render(loader.store, layout, SIZE)):
            expected = np.zeros(len(SIZES), int)
            np.add.at(expected, layout.image[n], cells[n])
            assert counted(picture).tolist() == expected.tolist()
            of_two += np.count_nonzero(expected) > 1
    assert of_two > len(EPOCHS) * len(SIZES) / 2


def test_a_rectangle_shows_the_other_image_where_it_is_by_itself() -> None:
    alone = loader_of(**MOVED)
    loader = loader_of(**MOVED, cutmix=1)
    layout = loader.layout(3, EVERYONE)
    others = (draw(0, 3, EVERYONE).other * len(SIZES)).astype(int)
    assert layout.image[:, 3].tolist() == others.tolist()
    own = render(loader.store, alone.layout(3, EVERYONE), SIZE)
    other = render(loader.store, alone.layout(3, others), SIZE)
    cells = np.arange(SIZE) + 0.5
    ends = layout.second
    for n, picture in enumerate(render(loader.store, layout, SIZE)):
        inside = (ends[n, :, :1] <= cells) & (cells < ends[n, :, 1:])  # of x, y
        hole = torch.from_numpy(inside[1][:, None] & inside[0])
        assert torch.equal(picture, torch.where(hole, other[n], own[n]))


def test_what_shines_through_is_the_other_image_by_itself() -> None:
    alone = loader_of(**MOVED)
    loader = loader_of(**MOVED, mixup=1, mixup_alpha=1)
    layout = loader.layout(2, EVERYONE)
    others = (draw(0, 2, EVERYONE).other * len(SIZES)).astype(int)
    own = render(loader.store, alone.layout(2, EVERYONE), SIZE).double()
    other = render(loader.store, alone.layout(2, others), SIZE).double()
    share = torch.from_numpy(layout.share)[:, None, None, None]
    assert 0.05 < share.min() < share.max() < 0.95
    mixed = render(loader.store, layout, SIZE)
    torch.testing.assert_close(mixed.double(), (1 - share) * own + share * other)


def test_as_many_are_mixed_as_asked_for_and_the_rest_is_as_without() -> None:
    loader = loader_of(**MOVED, cutmix=0.3, mixup=0.2)
    without = loader_of(**MOVED)
    many = np.tile(EVERYONE, 1)
    cut = mixed = total = 0
    for epoch in range(150):
        layout = loader.layout(epoch, many)
        plain = without.layout(epoch, many)
        untouched = ~layout.tiled & (layout.share == 0)
        for name in ("image", "a", "b", "shown"):
            ours = getattr(layout, name)[untouched]
            assert np.array_equal(ours, getattr(plain, name)[untouched])
        cut += layout.tiled.sum()
        mixed += (layout.share > 0).sum()
        assert not (layout.tiled & (layout.share > 0)).any()
        total += len(many)
    assert abs(cut / total - 0.3) < 0.04
    assert abs(mixed / total - 0.2) < 0.04


def test_colour_is_that_of_the_image_itself() -> None:
    light = {**MOVED, "hsv_v": 0.5}
    plain = loader_of(**light).layout(1, EVERYONE).colour
    assert plain.std(0)[2] > 0.1
    for mixing in ({"cutmix": 1}, {"mixup": 1}, {"cutmix": 0.5, "mixup": 0.5}):
        layout = loader_of(**light, **mixing).layout(1, EVERYONE)
        assert np.array_equal(layout.colour, plain)


def test_a_layout_depends_on_seed_epoch_and_index_alone() -> None:
    loader = loader_of(**MOVED, cutmix=0.5, mixup=0.5)
    together = loader.layout(5, EVERYONE)
    for index in (0, 3, 7):
        alone = loader.layout(5, np.array([index]))
        for name in ("image", "a", "b", "shown", "second", "share"):
            assert np.array_equal(getattr(alone, name)[0], getattr(together, name)[index])
    batches = list(loader.epoch(5))
    again = list(loader_of(**MOVED, cutmix=0.5, mixup=0.5).epoch(5))
    assert torch.equal(batches[0][0], again[0][0])
    other = next(loader_of(seed=1, **MOVED, cutmix=0.5, mixup=0.5).epoch(5))
    assert not torch.equal(batches[0][0], other[0])


def test_masks_follow_a_rectangle() -> None:
    """Each cell has the label of the picture that is seen there."""
    images, targets = next(loader_of(FlatMasks(), **MOVED, cutmix=1).epoch(0))
    grey = (images[:, 0] * 255).round().int()
    label_of = torch.full((256,), VOID)
    label_of[LEVELS.astype(int)] = torch.arange(len(SIZES))
    assert torch.equal(targets["mask"], label_of[grey].to(torch.uint8))
    assert (targets["mask"].flatten(1).sort().values.unique(dim=1).shape[1]) > 1


# --- shares


UNIFORM = (np.arange(2000) + 0.5) / 2000


@pytest.mark.parametrize(
    ("alpha", "inverse"),
    [
        (1.0, lambda u: u),
        (0.5, lambda u: np.sin(np.pi * u / 2) ** 2),  # the arcsine distribution
        (2.0, lambda u: 0.5 - np.sin(np.arcsin(1 - 2 * u) / 3)),  # of 3 x^2 - 2 x^3
    ],
)
def test_shares_are_of_the_beta_distribution(alpha: float, inverse: Any) -> None:
    assert abs(beta(UNIFORM, alpha) - inverse(UNIFORM)).max() < 1e-6


@pytest.mark.parametrize("alpha", [0.01, 0.2, 1, 8, 100])
def test_shares_have_the_spread_of_the_beta_distribution(alpha: float) -> None:
    """Its variance is 1 / (8 alpha + 4)."""
    values = beta(UNIFORM, alpha)
    assert ((values >= 0) & (values <= 1)).all()
    assert (np.diff(values) >= 0).all()
    assert values.var() == pytest.approx(1 / (8 * alpha + 4), rel=0.01)


# --- refused


def test_more_than_one_in_one_is_refused() -> None:
    with pytest.raises(UserError, match=r"cutmix 0\.7 and mixup 0\.5 are more than 1 together"):
        Augment(cutmix=0.7, mixup=0.5)


class OneFlat(Flat):
    truth = NoTruth

    def __init__(self, root: str = "") -> None:
        super().__init__()


class OneMasks(OneFlat):
    truth = Masks


@pytest.mark.parametrize(
    ("dataset", "augment"),
    [("OneFlat", {"cutmix": 0.1}), ("OneFlat", {"mixup": 0.1}), ("OneMasks", {"mixup": 0.1})],
)
def test_a_truth_that_cannot_follow_is_refused_by_name(
    dataset: str, augment: dict[str, float]
) -> None:
    section = {"build": f"{__name__}:{dataset}"}
    truth = {"OneFlat": "NoTruth", "OneMasks": "Masks"}[dataset]
    with pytest.raises(UserError, match=rf"data\.augment\.\w+: .* {truth}, does not follow it"):
        make_sets(section, section, augment=augment)


def test_a_truth_that_follows_is_accepted() -> None:
    section = {"build": f"{__name__}:OneMasks"}
    assert make_sets(section, section, augment={"cutmix": 0.1}).augment.cutmix == 0.1
