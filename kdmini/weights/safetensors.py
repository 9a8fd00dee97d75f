"""The tensors and texts of a safetensors file, as kdmini/tools/export_safetensors.py writes.

https://huggingface.co/docs/safetensors: the length of the header in 8 bytes, the header
in JSON, then the bytes of each tensor.
"""

import json
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

MAX_HEADER_BYTES = 4 << 20  # that of a YOLO11x has 100 KB

DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
}


class Safetensors(NamedTuple):
    """What is in a file."""

    metadata: dict[str, Any]
    state: dict[str, Tensor]  # float32, counters int64


def is_safetensors(data: bytes) -> bool:
    """By its beginning: a header of a believable length, which is a JSON object."""
    return data[8:9] == b"{" and int.from_bytes(data[:8], "little") <= MAX_HEADER_BYTES


def read_safetensors(data: bytes) -> Safetensors:
    """The content of a file.

    Raises ValueError where a tensor is not where the header says, and whatever else a
    crafted header leads to.
    """
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    metadata = header.pop("__metadata__", {})
    body = memoryview(data)[start:]
    bytes_left = len(body)  # so that one stretch of a file cannot be named many times
    state = {}
    for key, entry in header.items():
        shape = entry["shape"]
        first, end = entry["data_offsets"]
        dtype = DTYPES[entry["dtype"]]
        counts = (first, end, *shape)
        if not all(type(count) is int and 0 <= count < 1 << 40 for count in counts):
            raise ValueError("a size or an offset that is no count")

        size = math.prod(shape) * dtype.itemsize
        bytes_left -= size
        if end - first != size or end > len(body) or bytes_left < 0:
            raise ValueError("a tensor that reaches outside the file")

        tensor = torch.frombuffer(bytearray(body[first:end]), dtype=dtype).reshape(shape)
        state[key] = tensor if dtype == torch.int64 else tensor.float()
    return Safetensors(metadata, state)
