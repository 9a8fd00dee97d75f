"""The way of a label into a batch."""

import numpy as np
import pytest
import torch

from kdmini.classification.truth import Labels, shares
from kdmini.data.layout import letterbox, zoom
from kdmini.data.loader import Augment, TrainLoader
from kdmini.data.store import Store
from tests.classification.labelled import NAMES, Animals
from tests.data.arrays import noise

PLAIN = {"mosaic": 0, "scale": 0, "translate": 0, "hsv_h": 0, "hsv_s": 0, "hsv_v": 0}
SIZES = [(32, 32), (20, 32), (32, 12), (32, 32), (16, 16), (9, 32)]


def batch_of(**augment):
    store = Store(Animals(noise(SIZES)), 32, storage="resident", workers=1, training=True)
    loader = TrainLoader(store, len(SIZES), 20, Augment(close_mosaic=0, **augment))
    _, targets = next(loader.epoch(0))
    return targets, loader


def test_an_image_by_itself_is_of_its_class_alone():
    targets, _ = batch_of(**{**PLAIN, "translate": 0.4, "scale": 0.5})
    expected = [int(name.split()[1]) % len(NAMES) for name in targets["ids"]]
    assert targets["labels"][:, 0].tolist() == expected
    assert targets["labels"].dtype == torch.int64
    assert targets["share"].dtype == torch.float32
    assert targets["share"].tolist() == [[1, 0, 0, 0]] * len(SIZES)


@pytest.mark.parametrize("augment", [{"cutmix": 1}, {"mosaic": 1}, {"mixup": 1}])
def test_a_mixture_is_of_each_class_in_its_share(augment):
    targets, loader = batch_of(**{**PLAIN, **augment})
    share = targets["share"]
    torch.testing.assert_close(share.sum(1), torch.ones(len(SIZES)))
    assert (share.max(1).values < 1).sum() >= 4
    number_of = {f"picture {n}": n for n in range(len(SIZES))}
    order = np.array([number_of[name] for name in targets["ids"]])
    layout = loader.layout(0, order)
    images = layout.image
    if "mixup" in augment:
        images = np.concatenate([images, layout.under.image], 1)
        torch.testing.assert_close(
            share[:, 4:].sum(1), torch.from_numpy(layout.share), check_dtype=False
        )
    assert targets["labels"].tolist() == (images % len(NAMES)).tolist()


def test_an_image_that_has_left_the_picture_keeps_its_class():
    store = Store(Animals(noise([(32, 32)])), 32, storage="resident", workers=1)
    layout = letterbox(store, np.array([0]), 32)
    gone = zoom(layout, np.ones(1), 16, np.array([[80.0, 16.0]]))
    assert shares(gone, 32).tolist() == [[1, 0, 0, 0]]
    assert Labels(store).rendered(gone)["share"].isfinite().all()
