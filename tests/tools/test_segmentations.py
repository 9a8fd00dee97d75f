"""The pictures of masks: what is right, what is wrong and who is, on masks made by hand."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("matplotlib")
from kdmini.data.layout import Frame
from kdmini.segmentation.mean_iou import MeanIoU
from kdmini.tools import segmentations
from kdmini.tools.scenes import Material, Scenes
from kdmini.tools.segmentations import Seen, fault_map, share_right, unpadded

NAMES = ["ground", "cat", "dog"]
SIZE = 64  # of a letterboxed square
TRUTH = np.array([[0, 1, 1, 2, 255, 255]], np.uint8)
STUDENT = np.array([[0, 1, 2, 1, 2, 0]], np.uint8)
TEACHER = np.array([[0, 2, 1, 0, 1, 0]], np.uint8)
WIDE = Frame(np.array([2.0, 2.0]), np.array([0.0, 16.0]), np.array([128, 64]), SIZE)


class Constant:
    """A network that gives every pixel the same class."""

    def __init__(self, label: int, names: list[str] = NAMES):
        self.label = label
        self.names = names

    def eval(self) -> "Constant":
        return self

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(len(images), len(self.names), 4, 4)
        logits[:, self.label] = 1
        return logits

    def decode(self, preds: torch.Tensor) -> list[dict[str, torch.Tensor]]:
        return [{"logits": logits} for logits in preds]


def seen(truth: np.ndarray | None = TRUTH, **said: np.ndarray) -> Seen:
    return Seen(Image.new("RGB", (6, 1)), truth, said, "a")


def test_void_is_neither_right_nor_wrong() -> None:
    assert share_right(STUDENT, TRUTH) == 0.5
    assert share_right(STUDENT, np.full_like(TRUTH, 255)) == 1
    assert fault_map(seen(teacher=TEACHER, student=STUDENT)).tolist() == [[0, 2, 1, 3, 0, 0]]
    assert fault_map(seen(student=STUDENT)).tolist() == [[0, 0, 1, 1, 0, 0]]


def test_without_the_truth_networks_are_compared() -> None:
    row = seen(None, teacher=TEACHER, student=STUDENT)
    assert fault_map(row).tolist() == [[0, 1, 1, 1, 1, 0]]


def test_the_padding_is_cut_off() -> None:
    square = np.zeros((SIZE, SIZE, 3), np.uint8)
    square[16:48] = 200
    assert np.asarray(unpadded(Image.fromarray(square), WIDE)).tolist() == [[[200] * 3] * 64] * 32


def drawn(annotated: bool = True, **networks: Any) -> Any:
    mask = np.zeros((64, 128), np.uint8)
    mask[:, 96:] = 1  # a quarter
    scenes = Scenes(torch.rand(1, 3, SIZE, SIZE), [{"mask": mask, "id": "a"}], [WIDE], annotated)
    (figure,) = dict(segmentations.figures(Material(scenes=scenes, **networks))).values()
    return figure


def columns(figure: Any) -> dict[str, str]:
    """Title -> what stands below."""
    return {axis.get_title(): axis.get_xlabel() for axis in figure.axes}


def test_every_network_is_beside_the_truth() -> None:
    figure = drawn(student=Constant(0), teacher=Constant(1))
    assert columns(figure) == {
        "photograph": "a",
        "truth": "",
        "teacher": "25.0% right",
        "student": "75.0% right",
        "where wrong": "",
    }
    (legend,) = figure.legends
    texts = [text.get_text() for text in legend.get_texts()]
    assert texts[:2] == ["ground", "cat"]
    assert texts[2:] == [
        "only the student is wrong",
        "only the teacher is wrong",
        "both are wrong",
    ]


def test_of_a_photograph_alone_the_answer_is_shown() -> None:
    assert list(columns(drawn(annotated=False, student=Constant(0)))) == ["photograph", "predicted"]
    both = drawn(annotated=False, student=Constant(0), teacher=Constant(1))
    assert list(columns(both))[2:] == ["student", "where they differ"]


def test_a_teacher_of_other_classes_is_left_out() -> None:
    figure = drawn(student=Constant(0), teacher=Constant(1, ["ground", "dog", "cat"]))
    assert list(columns(figure)) == ["photograph", "truth", "predicted", "where wrong"]


def test_the_confusion_has_the_shares_of_each_true_class() -> None:
    metric = MeanIoU(NAMES)
    metric.update([{"mask": torch.from_numpy(STUDENT)}], [{"mask": TRUTH, "id": "a"}])
    right = torch.from_numpy(TRUTH % 255)  # void pixels count nowhere
    metric.update([{"mask": right}], [{"mask": TRUTH, "id": "b"}])
    (figure,) = dict(segmentations.figures(Material(metric=metric))).values()
    axis = figure.axes[0]
    shares = axis.images[0].get_array()
    # dog was once taken for cat and once for itself
    np.testing.assert_allclose(shares[1:], [[0, 0.75, 0.25], [0, 0.5, 0.5]])
    labels = [label.get_text() for label in axis.get_yticklabels()]
    assert labels[1:] == ["cat, IoU 0.60", "dog, IoU 0.33"]
