"""Students of the evidence that no config of kdmini makes."""

from kdmini.detection.yolo11.model import YOLO11
from kdmini.detection.yolo11.sizes import Scale

BACKBONE = 11  # layers, of which the last are SPPF and attention


def behind_backbone(names: list[str], backbone_weights: str, scale: Scale = "n") -> YOLO11:
    """A YOLO11 whose neck and head begin anew, behind the backbone of a weight file."""
    student = YOLO11(names, scale)
    known = YOLO11(names, scale, {"path": backbone_weights, "classes": "by_name"})
    student.model[:BACKBONE].load_state_dict(known.model[:BACKBONE].state_dict())
    student.license = known.license
    return student
