"""Mean IoU on paper, against the rule in loops, and what it writes."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

import eval as eval_script
from kdmini.contracts import UserError
from kdmini.data.palette import PALETTE
from kdmini.segmentation.mean_iou import MeanIoU
from tests.segmentation.written_out import VOID, batch, random_scene, scores

NAMES = ["ground", "cat", "dog"]


def measure(*scenes, names=NAMES):
    metric = MeanIoU(list(names))
    for scene in scenes:
        metric.update(*scene)
    return metric


# --- on paper


def test_a_case_computed_on_paper():
    # ground 4 of 5 right; cat 1 of 2, and one more said; a pixel of void, said to be dog
    true = [[0, 0, 0, 0], [0, 1, 1, VOID]]
    predicted = [[0, 0, 0, 0], [1, 1, 0, 2]]
    metric = measure(batch((predicted, true)))
    assert metric.compute() == {
        "mIoU": pytest.approx((4 / 6 + 1 / 3) / 2),
        "accuracy": pytest.approx(5 / 7),
        "mAcc": pytest.approx((4 / 5 + 1 / 2) / 2),
        "absent": 1,  # the dog
    }
    table = metric.per_class()
    assert table["cat"]["mIoU"] == pytest.approx(1 / 3)
    assert table["cat"]["images"] == 1
    assert math.isnan(table["dog"]["mIoU"])
    assert table["dog"]["images"] == 0
    assert metric.confusion().tolist() == [[4, 1, 0], [1, 1, 0], [0, 0, 0]]
    assert [*metric.per_image().values()] == [pytest.approx(5 / 7)]


def test_a_class_that_is_only_predicted_counts_as_nothing_found():
    metric = measure(batch(([[0, 2]], [[0, 0]])))
    assert metric.compute()["mIoU"] == pytest.approx((1 / 2 + 0) / 2)
    assert metric.compute()["mAcc"] == pytest.approx(1 / 2)
    assert metric.compute()["absent"] == 1


def test_pixels_are_counted_over_all_images():
    """Not the mean of what each image scores."""
    small = ([[1]], [[1]])
    large = ([[0] * 9], [[1] * 9])
    assert measure(batch(small, large)).per_class()["cat"]["mIoU"] == pytest.approx(1 / 10)


def test_nothing_is_zero():
    void = batch(([[1]], [[VOID]]))
    for metric in (MeanIoU(NAMES), measure(([], [])), measure(void)):
        assert metric.compute() == {"mIoU": 0, "accuracy": 0, "mAcc": 0, "absent": 3}
        assert metric.chance() == 0
    assert [*measure(void).per_image().values()] == [1]  # nothing of it is wrong


# --- against loops


@pytest.mark.parametrize("seed", range(8))
def test_random_masks_against_the_rule_in_loops(seed):
    count = 4 + 5 * seed
    scene = random_scene(seed, count)
    expected = scores(scene, count)
    metric = measure(scene, names=map(str, range(count)))
    assert metric.compute() == {
        "mIoU": pytest.approx(np.nanmean(expected["iou"]), rel=1e-12),
        "accuracy": pytest.approx(expected["all"][0], rel=1e-12),
        "mAcc": pytest.approx(np.nanmean(expected["acc"]), rel=1e-12),
        "absent": np.isnan(expected["iou"]).sum(),
    }
    rows = metric.per_class().values()
    for key, other in (("mIoU", "iou"), ("mAcc", "acc"), ("images", "images")):
        np.testing.assert_allclose([row[key] for row in rows], expected[other], rtol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_chance_is_the_score_of_the_commonest_class_everywhere(seed):
    predictions, targets = random_scene(seed, 6)
    metric = measure((predictions, targets), names="abcdef")
    guesses = []
    for label in range(6):
        flat = [{"mask": torch.full_like(p["mask"], label)} for p in predictions]
        guesses.append(measure((flat, targets), names="abcdef").compute()["mIoU"])
    assert metric.chance() == pytest.approx(max(guesses))
    assert metric.chance() > 0


def test_the_most_classes_that_a_mask_can_hold():
    names = [str(index) for index in range(255)]
    true = np.arange(256, dtype=np.uint8).reshape(16, 16)
    predicted = np.where(true == VOID, 254, true)
    assert measure(batch((predicted, true)), names=names).compute()["mIoU"] == 1


# --- records


def test_records_are_small_and_those_of_several_processes_join():
    one = random_scene(0, 9)
    other = random_scene(1, 9)
    names = list(map(str, range(9)))
    both = measure(one, other, names=names)
    assert [record.shape for record in both.records] == [(9, 10), (9, 10)]
    assert both.records[0].dtype == np.int64
    joined = MeanIoU(names)
    joined.records = measure(other, names=names).records + measure(one, names=names).records
    assert joined.compute() == both.compute()
    np.testing.assert_equal(joined.per_class(), both.per_class())
    assert joined.chance() == both.chance()


# --- mistakes


@pytest.mark.parametrize(
    "predicted, true, error, said",
    [
        ([[0]], [[3]], UserError, "mask of set/000000 has index 3, but the metric knows 3 names"),
        ([[3]], [[0]], UserError, "prediction for set/000000 has index 3, but"),
        ([[-1]], [[0]], ValueError, "set/000000: predicted indices are not from 0 to 255"),
        ([[256]], [[0]], ValueError, "set/000000: predicted indices are not from 0 to 255"),
        ([[0, 0]], [[0], [0]], ValueError, r"a mask of \(2, 1\), predicted \(1, 2\)"),
    ],
)
def test_masks_that_cannot_be_scored_are_named(predicted, true, error, said):
    with pytest.raises(error, match=said):
        measure(batch((predicted, true)))


def test_one_prediction_an_image():
    predictions, targets = random_scene(0, 9)
    with pytest.raises(ValueError, match="4 predictions for 5 targets"):
        MeanIoU(NAMES).update(predictions[1:], targets)


# --- what it writes


def test_predictions_are_saved_as_palette_pngs_under_their_ids(tmp_path):
    scene = random_scene(2, 9)
    folder = measure(scene, names="abcdefghi").save(tmp_path / "student")
    assert folder == tmp_path / "student"
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 5
    for prediction, target in zip(*scene, strict=True):
        with Image.open(folder / f"{target['id']}.png") as image:
            assert image.mode == "P"
            np.testing.assert_array_equal(np.asarray(image), prediction["mask"])
            colours = PALETTE[prediction["mask"].numpy()]
            np.testing.assert_array_equal(np.asarray(image.convert("RGB")), colours)


def test_ids_never_lead_out_of_the_folder_nor_fall_together(tmp_path):
    ids = ["../up", "/etc/x", "a/../../b", "a:b", "a|b", "A:B", "", "..", 'c"\n\\d', "e.f"]
    predictions, targets = batch(*[([[n % 3]], [[0]]) for n in range(len(ids))])
    for target, id in zip(targets, ids, strict=True):
        target["id"] = id
    (tmp_path / "inside").mkdir()
    measure((predictions, targets)).save(tmp_path / "inside" / "student")
    files = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png")}
    inside = "inside/student"
    names = ["_/up", "_/etc/x", "a/_/_/b", "a_b", "a_b_", "A_B__", "_", "__", "c___d", "e.f"]
    assert files == {f"{inside}/{name}.png" for name in names}


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "set").write_text("a file")
    with pytest.raises(UserError, match=r"cannot write .*set/000000\.png .*another folder"):
        measure(random_scene(0, 9), names="abcdefghi").save(tmp_path)
    assert (tmp_path / "set").read_text() == "a file"


def test_the_table_of_eval_shows_images_and_scores_by_class():
    metric = measure(batch(([[0, 1]], [[0, 1]]), ([[0, 0]], [[0, 0]])))
    table = eval_script.table([eval_script.Scored("student", metric, metric.compute(), "")])
    lines = [line.split() for line in table.splitlines()]
    assert lines[1] == ["images", "mIoU", "accuracy", "mAcc"]
    assert lines[2] == ["all", "classes", "1.000", "1.000", "1.000"]
    assert lines[3] == ["ground", "2", "1.000", "-", "1.000"]
    assert lines[5] == ["dog", "0", "-", "-", "-"]


def test_scores_are_plain_numbers():
    metric = measure(random_scene(0, 9), names="abcdefghi")
    assert json.loads(json.dumps(metric.compute())) == metric.compute()
    assert metric.fitness in metric.compute()
    assert set(metric.summary) <= set(metric.compute())
