"""The selective scan beside torch's associative_scan and a loop: time, memory, kernels.

python -m bench.scan [--channels 96] [--batch 4] [--rounds 9] [--device cuda]

Forward and backward of h_t = a_t h_{t-1} + b_t over batch * channels sequences, as one of
the four orders of a stage of VMamba. All three stand in the same autograd function, whose
backward is the same scan from the other end; they differ in what runs along the sequence.
Lengths are those of stages at strides 4 to 16 of 256 px. Memory is the most that was held
at once, beside a, b and the gradient of h.
"""

import argparse
import itertools
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._higher_order_ops.associative_scan import associative_scan
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from bench import measure
from bench.meta import table
from kdmini.bounds import Count
from kdmini.device import pick_device
from kdmini.segmentation import scan
from kdmini.typed import argument

LENGTHS = (256, 1024, 4096)
BOUND = 1e-6  # of the largest number, between what the forms give
NO_KERNELS = ("aten::empty", "aten::new_empty")


def loop(a: Tensor, b: Tensor) -> Tensor:
    h = b.clone()
    for t in range(1, len(h)):
        h[t].addcmul_(a[t], h[t - 1])
    return h


def associative(a: Tensor, b: Tensor) -> Tensor:
    # the other mode is of compiled CUDA alone
    return associative_scan(combine, (a, b), dim=0, combine_mode="generic")[1]


def combine(first: Any, second: Any) -> Any:
    return first[0] * second[0], torch.addcmul(second[1], second[0], first[1])


FORMS = {"tree": scan.tree, "associative_scan": associative, "loop": loop}


def work_of(
    form: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor, grad: Tensor
) -> Callable[[], list[Tensor]]:
    """-> forward and backward, which give h and the gradients of a and b."""

    def run() -> list[Tensor]:
        with mock.patch.object(scan, "tree", form):
            h = scan.scan(a, b)
            return [h.detach(), *torch.autograd.grad(h, (a, b), grad)]

    return run


class Kernels(TorchDispatchMode):
    """Counts the operations that compute or copy: no views, no allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        returned = [entry.alias_info for entry in func._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in returned)
        if not is_view and not func._schema.name.startswith(NO_KERNELS):
            self.count += 1
        return func(*args, **(kwargs or {}))


def kernels(work: Callable[[], object]) -> int:
    with Kernels() as counted:
        work()
    return counted.count


def most_held(work: Callable[[], object], device: torch.device) -> float:
    """MiB, beside what was held before."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        work()
    events = watched.profiler.kineto_results.events()
    changes = [event.nbytes() for event in events if event.name() == "[memory]"]
    return max(itertools.accumulate(changes)) / 2**20


def check_equal(works: dict[str, Callable[[], list[Tensor]]]) -> None:
    ours, *others = [work() for work in works.values()]
    for other in others:
        for x, y in zip(ours, other, strict=True):
            assert (x - y).abs().max() <= BOUND * y.abs().max()


def compare(length: int, sequences: int, rounds: int, device: torch.device) -> str:
    a = torch.rand(length, sequences, device=device, requires_grad=True)
    b = torch.randn(length, sequences, device=device, requires_grad=True)
    grad = torch.randn_like(a)
    works = {name: work_of(form, a, b, grad) for name, form in FORMS.items()}
    check_equal(works)
    rows = []
    for name, work in works.items():
        rows.append((name, kernels(work), f"{most_held(work, device):.1f}"))
    seconds = measure.take_turns(works, rounds, device.type)
    costs = table(("form", "kernels", "MiB"), rows)
    return f"L {length}\n\n{costs}\n\n{measure.table(seconds, 'loop', 1, 'scan')}\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--channels", type=argument(Count), default=96)
    parser.add_argument("--batch", type=argument(Count), default=4)
    parser.add_argument("--rounds", type=argument(Count), default=9)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    device = pick_device(args.device)
    torch.manual_seed(0)
    sequences = args.batch * args.channels
    print(f"{measure.machine(device.type)}, {sequences} sequences, {args.rounds} rounds\n")
    for length in LENGTHS:
        print(compare(length, sequences, args.rounds, device))


if __name__ == "__main__":
    main()
