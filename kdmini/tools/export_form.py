"""What every exported network is, and how it is compared with what was made of it.

Legend: N images, S image size.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from kdmini.contracts import UserError

BATCH = 2  # images, beside batches of one


class Form(Protocol):
    """A network as an nn.Module whose outputs are what other programs read: one of a task."""

    outputs: Sequence[str]  # their names
    facts: dict[str, str]  # for those programs, beside the metadata of every network

    def __call__(self, images: Tensor) -> Any: ...

    def difference(
        self, found: Sequence[np.ndarray], expected: Sequence[np.ndarray], half: bool = False
    ) -> tuple[str, bool]:
        """-> how far apart two sets of outputs are, in words, and whether that is little.

        half: the bounds are those of fp16, which has 10 bits of a number, not 23. Of what is
        not finite it is not.
        """
        ...


class Halved(nn.Module):
    """A form that computes in fp16, whose images and outputs stay float32.

    In place: the form is of fp16 from then on.
    """

    def __init__(self, form: Any):
        super().__init__()
        self.form = form.half()

    def forward(self, images: Tensor) -> Any:
        return self.form(images.half())


class Trial(NamedTuple):
    """Images with which a network and what was made of it are compared."""

    what: str  # in words
    batches: list[Tensor]  # (N, 3, H, W), N of any size


def trials(imgsz: int, free: str) -> list[Trial]:
    """Noise of the sizes that are free: see kdmini.tools.export.How."""
    seeded = torch.Generator().manual_seed(0)
    images = torch.rand(BATCH, 3, imgsz, imgsz, generator=seeded)
    if free == "none":
        return [Trial("in a batch of 1", [images[:1]])]
    made = [Trial(f"in batches of 1 and {BATCH}", [images[:1], images])]
    if free == "all":
        height = imgsz + 32
        other = torch.rand(1, 3, height, imgsz, generator=seeded)
        made.append(Trial(f"at {imgsz} x {height}", [other]))
    return made


@torch.no_grad()
def answers(form: Callable[[Tensor], Any], trial: Trial) -> list[np.ndarray]:
    """What the form gives for a trial, each output over all batches."""
    batches = [listed(form(batch)) for batch in trial.batches]
    return joined([[tensor.numpy() for tensor in outputs] for outputs in batches])


def listed(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The outputs of a form, of which it may have one."""
    return outputs if isinstance(outputs, tuple) else (outputs,)


def joined(batches: Iterable[Sequence[np.ndarray]]) -> list[np.ndarray]:
    """The outputs of batches -> each output over all of them."""
    return [np.concatenate(of_output) for of_output in zip(*batches, strict=True)]


def check(
    form: Form,
    trial: Trial,
    found: Sequence[np.ndarray],
    expected: Sequence[np.ndarray],
    half: bool,
) -> None:
    """Prints how far what was made of a network is from it.

    half: it computes in fp16. Raises UserError where that is more than the form's bounds.
    """
    words, is_small = form.difference(found, expected, half)
    difference = f"largest difference from PyTorch {trial.what}: {words}"
    if not is_small:
        remedy = "leave --half out" if half else "try other versions of torch"
        raise UserError(
            f"what was made is not the network ({difference}); nothing was written, {remedy}"
        )
    print(difference)
