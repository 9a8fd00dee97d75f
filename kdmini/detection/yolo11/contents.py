"""What each kind of weight file says of its detector.

A best.pt of kdmini states all of it, a pickled model has it in its modules, a bare
state_dict says nothing but the tensors. Whatever serves for none is refused by what it
is.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kdmini.detection.yolo11.modules import EITHER, IDENTITY, check_modules
from kdmini.detection.yolo11.sizes import SCALE_OF, SCALES, Scale, sizes_of
from kdmini.weights.archive import Refused
from kdmini.weights.pickled import TRUSTED, Node, Pickled, refuse_names, spelt
from kdmini.weights.safetensors import Safetensors
from kdmini.weights.tensors import (
    TENSORS,
    Storages,
    entries_of,
    is_state_dict,
    tensors_of,
    tree_of,
)

GIVE = "give a YOLO11 detection file, or a best.pt of kdmini"


@dataclass(frozen=True)
class Content:
    """What a file says of its detector, not yet checked."""

    kind: str  # of file, in words
    state: dict[str, Tensor]
    facts: Mapping[str, Any]  # where license and version are stated
    # None where the file does not say
    names: Any = None
    scale: Scale | None = None
    sppf_act: Any = None
    imgsz: Any = None


# --- pickles


def content_of(pickled: Pickled, storages: Storages) -> Content:
    """Raises Refused with the reason, or whatever else a damaged file leads to."""
    value = pickled.value
    if type(value) is dict and value.get("format") == "kdmini":
        refuse_names(pickled.names)
        return best_content(value, storages)
    if type(value) is dict and "average" in entries_of(value.get("ema")):
        refuse_names(pickled.names)
        state = tensors_of(value["ema"]["average"], storages)
        return Content("a checkpoint of a run of kdmini", state, {})

    candidates = [value]
    if type(value) is dict:
        # a file from mid-training may have both: `ema` is what is evaluated
        candidates = [value.get("ema"), value.get("model"), value.get("state_dict"), value]
    for candidate in candidates:
        if isinstance(candidate, Node):
            return model_content(unwrapped(candidate), entries_of(value), storages)
        if is_state_dict(candidate):
            return Content("a bare state_dict", bare(tensors_of(candidate, storages)), {})
    raise Refused(f"holds no YOLO11 detector: {GIVE}")


def best_content(best: dict[str, Any], storages: Storages) -> Content:
    """What a best.pt of kdmini says, which states all of it."""
    card = best["card"]
    if "scale" not in card:
        raise Refused(
            "is the best.pt of another network than YOLO11, the only one that is read here: "
            "use it with the config of its run"
        )
    return Content(
        kind="a best.pt of kdmini",
        state=tensors_of(best["model"], storages),
        facts=card,
        names=best["names"],
        scale=scale_of(card["scale"]),
        sppf_act=card["sppf_act"],
        imgsz=best.get("imgsz"),
    )


def scale_of(stated: Any) -> Scale:
    """Raises ValueError and the like where it is none."""
    if type(stated) is str and stated in SCALES:
        return stated
    depth, width, max_channels = map(float, stated)
    sizes_of((depth, width, max_channels))
    return depth, width, max_channels


def bare(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Under public keys, without what a model that held the detector put before them."""
    first = "model.0.conv.weight"
    prefix = next((key.removesuffix(first) for key in state if key.endswith(first)), "")
    return {key.removeprefix(prefix): tensor for key, tensor in state.items()}


# --- models that were pickled whole

# what may hold a detector -> the name of the detector in it
WRAPPERS = {
    "ultralytics.models.yolo.model YOLO": "model",
    "ultralytics.nn.distill_model DistillationModel": "student_model",
    "torch.nn.parallel.data_parallel DataParallel": "module",
    "torch.nn.parallel.distributed DistributedDataParallel": "module",
}


def unwrapped(root: Node) -> Node:
    """The model, out of what trains or uses it."""
    for _ in range(len(WRAPPERS)):
        if root.name not in WRAPPERS:
            break
        root = root.state["_modules"][WRAPPERS[root.name]]
    return root


def model_content(root: Node, checkpoint: dict[str, Any], storages: Storages) -> Content:
    """What the modules of a pickled model say, and the dict that it stood in."""
    if task := re.fullmatch(r"ultralytics\.nn\.tasks (\w{1,40})Model", root.name):
        if task[1] != "Detection":
            raise Refused(f"is a {task[1].lower()} checkpoint: give a YOLO11 detection file")
    else:
        raise Refused(f"holds no YOLO11 detector, but {spelt(root.name)}: {TRUSTED}")

    tree = tree_of(root)
    check_modules(tree)
    state = {name: storages.tensor(node) for name, node in tree.items() if node.name in TENSORS}
    blocks = [name for name in tree if re.fullmatch(r"model\.2\.m\.\d+", name)]
    channels = len(state.get("model.0.conv.weight", ()))
    scale = SCALE_OF.get((channels, len(blocks)))
    if scale is None:
        raise Refused(
            "is a detector, but no YOLO11 of the scales n, s, m, l or x: give one that is"
        )

    name_of = root.state["names"]  # row -> name
    return Content(
        kind="a file of ultralytics",
        state=state,
        facts=checkpoint,
        names=[name_of[row] for row in range(len(name_of))],
        scale=scale,
        sppf_act=tree[EITHER].name != IDENTITY,
        imgsz=entries_of(checkpoint.get("train_args")).get("imgsz"),
    )


# --- safetensors


def safetensors_content(file: Safetensors) -> Content:
    """What a file says, completely where kdmini/tools/export_safetensors.py wrote it."""
    metadata = entries_of(file.metadata)
    if not {"names", "scale", "sppf_act"} <= metadata.keys():
        return Content("a safetensors file of tensors alone", bare(file.state), metadata)

    stated = metadata["scale"]
    return Content(
        kind="a safetensors file of kdmini",
        state=file.state,
        facts=metadata,
        names=json.loads(metadata["names"]),
        scale=scale_of(stated if stated in SCALES else json.loads(stated)),
        sppf_act=json.loads(metadata["sppf_act"]),
        imgsz=json.loads(metadata.get("imgsz", "null")),
    )
