"""Students of the evidence."""

from pathlib import Path

import torch

from bench.students import BACKBONE, behind_backbone
from kdmini.detection.yolo11.model import YOLO11


def test_the_backbone_is_that_of_the_file_and_the_rest_is_new(teacher_file: Path) -> None:
    scale = [0.5, 0.0625, 1024]
    names = torch.load(teacher_file, weights_only=True)["names"]
    torch.manual_seed(3)
    new = YOLO11(names, scale).state_dict()
    torch.manual_seed(3)
    student = behind_backbone(names, str(teacher_file), scale).state_dict()
    known = YOLO11(names, scale, str(teacher_file)).state_dict()
    for key, value in student.items():
        layer = int(key.split(".")[1])
        expected = known if layer < BACKBONE else new
        assert torch.equal(value, expected[key]), key
