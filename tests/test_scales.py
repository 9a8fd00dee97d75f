"""One rule of scales: an update sees n * mean(task) + kd_scale * mean(KD) over its images,
however they are split into micro-batches.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kdmini.check import rows_of_gradients
from kdmini.terms import masked
from tests.precise import float_or_double
from tests.splits import (
    IMAGES,
    KD_SCALES,
    ONLY_OVER_BATCH,
    OVER_BATCH,
    Pair,
    Scales,
    Split,
    all_sections,
    of_classes,
    of_masks,
    same_mask,
    scenes,
    sections,
)

SECTIONS = all_sections()
LIMIT = 1e-6  # relative


@pytest.fixture(scope="module", autouse=True)
def _masks_are_the_same_for_every_image() -> Any:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(masked.torch, "rand_like", same_mask)
        yield


@pytest.fixture(scope="module", params=SECTIONS)
def pair(request: pytest.FixtureRequest) -> Pair:
    return Pair(SECTIONS[request.param])


def of_kd(pair: Pair, batch: int, scales: Scales) -> Tensor:
    return pair.gradient(batch, scales, task=0.0)


def of_task(pair: Pair, batch: int, loss_scale: str) -> Tensor:
    return pair.gradient(batch, Scales(loss_scale), kd=0.0)


def apart(one: Tensor, other: Tensor) -> float:
    return ((one - other).norm() / other.norm()).item()


@pytest.mark.parametrize("kd_scale", KD_SCALES)
@pytest.mark.parametrize("loss_scale", ["batch", "none"])
def test_an_update_sees_the_same_kd_however_its_images_are_split(
    pair: Pair, loss_scale: str, kd_scale: Any
) -> None:
    factor = IMAGES if kd_scale == "batch" else kd_scale
    mean = of_kd(pair, IMAGES, Scales())  # of one batch at a scale of 1
    assert mean.norm() > 0
    for batch in (16, 4, 1):
        assert apart(of_kd(pair, batch, Scales(loss_scale, kd_scale)), factor * mean) < LIMIT


def of_boxes() -> Pair:
    return Pair(SECTIONS["attention sample"])


@pytest.mark.parametrize("make", [of_boxes, of_masks, of_classes])
@pytest.mark.parametrize(("loss_scale", "factor"), [("batch", IMAGES), ("none", 1)])
def test_and_the_same_task_so_that_their_ratio_is_that_of_one_batch(
    monkeypatch: pytest.MonkeyPatch, make: Callable[[], Pair], loss_scale: str, factor: int
) -> None:
    monkeypatch.setattr(Tensor, "float", float_or_double)
    pair = make()
    mean = of_task(pair, IMAGES, "none")
    ratios = []
    for batch in (16, 8, 4, 1):
        task = of_task(pair, batch, loss_scale)
        both = pair.gradient(batch, Scales(loss_scale))
        assert apart(task, factor * mean) < LIMIT
        ratios.append(((both - task).norm() / task.norm()).item())
    assert ratios == pytest.approx([ratios[0]] * 4, rel=LIMIT)


@pytest.mark.parametrize("name", [*OVER_BATCH, *ONLY_OVER_BATCH])
def test_what_is_taken_over_a_batch_differs_by_its_split(name: str) -> None:
    """As docs/terms.md has it; so the images of these tests can tell."""
    pair = Pair(sections({name: "batch"} if name in OVER_BATCH else {})[name])
    assert apart(of_kd(pair, 1, Scales()), of_kd(pair, IMAGES, Scales())) > LIMIT


def test_notes_falls_with_the_batch_of_a_step() -> None:
    section = SECTIONS["attention sample"]
    term = {**section["attention"], "reduction": "notes"}
    pair = Pair({**section, "attention": term})
    ratio = of_kd(pair, 4, Scales()).norm() / of_kd(pair, 16, Scales()).norm()
    assert ratio.item() == pytest.approx(2, rel=0.2)  # the root of 16 / 4


# --- --check


def test_check_shows_the_ratio_that_training_has() -> None:
    """On an update of four micro-batches of the same four images."""
    pair = Pair(SECTIONS["attention sample"])
    scales = Scales("batch", 40.0)
    images, targets = scenes()
    first = {key: value[:4] for key, value in targets.items()}
    four_times = {key: torch.cat([value] * 4) for key, value in first.items()}
    repeated = Split(torch.cat([images[:4]] * 4), four_times, 4)

    student = sum(p.numel() for p in pair.student.parameters())
    kd = pair.gradient(4, scales, task=0.0, loader=repeated)[:student]
    task = pair.gradient(4, scales, kd=0.0, loader=repeated)[:student]
    expected = 100 * kd.norm() / task.norm()

    pair.weigh(scales)
    batch = {**first, "ids": ["a", "b", "c", "d"]}
    rows = rows_of_gradients(pair.training(repeated, "batch"), images[:4], batch)
    shown = {row.what: row.value for row in rows}["KD / task gradient"]
    ratio, text = shown.split("%")
    assert float(ratio) == pytest.approx(expected.item(), abs=0.01)
    assert text == " in updates of 16 images"
