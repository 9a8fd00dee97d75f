"""The way of a mask into a batch and back to its file."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kdmini.data.layout import letterbox
from kdmini.data.loader import Augment, TrainLoader, ValLoader
from kdmini.data.store import Store
from kdmini.segmentation import truth
from kdmini.segmentation.truth import VOID, Masks
from tests.data.arrays import Pictures, noise

CLASSES = 5


class Scenes(Pictures):
    """Noise, whose mask is made of its pixels."""

    names = tuple(f"class {label}" for label in range(CLASSES))
    truth = Masks

    def __getitem__(self, index: int) -> tuple[np.ndarray, dict[str, Any]]:
        image, target = super().__getitem__(index)
        return image, {**target, "mask": mask_of(image)}


def mask_of(image: np.ndarray) -> np.ndarray:
    return (image[..., 0] % CLASSES).astype(np.uint8)


def frames_of(sizes: list[tuple[int, int]], imgsz: int) -> tuple[Store, Any]:
    """The store of pictures of these sizes, and the way back to their files."""
    store = Store(Scenes(noise(sizes)), imgsz, storage="resident", workers=1)
    (_, targets, to_file) = next(iter(ValLoader(store, len(sizes))))
    assert [target["mask"].shape for target in targets] == sizes
    return store, to_file


def test_a_batch_has_the_masks_of_its_pictures() -> None:
    images = noise([(32, 32)] * 2)
    store = Store(Scenes(images), 32, storage="resident", workers=1, training=True)
    plain = Augment(mosaic=0, translate=0, scale=0, fliplr=0, hsv_h=0, hsv_s=0, hsv_v=0)
    _, targets = next(TrainLoader(store, 2, 1, plain).epoch(0))
    assert targets["mask"].dtype == torch.uint8
    by_id = {f"picture {n}": mask_of(image) for n, image in enumerate(images)}
    for name, mask in zip(targets["ids"], targets["mask"], strict=True):
        assert np.array_equal(mask.numpy(), by_id[name])


def test_outside_of_a_picture_there_is_no_class() -> None:
    store = Store(Scenes(noise([(20, 32)])), 32, storage="resident", workers=1, training=True)
    _, targets = next(TrainLoader(store, 1, 1, Augment(mosaic=0, scale=0, translate=0)).epoch(0))
    assert (targets["mask"][0, :6] == VOID).all()
    assert (targets["mask"][0, 6:26] != VOID).all()


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (96, 96)])
@pytest.mark.parametrize("cells", [8, 32, 64])
def test_a_square_comes_back_as_torch_interpolates_it(size: tuple[int, int], cells: int) -> None:
    _, to_file = frames_of([size], 64)
    torch.manual_seed(0)
    logits = torch.randn(CLASSES, cells, cells)
    (prediction,) = to_file([{"logits": logits}])
    enlarged = F.interpolate(logits[None].double(), size, mode="bilinear", align_corners=False)
    sure = margin(enlarged[0]) > 1e-4
    assert sure.float().mean() > 0.99
    assert torch.equal(prediction["mask"][sure], enlarged[0].argmax(0)[sure].to(torch.uint8))


def margin(logits: torch.Tensor) -> torch.Tensor:
    """Of the best class before the next."""
    best = logits.topk(2, 0).values
    return best[0] - best[1]


@pytest.mark.parametrize("size", [(30, 64), (64, 17), (150, 90), (1, 64)])
def test_the_border_of_the_letterbox_is_cut_off(size: tuple[int, int]) -> None:
    """Against each pixel's point in the map, worked out in double precision."""
    store, to_file = frames_of([size], 64)
    torch.manual_seed(1)
    logits = torch.randn(CLASSES, 16, 16)
    (prediction,) = to_file([{"logits": logits}])
    mask = prediction["mask"]
    assert mask.shape == size
    layout = letterbox(store, np.array([0]), 64)
    stored_h, stored_w = store.sizes[0]
    grid = logits.double().numpy()
    wrong = 0
    for row in range(size[0]):
        for column in range(size[1]):
            x = (column + 0.5) * stored_w / size[1] * layout.a[0, 0, 0] + layout.b[0, 0, 0]
            y = (row + 0.5) * stored_h / size[0] * layout.a[0, 0, 1] + layout.b[0, 0, 1]
            values = sampled(grid, x / 4 - 0.5, y / 4 - 0.5)
            order = np.sort(values)
            wrong += values.argmax() != mask[row, column] and order[-1] - order[-2] > 1e-4
    assert wrong == 0


def sampled(grid: np.ndarray, x: float, y: float) -> np.ndarray:
    """(K, h, w) between the four cells round a point; the border goes on outside."""
    last = grid.shape[1] - 1
    x = min(max(x, 0), last)
    y = min(max(y, 0), last)
    left = int(x)
    top = int(y)
    right = min(left + 1, last)
    bottom = min(top + 1, last)
    above = grid[:, top, left] * (1 - x + left) + grid[:, top, right] * (x - left)
    below = grid[:, bottom, left] * (1 - x + left) + grid[:, bottom, right] * (x - left)
    return above * (1 - y + top) + below * (y - top)


def test_strips_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    _, to_file = frames_of([(50, 64)], 64)
    logits = torch.randn(CLASSES, 16, 16)
    (whole,) = to_file([{"logits": logits}])
    monkeypatch.setattr(truth, "AT_ONCE", 3 * CLASSES * 64)
    (parts,) = to_file([{"logits": logits}])
    assert torch.equal(whole["mask"], parts["mask"])


def test_a_mask_finds_its_way_there_and_back() -> None:
    images = noise([(48, 31), (20, 48)])
    training = Store(Scenes(images), 48, storage="resident", workers=1, training=True)
    plain = Augment(mosaic=0, translate=0, scale=0, fliplr=0)
    _, targets = next(TrainLoader(training, 2, 1, plain).epoch(0))
    _, to_file = frames_of([(48, 31), (20, 48)], 48)
    known = targets["mask"].long().clamp(max=CLASSES - 1)
    logits = dict(zip(targets["ids"], F.one_hot(known, CLASSES).permute(0, 3, 1, 2), strict=True))
    back = to_file([{"logits": logits[f"picture {n}"]} for n in range(2)])
    for prediction, image in zip(back, images, strict=True):
        assert np.array_equal(prediction["mask"].numpy(), mask_of(image))
