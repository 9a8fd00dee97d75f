"""A teacher that knows some of the student's classes teaches these, by name."""

from typing import Any

import pytest
import torch

from kdmini.assemble import make_distillation
from kdmini.contracts import UserError, View
from kdmini.detection.yolo11.model import YOLO11
from kdmini.terms.logits import LogitDistillation

SIZE = [0.5, 0.0625, 1024]
LOGITS = {"build": "kdmini.terms.logits:LogitDistillation", "classes": "by_name", "weight": 1.0}


def test_the_classes_that_both_have_are_compared_and_the_new_one_is_left_alone() -> None:
    torch.manual_seed(0)
    student = YOLO11(["ring", "cat", "circle"], SIZE)
    teacher = YOLO11(["circle", "star", "ring"], SIZE)
    for parameter in teacher.parameters():
        if parameter.shape == (3,):  # else its classes would all be scored alike
            torch.nn.init.normal_(parameter)
    distillation = make_distillation(student, teacher, 64, [], logits=LOGITS)
    images = torch.rand(2, 3, 64, 64)
    targets: Any = {}
    preds = student(images)
    loss = distillation(images, preds, targets, 0)["logits"]

    sides = ((student.class_maps(preds), [0, 2]), (teacher.class_maps(teacher(images)), [2, 0]))
    views = [View({}, None, images, [level[:, rows] for level in maps]) for maps, rows in sides]
    assert torch.equal(loss, LogitDistillation()(*views, targets))
    for gradient in torch.autograd.grad(loss, preds):
        reached = gradient[:, -3:].flatten(2).any(2).any(0)
        assert reached.tolist() == [True, False, True]
    assert not distillation.state_dict()


@pytest.mark.parametrize(
    "theirs, form, message",
    [
        (["dog"], "sigmoid", "share no class"),
        (["cat", "dog"], "softmax", "softmax over one class"),
    ],
)
def test_too_few_classes_in_both_are_refused(theirs: list[str], form: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        LogitDistillation(form, classes="by_name", names=["ring", "cat"], teacher_names=theirs)
