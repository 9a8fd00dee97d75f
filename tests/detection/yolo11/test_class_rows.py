"""A file fitted to a model: class rows by name, and what is refused as it is no fit."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kdmini.checkpoint import save_best
from kdmini.classes import COCO_NAME
from kdmini.contracts import UserError
from kdmini.data.voc import VOC_NAMES
from kdmini.detection.yolo11 import weights
from kdmini.detection.yolo11.model import YOLO11
from tests.detection.yolo11.weight_files import COCO_NAMES, ROWS, CocoFile, assert_equal

BIASES = ROWS[1]
STEM = "model.0.conv.weight"  # stands for all that does not depend on the classes
ANEW = -1.0  # what everything is in a model that was just made


def weight_file(names: list[str]) -> weights.WeightFile:
    """A YOLO11s whose class row k holds the number k everywhere."""
    numbers = torch.arange(float(len(names)))
    state = {STEM: torch.rand(32, 3, 3, 3)}
    for key in ROWS:
        is_bias = key.endswith("bias")
        state[key] = numbers if is_bias else numbers[:, None, None, None].expand(-1, 8, 1, 1)
    return weights.WeightFile(
        path=Path("yolo11s.pt"),
        sha256="",
        state=state,
        names=names,
        scale="s",
        sppf_act=True,
        license="",
        version="",
    )


def fresh_state(classes: int) -> dict[str, Tensor]:
    state = {STEM: torch.full((32, 3, 3, 3), ANEW)}
    for key in ROWS:
        shape = (classes,) if key.endswith("bias") else (classes, 8, 1, 1)
        state[key] = torch.full(shape, ANEW)
    return state


def carried(names_of_file: list[str], names: list[str]) -> list[float]:
    """For each of `names` the row that it began with, ANEW where with none."""
    file = weight_file(names_of_file)
    result = weights.fit(file, fresh_state(len(names)), names, "s", "by_name")
    return result[BIASES].tolist()


# --- carried over by name


def test_rows_follow_their_names() -> None:
    assert carried(["cat", "dog", "cow"], ["cow", "cat"]) == [2, 0]


def test_new_classes_stay_as_initialised(capsys: pytest.CaptureFixture[str]) -> None:
    assert carried(["cat", "dog"], ["unicorn", "dog"]) == [ANEW, 1]
    assert "new: 'unicorn'" in capsys.readouterr().out


def test_the_synonyms_work_in_both_directions(capsys: pytest.CaptureFixture[str]) -> None:
    names = ["unicorn", "tv", "couch", "person", "sofa"]
    sofa = VOC_NAMES.index("sofa")
    tv = VOC_NAMES.index("tvmonitor")
    person = VOC_NAMES.index("person")
    assert carried(VOC_NAMES, names) == [ANEW, tv, sofa, person, sofa]
    assert "new: 'unicorn'" in capsys.readouterr().out


def test_a_class_of_its_own_name_goes_before_a_synonym() -> None:
    assert carried(["couch", "sofa"], ["sofa", "couch"]) == [1, 0]


def test_every_voc_class_takes_its_coco_row(capsys: pytest.CaptureFixture[str]) -> None:
    coco = weight_file(COCO_NAMES)
    result = weights.fit(coco, fresh_state(20), VOC_NAMES, "s", "by_name")
    # as published: aeroplane is COCO's fifth class, person its first, tvmonitor its 63rd
    published = [4, 1, 14, 8, 39, 5, 2, 15, 56, 19, 60, 16, 17, 3, 0, 58, 18, 57, 6, 62]
    for key in ROWS:
        assert [row.unique().item() for row in result[key]] == published
    assert torch.equal(result[STEM], coco.state[STEM])

    line = capsys.readouterr().out
    assert "20 of 80 class rows" in line
    assert "airplane = aeroplane" in line
    assert line.endswith("new: none\n")


def test_the_class_branch_of_n_keeps_the_width_of_the_file(coco_n: CocoFile) -> None:
    """By the rule for 20 classes it would be 64 wide, and the file's 80 would not fit."""
    source = {"path": str(coco_n.path), "classes": "by_name"}
    loaded = YOLO11(VOC_NAMES, "n", weights=source)
    assert YOLO11(VOC_NAMES, "n").card["cls_width"] == 64
    assert loaded.card["cls_width"] == 80

    rows = [COCO_NAMES.index(COCO_NAME.get(name, name)) for name in VOC_NAMES]
    for key, tensor in loaded.state_dict().items():
        expected = coco_n.state[key]
        assert torch.equal(tensor, expected[rows] if key in ROWS else expected), key


def test_a_best_pt_of_that_width_loads_and_is_cut_again(coco_n: CocoFile, tmp_path: Path) -> None:
    source = {"path": str(coco_n.path), "classes": "by_name"}
    student = YOLO11(VOC_NAMES, "n", weights=source)
    path = tmp_path / "best.pt"
    save_best(path, student, imgsz=320, epoch=0, fitness=0.5)

    again = YOLO11(VOC_NAMES, "n", weights=str(path))
    assert again.card == student.card
    assert_equal(again.state_dict(), student.state_dict())

    two = YOLO11(["person", "sheep"], "n", weights={"path": str(path), "classes": "by_name"})
    rows = [VOC_NAMES.index("person"), VOC_NAMES.index("sheep")]
    for key in ROWS:
        assert torch.equal(two.state_dict()[key], student.state_dict()[key][rows]), key


# --- other classes need a decision


def test_classes_that_only_one_side_has_are_named_with_the_two_ways_on() -> None:
    with pytest.raises(UserError) as caught:
        weights.fit(weight_file(COCO_NAMES), fresh_state(20), VOC_NAMES, "s", None)
    message = str(caught.value)
    assert "yolo11s.pt: the file has 80 classes, the data 20" in message
    assert "'airplane'" in message
    assert "'aeroplane'" in message
    assert ROWS[0] in message
    assert "classes: by_name" in message
    assert "classes: keep" in message


def test_the_same_classes_in_another_order_need_a_decision_too() -> None:
    """The tensors would fit, but their rows would mean other classes."""
    with pytest.raises(UserError, match="classes: by_name"):
        weights.fit(weight_file(["cat", "dog"]), fresh_state(2), ["dog", "cat"], "s", None)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"path": "a.pt", "classes": "by_nam"}, "weights: classes: .*by_name.*got 'by_nam'"),
        ({"path": "a.pt", "clases": "keep"}, "weights: unknown key `clases`.*`classes`"),
        ({"classes": "keep"}, "weights: no `path`"),
        ({"path": "a.pt", "names": "cat"}, "weights: names: expected list"),
        ({"path": "a.pt", "sppf_act": 1}, "weights: sppf_act: expected bool"),
    ],
)
def test_a_setting_that_is_none_is_refused_by_name(settings: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        YOLO11(VOC_NAMES, "s", weights=settings)


# --- what does not fit

every_decision = pytest.mark.parametrize("classes", [None, "keep", "by_name"])


def fit_voc(
    classes: str | None,
    file: weights.WeightFile | None = None,
    state: dict[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """A YOLO11s of the VOC classes into another, but for what is given."""
    if file is None:
        file = weight_file(VOC_NAMES)
    if state is None:
        state = fresh_state(20)
    return weights.fit(file, state, VOC_NAMES, "s", classes)


@every_decision
def test_a_file_of_the_same_scale_and_classes_fits(classes: str | None) -> None:
    file = weight_file(VOC_NAMES)
    assert_equal(fit_voc(classes, file), file.state)


@pytest.mark.parametrize(
    "scale, title",
    [
        ("m", "YOLO11m"),
        ([0.5, 0.25, 64], "YOLO11 [0.5, 0.25, 64]"),
    ],
)
def test_a_file_of_another_scale_is_refused(scale: Any, title: str) -> None:
    message = f"yolo11s.pt is YOLO11s, the config says {title}"
    with pytest.raises(UserError, match=re.escape(message)):
        weights.check_scale(weight_file(VOC_NAMES), scale)


@every_decision
def test_a_tensor_that_the_file_lacks_is_named(classes: str | None) -> None:
    state = fresh_state(20)
    state["model.7.conv.weight"] = torch.rand(1)
    with pytest.raises(UserError, match=r"yolo11s.pt lacks 'model.7.conv.weight'"):
        fit_voc(classes, state=state)


@every_decision
def test_a_tensor_that_the_model_lacks_is_named(classes: str | None) -> None:
    state = fresh_state(20)
    del state[STEM]
    with pytest.raises(UserError, match=r"yolo11s.pt has unknown 'model.0.conv.weight'"):
        fit_voc(classes, state=state)


@every_decision
@pytest.mark.parametrize("key", [STEM, ROWS[1], ROWS[4]])
def test_a_tensor_of_another_shape_is_named(classes: str | None, key: str) -> None:
    file = weight_file(VOC_NAMES)
    file.state[key] = torch.rand(3)
    with pytest.raises(UserError, match=f"yolo11s.pt has other shapes in '{re.escape(key)}'"):
        fit_voc(classes, file)
