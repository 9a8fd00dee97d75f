"""What a step will take, from what one forward pass leaves to autograd."""

import torch
from torch import nn

from kdmini.detection.yolo11.model import YOLO11
from kdmini.device import precision
from kdmini.distill.taps import Taps
from kdmini.footprint import STEP, step_bytes

CPU = torch.device("cpu")
FLOAT, _ = precision(False, CPU)
HALF, _ = precision("bf16", CPU)
SCALE = [0.5, 0.0625, 1024]


class Twice(nn.Module):
    """Its forward pass keeps 3 x 8 x 8 and 5 x 8 x 8 numbers, however often they are read."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 5, 1)
        self.norm = nn.BatchNorm2d(5)

    def forward(self, x):
        y = self.first(x)
        return y * y.detach() + y * y.detach()


def test_each_storage_counts_once_and_weights_do_not():
    numbers = 3 * 8 * 8 + 5 * 8 * 8
    assert step_bytes(Twice(), 8, FLOAT, 1) == round(STEP * 4 * numbers)
    assert step_bytes(Twice(), 8, FLOAT, 6) == round(STEP * 6 * 4 * numbers)


def test_an_image_of_twice_the_side_takes_four_times_as_much_and_half_precision_half():
    student = YOLO11(["a"], SCALE)
    small = step_bytes(student, 64, FLOAT, 1)
    large = step_bytes(student, 128, FLOAT, 1)
    assert 3.9 < large / small < 4.1
    half = step_bytes(student, 512, HALF, 1)
    whole = step_bytes(student, 512, FLOAT, 1)
    assert 0.45 < half / whole < 0.6  # with copies of the weights


def test_the_student_is_left_as_it_was():
    student = YOLO11(["a"], SCALE).train()
    taps = Taps(student, ["model.6"])
    before = {name: value.clone() for name, value in student.state_dict().items()}
    with torch.no_grad():
        assert step_bytes(student, 64, FLOAT, 1) > 10_000
    assert taps.take().keys() == {"model.6"}
    assert student.training
    assert all(module.training for module in student.modules())
    assert all(p.grad is None for p in student.parameters())
    for name, value in student.state_dict().items():
        assert torch.equal(value, before[name]), name
    student.eval()
    step_bytes(student, 64, FLOAT, 1)
    assert not student.training


def test_nothing_is_compiled_for_it():
    student = YOLO11(["a"], SCALE)
    student.compile(backend=lambda graph, inputs: 1 / 0)
    step_bytes(student, 64, FLOAT, 1)
