"""Labels of pixels travel in the fourth byte: against the reference of rendering, with the
nearest pixel in the place of the four around a point.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from kdmini.data.layout import letterbox, mirror
from kdmini.data.loader import Augment, TrainLoader
from kdmini.data.pictures import nearest, pack
from kdmini.data.render import NO_LABEL, render, render_labelled
from kdmini.data.store import Store
from tests.data import pixel_by_pixel
from tests.data.arrays import NoTruth, Pictures, keep, noise, random_mosaics, zoomed_mosaic

SIZES = [(48, 48), (31, 47), (48, 17), (10, 13), (1, 48), (48, 1), (5, 30), (29, 20)]
APART = 1e-4  # pixels; a point so near to the middle between two may go to either
SIZE = 40


class Labels(NoTruth):
    @staticmethod
    def split(target: Any) -> tuple[Any, Any]:
        rest = {key: value for key, value in target.items() if key != "mask"}
        return target["mask"], rest

    def rendered(self, layout: Any, plane: Any) -> dict[str, Any]:
        return {"mask": plane}


class Labelled(Pictures):
    truth = Labels

    def __getitem__(self, index: int) -> tuple[np.ndarray, dict[str, Any]]:
        image, target = super().__getitem__(index)
        return image, {**target, "mask": labels_of(image)}


def labels_of(image: np.ndarray) -> np.ndarray:
    """All of them occur, 255 too, whose bit is the sign of a packed pixel."""
    return image[..., 0] ^ image[..., 2]


def labelled(images: list[np.ndarray], imgsz: int, **settings: Any) -> Store:
    return Store(Labelled(images), imgsz, storage="resident", workers=1, training=True, **settings)


@pytest.fixture
def expected(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[np.ndarray]]:
    """What a function of the reference gives for labels; several answers where a point lies
    in the middle between two pixels.
    """

    def answers(function: Callable[..., np.ndarray], *arguments: Any) -> list[np.ndarray]:
        found = []
        for dx, dy in ((-1, -1), (-1, 1), (1, -1), (1, 1)):

            def sample(image: np.ndarray, x: float, y: float, dx=dx, dy=dy) -> np.ndarray:
                height, width = image.shape[:2]
                column = min(max(int(np.floor(x + dx * APART)), 0), width - 1)
                row = min(max(int(np.floor(y + dy * APART)), 0), height - 1)
                return image[row, column]

            monkeypatch.setattr(pixel_by_pixel, "sample", sample)
            monkeypatch.setattr(pixel_by_pixel, "GREY", float(NO_LABEL))
            found.append(function(*arguments)[..., 0])
        return found

    return answers


def in_three(image: np.ndarray) -> np.ndarray:
    """Its labels as a picture, for the reference."""
    return np.repeat(labels_of(image)[..., None], 3, 2)


def agree(plane: np.ndarray, answers: list[np.ndarray]) -> bool:
    return bool(np.any([plane == answer for answer in answers], axis=0).all())


def test_letterboxed_labels_are_those_of_the_nearest_pixels(expected: Any) -> None:
    images = noise(SIZES)
    store = labelled(images, 48)
    _, planes = render_labelled(store, letterbox(store, np.arange(len(images)), 48), 48)
    assert planes is not None
    assert planes.dtype == torch.uint8
    for plane, image in zip(planes.numpy(), images, strict=True):
        assert agree(plane, expected(pixel_by_pixel.expected_letterbox, in_three(image), 48))


def test_labels_follow_mosaic_zoom_and_mirror(expected: Any) -> None:
    images = noise(SIZES)
    store = labelled(images, 48)
    drawn = random_mosaics(12, len(images), SIZE, seed=1)
    layout = mirror(zoomed_mosaic(store, drawn, SIZE), drawn.mirrored, SIZE)
    _, planes = render_labelled(store, layout, SIZE)
    assert planes is not None
    for n, plane in enumerate(planes.numpy()):
        four = [in_three(images[i]) for i in drawn.four[n]]
        place = (drawn.centre[n], drawn.factor[n], drawn.to[n], drawn.mirrored[n])
        assert agree(plane, expected(pixel_by_pixel.expected_mosaic, four, SIZE, *place)), n


def test_pictures_are_the_same_to_the_bit_with_labels_and_without() -> None:
    images = noise(SIZES)
    with_labels = labelled(images, 48)
    without = keep(images, 48)
    layout = letterbox(without, np.arange(len(images)), 48)
    assert torch.equal(render(with_labels, layout, 48), render(without, layout, 48))
    assert render_labelled(without, layout, 48)[1] is None


def test_a_larger_mask_is_reduced_with_its_picture() -> None:
    """As the nearest pixel: no label is made of two."""
    (image,) = noise([(90, 60)])
    store = labelled([image], 30)
    height, width = store.sizes[0]
    _, planes = render_labelled(store, letterbox(store, np.array([0]), 30), 30)
    assert planes is not None
    rows = ((np.arange(height) + 0.5) * 90 / height).astype(int)
    columns = ((np.arange(width) + 0.5) * 60 / width).astype(int)
    reduced = labels_of(image)[rows][:, columns]
    assert np.array_equal(planes[0, :, 5:25].numpy(), reduced)
    assert (planes[0, :, :5] == NO_LABEL).all()


@pytest.mark.parametrize("label", [0, 1, 127, 128, 254, 255])
def test_any_label_comes_back(label: int) -> None:
    image = np.full((2, 3, 3), 255, np.uint8)
    packed = pack(image, np.full((2, 3), label, np.uint8))
    assert ((packed >> 24 & 255) == label).all()
    assert ((packed & 0xFFFFFF) == 0xFFFFFF).all()


def test_nearest_takes_the_pixel_under_the_centre() -> None:
    labels = np.arange(12, dtype=np.uint8).reshape(3, 4)
    assert np.array_equal(nearest(labels, (3, 4)), labels)
    assert nearest(labels, (1, 2)).tolist() == [[5, 7]]
    assert nearest(labels, (6, 4))[:, 0].tolist() == [0, 0, 4, 4, 8, 8]


def test_a_batch_brings_the_labels_to_the_truth_and_targets_lose_them() -> None:
    store = labelled(noise([(20, 30)] * 4), 32)
    assert not any("mask" in target for target in store.targets)
    images, targets = next(TrainLoader(store, 4, 1, Augment()).epoch(0))
    assert targets["mask"].shape == (4, 32, 32)
    assert images.shape == (4, 3, 32, 32)


def test_a_set_that_is_evaluated_keeps_its_masks_whole() -> None:
    images = noise([(20, 30)] * 2)
    store = Store(Labelled(images), 16, storage="resident", workers=1)
    assert not store.labelled
    for target, image in zip(store.targets, images, strict=True):
        assert np.array_equal(target["mask"], labels_of(image))
