"""Losses in float64, though they ask for float32."""

import torch
from torch import Tensor

SINGLE = Tensor.float


def float_or_double(tensor: Tensor) -> Tensor:
    """In place of Tensor.float, which would take the loss back to float32."""
    return tensor if tensor.dtype == torch.float64 else SINGLE(tensor)
