"""A state_dict as safetensors.

https://huggingface.co/docs/safetensors: all is little-endian; offsets count from the end of
the header.
"""

import json
from typing import NamedTuple

import torch
from torch import Tensor

ALIGNMENT = 8  # bytes, of which the tensors begin at a multiple


class Stored(NamedTuple):
    """How the format keeps a dtype."""

    name: str  # in the header
    layout: str  # numpy's, little-endian


STORED = {  # all that a network holds
    torch.float32: Stored("F32", "<f4"),
    torch.int64: Stored("I64", "<i8"),
}


def to_safetensors(state: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """The length of the header in 8 bytes, the header in JSON, the bytes of each tensor."""
    header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    parts = []
    start = 0
    for key, tensor in state.items():
        stored = STORED[tensor.dtype]
        part = tensor.cpu().numpy().astype(stored.layout).tobytes()
        end = start + len(part)
        header[key] = {
            "dtype": stored.name,
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
        parts.append(part)
        start = end

    text = json.dumps(header).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return b"".join([len(text).to_bytes(8, "little"), text, *parts])
