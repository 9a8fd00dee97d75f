"""How much memory a training step will take, before the first."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from kdmini.device import Autocast

# Bytes of a step for each byte that the student's forward pass keeps for its backward pass.
# Beside those there are the teacher, the terms, the loss, gradients and temporaries. Counted
# with YOLO11m as teacher, 640 px, bf16: the pass of one image keeps 115 MB (student n), 229 (s)
# and 486 (m); a step peaks at 175, 284 and 513 an image, which is 1.53, 1.24 and 1.06 of it.
STEP = 1.6


def step_bytes(student: Any, imgsz: int, autocast: Autocast, images: int) -> int:
    """Of a training step of so many images, about: from what autograd keeps of one.

    Leaves the student as it was; what its hooks kept is theirs.
    """
    weights = [*student.parameters(), *student.buffers()]
    own = {tensor.untyped_storage()._cdata for tensor in weights}
    kept: dict[int, int] = {}  # bytes of each storage

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    device = next(student.parameters()).device
    training = student.training
    student.eval()  # statistics stay as they are
    pixels = torch.zeros(1, 3, imgsz, imgsz, device=device)
    with torch.enable_grad(), autocast(), saved_tensors_hooks(count, lambda tensor: tensor):
        student.forward(pixels)  # not compiled for this one image
    student.train(training)
    return round(STEP * images * sum(kept.values()))
