"""Images without ground truth, mixed into the batches."""

from pathlib import Path

import numpy as np
import pytest
import torch

import train as train_script
from kdmini import engine
from kdmini.contracts import UserError
from kdmini.data.loader import Augment, TrainLoader
from kdmini.data.store import Store
from kdmini.data.unlabelled import MixedLoader, Unlabelled, others_of
from kdmini.detection.voc import VOC
from tests.commands import assert_equal, newest, records, run
from tests.conftest import SHAPE_NAMES

BATCH = 8
EPOCHS = 5


@pytest.fixture(scope="module")
def stores(shapes: Path) -> tuple[Store, Store]:
    """24 images with boxes, and 8 of which nothing is known."""
    labelled = VOC(str(shapes), ["train"], names=SHAPE_NAMES)
    others = Unlabelled(VOC(str(shapes), ["val"], names=SHAPE_NAMES))
    return Store(labelled, 64), Store(others, 64)


def mixed(stores: tuple[Store, Store], rank: int = 0, world: int = 1) -> MixedLoader:
    return MixedLoader(*stores, 0.25, BATCH, EPOCHS, Augment(close_mosaic=2), 3, rank, world)


def test_batches_begin_with_those_that_have_ground_truth(stores: tuple[Store, Store]) -> None:
    loader = mixed(stores)
    alone = TrainLoader(stores[0], 6, EPOCHS, Augment(close_mosaic=2), 3)
    assert len(loader) == len(alone) == 4
    for epoch in range(EPOCHS):
        pairs = zip(loader.epoch(epoch), alone.epoch(epoch), strict=True)
        for (images, targets), (expected, expected_targets) in pairs:
            assert len(images) == BATCH
            assert torch.equal(images[:6], expected)
            assert_equal(targets, expected_targets)


def test_the_others_come_once_each_in_an_order_that_goes_on(stores: tuple[Store, Store]) -> None:
    """Of 8 images, two a batch: a pass over them takes the four batches of an epoch."""
    plain = Augment(0, 0, 0, 0, 0, 0, 0)
    loader = MixedLoader(*stores, 0.25, BATCH, EPOCHS, plain, 3)
    orders = []
    for epoch in range(EPOCHS):
        shown = torch.cat([images[6:] for images, _ in loader.epoch(epoch)])
        orders.append([float(image.double().sum()) for image in shown])
    assert all(sorted(order) == sorted(orders[0]) for order in orders)
    assert len(set(orders[0])) == 8
    assert len({tuple(order) for order in orders}) == EPOCHS


@pytest.mark.parametrize("epoch", range(EPOCHS))
def test_an_epoch_is_gone_on_with_from_any_step(stores: tuple[Store, Store], epoch: int) -> None:
    whole = [list(batch) for batch in mixed(stores).epoch(epoch)]
    for start in range(4):
        rest = [list(batch) for batch in mixed(stores).epoch(epoch, start)]
        assert_equal(rest, whole[start:])


def test_ranks_share_both_kinds(stores: tuple[Store, Store]) -> None:
    whole = [images for images, _ in mixed(stores).epoch(1)]
    ranks = [[images for images, _ in mixed(stores, rank, 2).epoch(1)] for rank in range(2)]
    for images, first, second in zip(whole, *ranks, strict=True):
        assert torch.equal(images[:6], torch.cat([first[:3], second[:3]]))
        assert torch.equal(images[6:], torch.cat([first[3:], second[3:]]))


def test_a_loss_sees_the_preds_of_the_first_images() -> None:
    images = torch.zeros(3, 3, 2, 2)
    preds = [torch.arange(3), (torch.arange(6).view(3, 2), {"a": torch.arange(3)})]
    part = engine.labelled(preds, images, {"ids": ["a", "b"]})
    assert [part[0].tolist(), part[1][0].tolist()] == [[0, 1], [[0, 1], [2, 3]]]
    assert part[1][1]["a"].tolist() == [0, 1]
    assert engine.labelled(preds, images, {"ids": ["a", "b", "c"]}) is preds


# --- whole runs

UNLABELLED = [
    "data.unlabelled={build: kdmini.detection.voc:VOC, splits: [train], share: 0.25, "
    "names: [circle, square, triangle, star, ring, cross]}",
    "train.epochs=2",
]


def test_a_run_learns_from_both_and_is_resumed_to_the_bit(
    config_file: Path, teacher_file: Path, tmp_path: Path
) -> None:
    command = ["--config", config_file, *UNLABELLED, f"teacher.weights={teacher_file}"]
    run(train_script, *command)
    whole = newest(tmp_path / "run")
    lines = records(tmp_path / "run")
    assert all(np.isfinite([line["loss/box"], line["loss/attention"]]).all() for line in lines[1:])

    other = tmp_path / "other"
    run(train_script, *command, f"run={other}")
    sorted((other / "ckpt").glob("*.pt"))[-1].unlink()
    run(train_script, "--resume", other)
    again = newest(other)
    for part in ("student", "ema", "optimizer"):
        assert_equal(again[part], whole[part], part)

    without = tmp_path / "without"
    run(train_script, *command, "data.unlabelled=null", "train.batch=6", f"run={without}")
    assert not torch.equal(
        newest(without)["student"]["model.0.conv.weight"], whole["student"]["model.0.conv.weight"]
    )


AFFINITY = "distill.affinity={build: kdmini.terms.affinity:AffinityDistillation, weight: 1}"


@pytest.mark.parametrize(
    "changes, said",
    [
        (["data.unlabelled.share=0.01"], r"0\.01 of 8 images is 0"),
        (["data.unlabelled.share=0.99"], r"0\.99 of 8 images is 8"),
        (["data.unlabelled.share=1"], "share"),
        (["data.unlabelled.share=half"], "share"),
        (["data.unlabelled.splits=[val]"], "8 images are in unlabelled and val both"),
        (["data.unlabelled.splitz=[val]"], "splitz"),
        (["teacher=null", "distill=null"], "only terms learn from it"),
        ([AFFINITY], r"distill\.affinity: it reads the ground truth"),
        (["data.limit=5"], "6 is more than the 5 training images"),
    ],
)
def test_what_cannot_be_is_one_line(
    config_file: Path, tmp_path: Path, changes: list[str], said: str
) -> None:
    with pytest.raises(SystemExit, match=said) as left:
        run(train_script, "--config", config_file, *UNLABELLED, *changes)
    assert "\n" not in str(left.value.code)
    assert not (tmp_path / "run").exists()


def test_ranks_need_a_share_each() -> None:
    assert others_of(8, 0.5, 2) == 4
    with pytest.raises(UserError, match="a multiple of 2"):
        others_of(8, 0.4, 2)
