"""The modules of a pickled model, and whether they are those of a YOLO11.

Tensors do not show all of a network: a file whose activations or shortcuts are others
would fit, and give other outputs in silence.
"""

import re
from collections.abc import Mapping
from typing import Any

from kdmini.weights.archive import Refused, quoted
from kdmini.weights.pickled import Node
from kdmini.weights.tensors import TENSORS

GIVE = "give a YOLO11 detection file"

IDENTITY = "torch.nn.modules.linear Identity"
SILU = "torch.nn.modules.activation SiLU"

# modules of a YOLO11 -> attributes that tensors do not show, and their values
MODULES: dict[str, dict[str, Any]] = {
    IDENTITY: {},
    SILU: {},
    "torch.nn.modules.batchnorm BatchNorm2d": {"eps": 1e-3},
    "torch.nn.modules.container ModuleList": {},
    "torch.nn.modules.container Sequential": {},
    "torch.nn.modules.conv Conv2d": {},
    "torch.nn.modules.pooling MaxPool2d": {"kernel_size": 5, "stride": 1, "padding": 2},
    "torch.nn.modules.upsampling Upsample": {"scale_factor": 2.0, "mode": "nearest"},
    "ultralytics.nn.modules.block Attention": {},
    "ultralytics.nn.modules.block Bottleneck": {"add": True},
    "ultralytics.nn.modules.block C2PSA": {},
    "ultralytics.nn.modules.block C3k": {},
    "ultralytics.nn.modules.block C3k2": {},
    "ultralytics.nn.modules.block DFL": {},
    "ultralytics.nn.modules.block PSABlock": {"add": True},
    "ultralytics.nn.modules.block SPPF": {"add": False},
    "ultralytics.nn.modules.conv Concat": {},
    "ultralytics.nn.modules.conv Conv": {},
    "ultralytics.nn.modules.conv DWConv": {},
    "ultralytics.nn.modules.head Detect": {},
    "ultralytics.nn.tasks DetectionModel": {},
}
# activations that are none; that of SPPF may be one or the other
LINEAR = r"model\.10\.m\.\d+\.(attn\.(qkv|proj|pe)|ffn\.1)\.act"
EITHER = "model.9.cv1.act"


def check_modules(tree: Mapping[str, Node]) -> None:
    """Raises Refused unless these are the modules of a YOLO11, with its attributes.

    tree: dotted name -> module or tensor; "" -> the detector.
    """
    made_of = tree[""].state.get("yaml")
    architecture = made_of.get("yaml_file") if type(made_of) is dict else None
    itself = f" (it was made of {quoted(architecture)})" if type(architecture) is str else ""
    if any(".one2one_" in name for name in tree):
        raise Refused(
            f"has a one-to-one head, as YOLO26 and YOLOv10 have and no YOLO11{itself}: {GIVE}"
        )
    for name, node in tree.items():
        if node.name not in TENSORS and (strange := strangeness(name, node)):
            raise Refused(f"has {strange}, which no YOLO11 has{itself}: nothing was run, {GIVE}")


def strangeness(name: str, node: Node) -> str:
    """What is not as in YOLO11 about a module, in words; empty where there is nothing."""
    where = quoted(name) if name else "the model"
    if node.name not in MODULES:
        return f"{quoted(node.name.replace(' ', '.'))} as {where}"
    for attribute, value in MODULES[node.name].items():
        if node.state.get(attribute, value) != value:
            return f"another `{attribute}` in {where}"
    if name.endswith(".act") and name != EITHER:
        expected = IDENTITY if re.fullmatch(LINEAR, name) else SILU
        if node.name != expected:
            return f"another activation in {where}"
    return ""
