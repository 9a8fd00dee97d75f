"""The loader: batches as a pure function of (seed, epoch, index), random numbers, padding, and the
way back.
"""

import numpy as np
import pytest
import torch

from kdmini.contracts import UserError
from kdmini.data.loader import Augment, TrainLoader, ValLoader, check_size, uniforms
from kdmini.data.render import letterbox, render
from kdmini.data.store import Store
from kdmini.detection.truth import pad

NONE = Augment(mosaic=0, translate=0, scale=0, fliplr=0, hsv_h=0, hsv_s=0, hsv_v=0, close_mosaic=0)
MASK = 2**64 - 1


class Pictures:
    """Noise with one box over the whole, whose label is the number of the picture, and further
    random boxes.
    """

    def __init__(self, sizes, further=0, seed=0):
        self.rng = np.random.default_rng(seed)
        self.sizes = sizes
        self.names = [str(i) for i in range(len(sizes))]
        self.images = [self.rng.integers(0, 256, (*size, 3), np.uint8) for size in sizes]
        self.boxes = [self.draw(size, further) for size in sizes]

    def draw(self, size, further):
        height, width = size
        ends = np.sort(self.rng.random((further, 2, 2)), 1) * [width, height]
        return np.concatenate([[[0, 0, width, height]], ends.reshape(-1, 4)]).astype(np.float32)

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, index):
        boxes = self.boxes[index]
        labels = np.full(len(boxes), index, np.int64)
        return self.images[index], {
            "boxes_xyxy": boxes,
            "labels": labels,
            "difficult": np.zeros(len(boxes), bool),
            "id": f"picture {index}",
        }


def some(count=23, further=3):
    rng = np.random.default_rng(9)
    return Pictures([tuple(rng.integers(16, 65, 2)) for _ in range(count)], further)


def loader_of(dataset, batch=4, seed=0, workers=1, augment=None, epochs=20, imgsz=64, **about):
    store = Store(dataset, imgsz, workers=workers, storage="resident", **about)
    return TrainLoader(store, batch, epochs, augment or Augment(), seed)


def assert_same(ours, theirs):
    ours, theirs = list(ours), list(theirs)
    assert len(ours) == len(theirs) > 0
    for (images, targets), (other_images, other_targets) in zip(ours, theirs, strict=True):
        assert torch.equal(images, other_images)
        assert torch.equal(targets["boxes_xyxy"], other_targets["boxes_xyxy"])
        assert torch.equal(targets["labels"], other_targets["labels"])


def test_batches_do_not_depend_on_workers_storage_or_what_was_asked_before(tmp_path, monkeypatch):
    monkeypatch.setenv("KDMINI_CACHE", str(tmp_path))
    dataset = some()
    expected = list(loader_of(dataset, workers=1).epoch(3))
    for workers in (0, 4):
        loader = loader_of(dataset, workers=workers)
        list(loader.epoch(2))
        torch.manual_seed(workers)
        np.random.seed(workers)
        assert_same(loader.epoch(3), expected)
    mapped = TrainLoader(Store(dataset, 64, workers=2, storage="mapped"), 4, 20, Augment())
    assert_same(mapped.epoch(3), expected)


@pytest.mark.parametrize("start", [1, 3, 4])
def test_an_epoch_can_be_entered_anywhere(start):
    loader = loader_of(some())
    assert_same(loader.epoch(1, start), list(loader.epoch(1))[start:])


def test_the_layout_of_an_image_does_not_depend_on_its_batch():
    loader = loader_of(some())
    together = loader.draw(5, np.arange(23))
    for index in (0, 7, 22):
        alone = loader.draw(5, np.array([index]))
        for name in ("image", "a", "b", "shown", "centre", "colour"):
            assert np.array_equal(getattr(alone, name)[0], getattr(together, name)[index])


def test_epochs_and_seeds_differ():
    dataset = some()
    loader = loader_of(dataset)
    first, second = next(loader.epoch(0)), next(loader.epoch(1))
    assert not torch.equal(first[0], second[0])
    other_seed = next(loader_of(dataset, seed=1).epoch(0))
    assert not torch.equal(first[0], other_seed[0])
    layouts = [loader.draw(epoch, np.arange(23)) for epoch in range(4)]
    for name in (
        "image",
        "a",
        "b",
        "centre",
        "colour",
    ):  # each image is laid out anew, not only the order
        values = [getattr(layout, name) for layout in layouts]
        assert all(
            (values[i] != values[j]).any(-1).mean() > 0.5 for i in range(4) for j in range(i)
        )


@pytest.mark.parametrize("batch", [4, 23])
def test_every_image_is_seen_at_most_once_an_epoch(batch):
    loader = loader_of(some(further=0), batch=batch, augment=NONE)
    assert len(loader) == 23 // batch
    orders = []
    for epoch in range(3):
        seen = [targets["labels"][:, 0] for _, targets in loader.epoch(epoch)]
        assert [len(labels) for labels in seen] == [batch] * len(loader)
        orders.append(torch.cat(seen).tolist())
        assert len(set(orders[-1])) == len(loader) * batch  # the rest is not used in this epoch
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_over_many_epochs_every_image_comes_equally_often_in_every_place():
    loader = loader_of(Pictures([(4, 4)] * 5), batch=1, augment=NONE, imgsz=32)
    counts = np.zeros((5, 5))  # place in the epoch, image
    for epoch in range(600):
        order = uniforms(0, epoch, np.arange(5), 1)[:, 0].argsort()
        counts[np.arange(5), order] += 1
        if epoch < 5:
            labels = [int(targets["labels"][0, 0]) for _, targets in loader.epoch(epoch)]
            assert labels == order.tolist()
    assert abs(counts - 120).max() < 5 * np.sqrt(120 * 0.8)


def test_without_augmentation_the_letterbox_is_rendered():
    dataset = some()
    loader = loader_of(dataset, augment=NONE)
    images, targets = next(loader.epoch(0))
    indices = targets["labels"][:, 0].numpy()
    assert torch.equal(images, render(loader.store, letterbox(loader.store, indices, 64), 64))


# --- random numbers ---


def finalise(z):
    """The output function of SplitMix64, in Python's integers."""
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ z >> 27) * 0x94D049BB133111EB & MASK
    return z ^ z >> 31


def splitmix64(state, count):
    """The first outputs of the generator from this state."""
    return [finalise(state + (k + 1) * 0x9E3779B97F4A7C15 & MASK) for k in range(count)]


def test_the_reference_gives_the_published_numbers():
    assert splitmix64(1234567, 5) == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


@pytest.mark.parametrize("seed", [0, 1234567, 2**64 - 1, -1])
def test_uniforms_are_nested_first_outputs_of_splitmix64(seed):
    # Each of seed, epoch, index and column in turn is added to the state of a fresh generator.
    def first(state):
        return splitmix64(state & MASK, 1)[0]

    indices = np.array([0, 3, 10**6])
    found = uniforms(seed, 17, indices, 4)
    for row, index in zip(found, indices.tolist(), strict=True):
        key = first(first(first(seed) + 17) + index)
        assert row.tolist() == [(first(key + column) >> 11) / 2**53 for column in range(4)]


def test_uniforms_do_not_depend_on_order_or_count():
    indices = np.random.default_rng(0).permutation(1000)
    whole = uniforms(5, 2, np.arange(1000), 14)
    assert np.array_equal(uniforms(5, 2, indices, 14), whole[indices])
    assert np.array_equal(uniforms(5, 2, indices, 3), whole[indices, :3])
    assert whole.shape == (1000, 14) and whole.dtype == np.float64


def test_uniforms_look_uniform_and_independent():
    n = 20000
    block = np.stack(
        [uniforms(seed, epoch, np.arange(n), 6) for seed, epoch in ((0, 0), (0, 1), (1, 0))], -1
    )
    u = block.reshape(n, -1)  # columns, and the same columns of the next epoch and the next seed
    assert u.min() >= 0 and u.max() < 1 and u.max() > 0.999
    assert abs(u.mean(0) - 0.5).max() < 5 / np.sqrt(12 * n)
    assert abs(u.var(0) - 1 / 12).max() < 5 / np.sqrt(180 * n)
    assert abs((u**3).mean(0) - 0.25).max() < 5 * np.sqrt(1 / 7 - 1 / 16) / np.sqrt(n)
    columns = np.corrcoef(u.T) - np.eye(u.shape[1])
    assert abs(columns).max() < 5 / np.sqrt(n)
    neighbours = [np.corrcoef(c[:-1], c[1:])[0, 1] for c in u.T]
    assert np.abs(neighbours).max() < 5 / np.sqrt(n)
    grid = np.histogram2d(u[:, 0], u[:, 1], bins=10, range=[[0, 1], [0, 1]])[0]
    assert ((grid - n / 100) ** 2 / (n / 100)).sum() < 99 + 5 * np.sqrt(2 * 99)
    assert len(np.unique(u)) == u.size


def test_draws_have_the_strengths_that_were_asked_for():
    dataset = Pictures([(64, 64)] * 2000, further=0)
    dataset.images = [np.zeros((1, 1, 3), np.uint8)] * 2000
    augment = Augment(
        mosaic=0.3, translate=0.2, scale=0.4, fliplr=0.25, hsv_h=0.1, hsv_s=0.6, hsv_v=0.5
    )
    layout = loader_of(dataset, augment=augment).draw(0, np.arange(2000))
    tiled = np.isfinite(layout.centre[:, 0])
    mirrored = layout.a[:, 0, 0] < 0
    assert abs(tiled.mean() - 0.3) < 0.05 and abs(mirrored.mean() - 0.25) < 0.05
    assert abs((tiled & mirrored).mean() - 0.075) < 0.03
    factor = layout.a[:, 0, 1] / 64  # a picture of one pixel is drawn 64 pixels wide
    assert 0.6 <= factor.min() < 0.61 and 1.39 < factor.max() <= 1.4
    low, high = layout.colour.min(0), layout.colour.max(0)
    gains = np.array([0.1, 0.6, 0.5])
    assert (abs(low - (1 - gains)) < 0.01).all() and (abs(high - (1 + gains)) < 0.01).all()
    middle = (
        layout.shown[~tiled, 0].mean(-1) / 64
    )  # of letterboxed images: where the picture's centre went
    assert (abs(middle.min(0) - 0.3) < 0.01).all() and (abs(middle.max(0) - 0.7) < 0.01).all()
    assert (layout.image[:, 0] == np.arange(2000)).all()
    partners = layout.image[tiled, 1:]
    assert partners.min() < 20 and partners.max() > 1980 and len(np.unique(partners)) > 1000

    unshifted = Augment(mosaic=1, translate=0, scale=0, fliplr=0, hsv_h=0, hsv_s=0, hsv_v=0)
    layout = loader_of(dataset, augment=unshifted).draw(0, np.arange(2000))
    assert layout.colour is None
    # on the canvas of 2S the tiles meet in [S/2, 3S/2]; its middle is what is shown
    assert (abs(layout.centre.min(0) - 0) < 0.2).all() and (
        abs(layout.centre.max(0) - 64) < 0.2
    ).all()


# --- targets ---


@pytest.mark.parametrize(
    ("counts", "padded"),
    [([0, 0], 8), ([3, 8], 8), ([9, 1], 16), ([16], 16), ([17], 32), ([70], 128)],
)
def test_targets_are_padded_to_few_sizes(counts, padded):
    rng = np.random.default_rng(0)
    objects = [(rng.random((n, 4)).astype(np.float32), rng.integers(0, 20, n)) for n in counts]
    targets = pad(objects, [str(n) for n in counts], torch.device("cpu"))
    assert targets["ids"] == [str(n) for n in counts]
    assert (
        targets["boxes_xyxy"].shape == (len(counts), padded, 4)
        and targets["boxes_xyxy"].dtype == torch.float32
    )
    assert (
        targets["labels"].shape == (len(counts), padded) and targets["labels"].dtype == torch.int64
    )
    for n, (boxes, labels) in enumerate(objects):
        assert np.array_equal(targets["boxes_xyxy"][n, : counts[n]], boxes)
        assert targets["labels"][n, : counts[n]].tolist() == labels.tolist()
        assert (targets["labels"][n, counts[n] :] == -1).all() and (
            targets["boxes_xyxy"][n, counts[n] :] == 0
        ).all()


def test_targets_lie_inside_the_images():
    loader = loader_of(some(further=6), batch=8)
    objects = 0
    for epoch in range(12):
        for images, targets in loader.epoch(epoch):
            assert images.shape == (8, 3, 64, 64) and images.dtype == torch.float32
            assert images.min() >= 0 and images.max() <= 1
            real = targets["boxes_xyxy"][targets["labels"] >= 0]
            assert real.min() >= 0 and real.max() <= 64
            assert (real[:, 2:] - real[:, :2] > 2).all()
            assert targets["labels"].max() < 23
            objects += len(real)
    assert objects > 1000


# --- validation ---


def test_validation_shows_each_image_once_and_in_order():
    dataset = some()
    loader = ValLoader(Store(dataset, 64, workers=1, storage="resident"), 5)
    batches = list(loader)
    assert len(batches) == len(loader) == 5 and [len(images) for images, _, _ in batches] == [
        5,
        5,
        5,
        5,
        3,
    ]
    targets = [target for _, some_targets, _ in batches for target in some_targets]
    assert [target["id"] for target in targets] == [f"picture {i}" for i in range(23)]
    for target, boxes in zip(targets, dataset.boxes, strict=True):
        assert np.array_equal(target["boxes_xyxy"], boxes)  # in pixels of the file
    for (images, _, _), (again, _, _) in zip(batches, loader, strict=True):
        assert torch.equal(images, again)


def test_boxes_come_back_to_the_pixels_of_the_file():
    sizes = [
        (64, 64),
        (37, 61),
        (61, 37),
        (1, 50),
        (999, 333),
        (375, 500),
        (501, 77),
        (3001, 2003),
        (97, 4097),
    ]
    dataset = Pictures(sizes, further=10)
    loader = ValLoader(Store(dataset, 64, workers=1, storage="resident"), 4)
    number = 0
    for _, targets, to_native in loader:
        detections = []
        for target in targets:
            height, width = sizes[number]
            number += 1
            # the letterbox, from its description: the whole in the middle, as large as fits, at
            # whole pixels
            placed = [max(round(side * 64 / max(height, width)), 1) for side in (width, height)]
            if max(height, width) > 64:  # reduced first, to whole pixels
                reduced = [
                    max(round(side * (64 / max(height, width))), 1) for side in (width, height)
                ]
                assert reduced == placed
            scale = np.tile(np.array(placed) / [width, height], 2)
            corner = np.tile([(64 - side) // 2 for side in placed], 2)
            boxes = torch.from_numpy(target["boxes_xyxy"] * scale + corner).float()
            scores, labels = torch.rand(len(boxes)), torch.arange(len(boxes))
            detections.append({"boxes_xyxy": boxes, "scores": scores, "labels": labels})
        for native, given, target in zip(to_native(detections), detections, targets, strict=True):
            error = abs(native["boxes_xyxy"].numpy() - target["boxes_xyxy"])
            assert error.max() < 1e-3
            assert native["boxes_xyxy"].dtype == torch.float32
            assert torch.equal(native["scores"], given["scores"]) and torch.equal(
                native["labels"], given["labels"]
            )
    assert number == len(sizes)


def test_what_lies_in_the_padding_is_clipped_to_the_picture():
    loader = ValLoader(Store(Pictures([(100, 200)]), 64, workers=1, storage="resident"), 1)
    ((_, _, to_native),) = list(loader)
    boxes = torch.tensor([[-5.0, -3.0, 80.0, 70.0], [10.0, 0.0, 20.0, 5.0]])
    found = to_native(
        [{"boxes_xyxy": boxes, "scores": torch.ones(2), "labels": torch.zeros(2, dtype=torch.long)}]
    )
    assert found[0]["boxes_xyxy"][0].tolist() == [0, 0, 200, 100]
    assert found[0]["boxes_xyxy"][1].tolist() == [31.25, 0, 62.5, 0]
    nothing = {
        "boxes_xyxy": torch.empty(0, 4),
        "scores": torch.empty(0),
        "labels": torch.empty(0, dtype=torch.long),
    }
    assert to_native([nothing])[0]["boxes_xyxy"].shape == (0, 4)
    with pytest.raises(ValueError):  # one entry for each image
        to_native([])


# --- refused ---


def refused(build, *words):
    with pytest.raises(UserError) as caught:
        build()
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_a_batch_larger_than_the_set_is_refused():
    refused(lambda: loader_of(some(5), batch=6), "batch", "6", "5")
    refused(lambda: loader_of(some(9), batch=6, limit=5), "batch", "6", "5")
    assert len(loader_of(some(5), batch=5)) == 1


@pytest.mark.parametrize("imgsz", [0, -32, 16, 100, 321])
def test_an_image_size_that_is_no_multiple_of_32_is_refused(imgsz):
    refused(lambda: check_size(imgsz), "imgsz", str(imgsz), "32")
