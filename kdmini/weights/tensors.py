"""The tree of modules, and the tensors, that the notes of pickled.py describe.

Both are bounded before they are made: a small file cannot fill the memory.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kdmini.weights.archive import Refused, quoted
from kdmini.weights.pickled import Node

MAX_NODES = 20_000  # modules, parameters and buffers of a model
MAX_NAME = 200  # characters of a dotted name


def tree_of(root: Node) -> dict[str, Node]:
    """Dotted name -> every module, parameter and buffer below `root`; "" -> `root`.

    What is shared stands under each of its names. Raises Refused for a tree without
    end.
    """
    nodes: list[tuple[str, Any]] = [("", root)]
    for name, node in nodes:  # which grows meanwhile
        if node is None:
            continue  # `bias=False` leaves a parameter that is None
        for kind in ("_modules", "_parameters", "_buffers"):
            for child, value in node.state.get(kind, {}).items():
                if len(nodes) > MAX_NODES or len(name) + len(child) > MAX_NAME:
                    raise Refused(
                        "has modules in modules without end: obtain it from a source you trust"
                    )
                nodes.append((f"{name}.{child}" if name else child, value))
    return {name: node for name, node in nodes if node is not None}


# what a pickle names where a tensor is
TENSORS = {"torch._utils _rebuild_parameter", "torch._utils _rebuild_tensor_v2"}

DTYPES = {
    "torch BFloat16Storage": torch.bfloat16,
    "torch HalfStorage": torch.float16,
    "torch FloatStorage": torch.float32,
    "torch DoubleStorage": torch.float64,
    "torch LongStorage": torch.int64,
}


class Storages:
    """The bytes in a file, and the tensors that are made of them.

    All tensors together have no more elements than the file has bytes: neither strides
    of zero nor one storage that is named a thousand times fill the memory.
    """

    def __init__(self, entries: Mapping[str, bytearray]):
        self.entries = entries
        self.elements_left = sum(len(content) for content in entries.values())

    def tensor(self, node: Any) -> Tensor:
        """The tensor or parameter that `node` notes, as float32 or int64, contiguous.

        A copy, so that no two tensors share memory. Raises ValueError where it is none,
        or reaches outside its storage, and whatever else a crafted node leads to.
        """
        if node.name == "torch._utils _rebuild_parameter":
            node = node.args[0]
        storage, offset, size, stride = node.args[:4]
        kind, dtype_global, entry, _, length = storage.args
        is_tensor = node.name == "torch._utils _rebuild_tensor_v2" and kind == "storage"
        if not is_tensor or type(entry) is not str:
            raise ValueError("no tensor")

        dtype = DTYPES[dtype_global.name]
        content = self.entries[f"data/{entry}"]
        if not all(0 <= count < 1 << 40 for count in (offset, length, *size, *stride)):
            raise ValueError("a size, stride or offset that is no count")

        steps = zip(size, stride, strict=True)
        last = offset + sum((count - 1) * step for count, step in steps)
        self.elements_left -= math.prod(size)
        inside = length * dtype.itemsize == len(content) and last < length
        if not inside or self.elements_left < 0:
            raise ValueError("a tensor that reaches outside its storage")

        tensor = torch.frombuffer(content, dtype=dtype).as_strided(size, stride, offset)
        wide = torch.int64 if dtype == torch.int64 else torch.float32
        return tensor.to(wide, copy=True).contiguous()


def entries_of(value: Any) -> dict[Any, Any]:
    """Of a dict; none of anything else."""
    return value if type(value) is dict else {}


def is_state_dict(value: Any) -> bool:
    """Whether it is a dict of tensors alone."""
    nodes = entries_of(value).values()
    return bool(nodes) and all(isinstance(node, Node) and node.name in TENSORS for node in nodes)


def tensors_of(state: Mapping[str, Any], storages: Storages) -> dict[str, Tensor]:
    return {key: storages.tensor(node) for key, node in state.items()}


def check_finite(state: Mapping[str, Tensor]) -> None:
    """Raises Refused where a number is none."""
    for key, tensor in state.items():
        if not tensor.isfinite().all():
            raise Refused(
                f"has NaN or infinity in {quoted(key)}: "
                "give a file from before its training diverged"
            )
