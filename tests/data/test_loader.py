"""The loader: batches as a pure function of (seed, epoch, index), and what it draws."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from kdmini.contracts import UserError
from kdmini.data.layout import Frame, letterbox
from kdmini.data.loader import Augment, TrainLoader, ValLoader, uniforms
from kdmini.data.render import render
from kdmini.data.store import Store
from tests.data.arrays import NoTruth, Pictures, noise
from tests.detection.boxed import noise_with_boxes, some_pictures

NONE = Augment(mosaic=0, translate=0, scale=0, fliplr=0, hsv_h=0, hsv_s=0, hsv_v=0, close_mosaic=0)
NUMBERS = ("image", "a", "b", "shown", "second", "colour")  # of a layout


def loader_of(dataset, batch=4, seed=0, workers=1, augment=None, epochs=20, imgsz=64, **storing):
    storing = {"storage": "resident", **storing}
    store = Store(dataset, imgsz, workers=workers, **storing)
    return TrainLoader(store, batch, epochs, augment or Augment(), seed)


def assert_same(ours, theirs):
    ours = list(ours)
    theirs = list(theirs)
    assert len(ours) == len(theirs) > 0
    for (images, targets), (other_images, other_targets) in zip(ours, theirs, strict=True):
        assert torch.equal(images, other_images)
        assert torch.equal(targets["boxes_xyxy"], other_targets["boxes_xyxy"])
        assert torch.equal(targets["labels"], other_targets["labels"])
        assert targets["ids"] == other_targets["ids"]


# --- what a batch depends on


@pytest.fixture(scope="module")
def expected():
    """The batches of epoch 3."""
    return list(loader_of(some_pictures()).epoch(3))


@pytest.mark.parametrize("workers", [0, 4])
def test_batches_do_not_depend_on_workers(expected, workers):
    assert_same(loader_of(some_pictures(), workers=workers).epoch(3), expected)


def test_batches_do_not_depend_on_storage(expected, tmp_path, monkeypatch):
    monkeypatch.setenv("KDMINI_CACHE", str(tmp_path))
    assert_same(loader_of(some_pictures(), storage="mapped").epoch(3), expected)


def test_batches_do_not_depend_on_what_was_asked_before(expected):
    loader = loader_of(some_pictures())
    list(loader.epoch(2))
    torch.manual_seed(4)
    np.random.seed(4)
    assert_same(loader.epoch(3), expected)


@pytest.mark.parametrize("start", [1, 3, 4])
def test_an_epoch_can_be_entered_anywhere(start):
    loader = loader_of(some_pictures())
    assert_same(loader.epoch(1, start), list(loader.epoch(1))[start:])


def test_the_layout_of_an_image_does_not_depend_on_its_batch():
    loader = loader_of(some_pictures())
    together = loader.layout(5, np.arange(23))
    for index in (0, 7, 22):
        alone = loader.layout(5, np.array([index]))
        for name in NUMBERS:
            assert np.array_equal(getattr(alone, name)[0], getattr(together, name)[index])


def test_the_batches_of_epochs_and_seeds_differ():
    loader = loader_of(some_pictures())
    first, _ = next(loader.epoch(0))
    second, _ = next(loader.epoch(1))
    other_seed, _ = next(loader_of(some_pictures(), seed=1).epoch(0))
    assert not torch.equal(first, second)
    assert not torch.equal(first, other_seed)


@pytest.mark.parametrize("name", ["image", "a", "b", "second", "colour"])
def test_each_image_is_laid_out_anew_in_each_epoch(name):
    loader = loader_of(some_pictures())
    numbers = [getattr(loader.layout(epoch, np.arange(23)), name) for epoch in range(4)]
    for later in range(4):
        for earlier in range(later):
            differ = (numbers[later] != numbers[earlier]).any(-1)
            assert differ.mean() > 0.5


# --- the order of an epoch


@pytest.mark.parametrize("batch", [4, 23])
def test_every_image_is_seen_at_most_once_an_epoch(batch):
    loader = loader_of(some_pictures(further=0), batch=batch, augment=NONE)
    assert len(loader) == 23 // batch
    orders = []
    for epoch in range(3):
        labels = [targets["labels"][:, 0] for _, targets in loader.epoch(epoch)]
        assert [len(some) for some in labels] == [batch] * len(loader)
        order = torch.cat(labels).tolist()
        assert len(set(order)) == len(loader) * batch  # the rest is not used in this epoch
        orders.append(order)
    assert orders[0] != orders[1] != orders[2] != orders[0]


def order_of(epoch):
    """Of five images, by the numbers that decide it."""
    return uniforms(0, epoch, np.arange(5), 1)[:, 0].argsort()


def test_the_order_is_that_of_column_0():
    loader = loader_of(noise_with_boxes([(4, 4)] * 5), batch=1, augment=NONE, imgsz=32)
    for epoch in range(5):
        labels = [int(targets["labels"][0, 0]) for _, targets in loader.epoch(epoch)]
        assert labels == order_of(epoch).tolist()


def test_over_many_epochs_every_image_comes_equally_often_at_every_position():
    counts = np.zeros((5, 5))  # position in the epoch, image
    for epoch in range(600):
        counts[np.arange(5), order_of(epoch)] += 1
    assert abs(counts - 120).max() < 5 * np.sqrt(120 * 0.8)


def test_without_augmentation_the_letterbox_is_rendered():
    loader = loader_of(some_pictures(), augment=NONE)
    images, targets = next(loader.epoch(0))
    indices = targets["labels"][:, 0].numpy()
    assert torch.equal(images, render(loader.store, letterbox(loader.store, indices, 64), 64))


def test_images_are_float32_from_0_to_1():
    loader = loader_of(some_pictures(), batch=8)
    for epoch in range(12):
        for images, _ in loader.epoch(epoch):
            assert images.shape == (8, 3, 64, 64)
            assert images.dtype == torch.float32
            assert images.min() >= 0
            assert images.max() <= 1


# --- strengths of the augmentation

MANY = 2000


@pytest.fixture(scope="module")
def many():
    """Pictures of one pixel, which a letterbox of 64 draws 64 pixels wide."""
    return Pictures([np.zeros((1, 1, 3), np.uint8)] * MANY)


@pytest.fixture(scope="module")
def drawn(many):
    """The layouts of an epoch."""
    augment = Augment(
        mosaic=0.3, translate=0.2, scale=0.4, fliplr=0.25, hsv_h=0.1, hsv_s=0.6, hsv_v=0.5
    )
    return loader_of(many, augment=augment).layout(0, np.arange(MANY))


def test_mosaics_and_mirrored_images_are_as_many_as_asked_for(drawn):
    tiled = drawn.tiled
    mirrored = drawn.a[:, 0, 0] < 0
    assert abs(tiled.mean() - 0.3) < 0.05
    assert abs(mirrored.mean() - 0.25) < 0.05
    assert abs((tiled & mirrored).mean() - 0.3 * 0.25) < 0.03


def test_zooms_reach_as_far_as_asked_for(drawn):
    factor = drawn.a[:, 0, 1] / 64
    assert 0.6 <= factor.min() < 0.61
    assert 1.39 < factor.max() <= 1.4


def test_zooms_lie_between_the_two_that_were_named(many):
    augment = replace(NONE, scale=(0.5, 2.0))
    layout = loader_of(many, augment=augment).layout(0, np.arange(MANY))
    factor = layout.a[:, 0, 1] / 64
    assert 0.5 <= factor.min() < 0.51
    assert 1.98 < factor.max() <= 2
    assert abs(np.median(factor) - 1.25) < 0.05


def test_zooms_named_the_wrong_way_round_are_refused():
    with pytest.raises(UserError, match="lowest zoom goes first"):
        Augment(scale=(2.0, 0.5))


def test_shifts_reach_as_far_as_asked_for(drawn):
    single = ~drawn.tiled
    middle = drawn.shown[single, 0].mean(-1) / 64  # where the centre of the picture went
    assert (abs(middle.min(0) - 0.3) < 0.01).all()
    assert (abs(middle.max(0) - 0.7) < 0.01).all()


def test_factors_of_colour_reach_as_far_as_asked_for(drawn):
    gains = np.array([0.1, 0.6, 0.5])
    assert (abs(drawn.colour.min(0) - (1 - gains)) < 0.01).all()
    assert (abs(drawn.colour.max(0) - (1 + gains)) < 0.01).all()


def test_the_partners_of_a_mosaic_come_from_all_images(drawn):
    tiled = drawn.tiled
    assert (drawn.image[:, 0] == np.arange(MANY)).all()
    partners = drawn.image[tiled, 1:]
    assert partners.min() < 20
    assert partners.max() > MANY - 20
    assert len(np.unique(partners)) > 1000


STILL = Augment(mosaic=1, translate=0, scale=0, fliplr=0, hsv_h=0, hsv_s=0, hsv_v=0)


def test_the_tiles_of_a_mosaic_meet_anywhere_in_the_picture(many):
    """On the canvas of 2S they meet in [S/2, 3S/2]; its middle is what is shown."""
    layout = loader_of(many, augment=STILL).layout(0, np.arange(MANY))
    assert (abs(layout.second[..., 0].min(0) - 0) < 0.2).all()
    assert (abs(layout.second[..., 0].max(0) - 64) < 0.2).all()


def test_no_gain_of_colour_is_no_colour(many):
    assert loader_of(many, augment=STILL).layout(0, np.arange(MANY)).colour is None


@pytest.mark.parametrize("epoch", range(10))
def test_no_mosaic_in_the_last_epochs(epoch):
    pictures = Pictures(noise([(20, 20)] * 8))
    loader = loader_of(pictures, epochs=10, augment=Augment(close_mosaic=3), imgsz=32)
    layout = loader.layout(epoch, np.arange(8))
    tiled = layout.tiled
    if epoch < 7:
        assert tiled.all()
    else:
        assert not tiled.any()


# --- validation


def val_loader_of(dataset, batch):
    return ValLoader(Store(dataset, 64, workers=1, storage="resident"), batch)


def test_validation_shows_each_image_once_and_in_order():
    dataset = some_pictures()
    loader = val_loader_of(dataset, 5)
    batches = list(loader)
    assert len(batches) == len(loader) == 5
    assert [len(images) for images, _, _ in batches] == [5, 5, 5, 5, 3]
    targets = [target for _, some, _ in batches for target in some]
    assert [target["id"] for target in targets] == [f"picture {i}" for i in range(23)]
    for target, boxes in zip(targets, dataset.boxes, strict=True):
        assert np.array_equal(target["boxes_xyxy"], boxes)  # in pixels of the file


def test_validation_shows_the_same_every_time():
    loader = val_loader_of(some_pictures(), 5)
    for (images, _, _), (again, _, _) in zip(loader, loader, strict=True):
        assert torch.equal(images, again)


class Framed(NoTruth):
    """Puts the frame of each image beside its prediction."""

    @staticmethod
    def to_file(predictions, frames):
        return list(zip(predictions, frames, strict=True))


@pytest.mark.parametrize(
    ("size", "scale", "corner"),  # height, width of the file
    [
        ((64, 64), [1, 1], [0, 0]),
        ((32, 16), [0.5, 0.5], [16, 0]),  # enlarged twice
        ((100, 200), [3.125, 3.125], [0, 16]),
        ((10, 400), [6.25, 5], [0, 31]),  # reduced to two rows, of five each
    ],
)
def test_each_prediction_meets_the_frame_of_its_image(size, scale, corner):
    pictures = Pictures(noise([(64, 64), size]))
    pictures.truth = Framed
    ((_, _, to_file),) = val_loader_of(pictures, 2)
    (_, whole), (prediction, frame) = to_file(["first", "second"])
    assert prediction == "second"
    assert [numbers.tolist() for numbers in whole[:3]] == [[1, 1], [0, 0], [64, 64]]
    assert whole.imgsz == frame.imgsz == 64
    assert isinstance(frame, Frame)
    assert frame.scale.tolist() == pytest.approx(scale)
    assert frame.corner.tolist() == corner
    assert frame.native.tolist() == [size[1], size[0]]


# --- refused


def refused(build, *words):
    with pytest.raises(UserError) as caught:
        build()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_a_batch_larger_than_the_set_is_refused():
    refused(lambda: loader_of(some_pictures(5), batch=6), "batch", "6", "5")
    refused(lambda: loader_of(some_pictures(9), batch=6, limit=5), "batch", "6", "5")
    assert len(loader_of(some_pictures(5), batch=5)) == 1
