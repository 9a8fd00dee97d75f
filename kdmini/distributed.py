"""Several processes, one for each device, on one machine or several, started by torchrun.

Every process ("rank") takes its share of each batch. BatchNorm and the normaliser of the
loss are local to a rank; gradients are averaged. Without torchrun there is one rank, and
nothing here does anything.
"""

import os
import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from itertools import zip_longest
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kdmini import output
from kdmini.contracts import UserError

PATIENCE = timedelta(days=7)  # for what may take longer than the timeout of a run
_patient: Any = None  # a process group of all ranks, on the CPU


def launched() -> bool:
    """Whether torchrun started this process."""
    return dist.is_torchelastic_launched()


def start(device: torch.device, timeout: float) -> torch.device:
    """Meets the other ranks -> the device of this one.

    timeout: minutes to wait for a rank before giving up.
    """
    if not launched():
        return device
    if device.type == "cuda":
        device = device_of_rank(int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    settings: dict[str, Any] = {"timeout": timedelta(minutes=timeout)}
    if device.type == "cuda":
        # else NCCL would guess the card of a barrier
        dist.init_process_group("nccl", device_id=device, **settings)
    else:
        dist.init_process_group("gloo", **settings)
    global _patient
    _patient = dist.new_group(backend="gloo", timeout=PATIENCE)
    if rank():
        output.be_silent()  # rank 0 speaks for all; errors come from every rank
    return device


def device_of_rank(local_rank: int) -> torch.device:
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise UserError(
            f"torchrun starts more processes than the {count} GPUs here; lower --nproc-per-node"
        )
    return torch.device("cuda", local_rank)


def rank() -> int:
    """Number of this process among all, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """Number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


def ranks_here() -> int:
    """Number of ranks on this machine."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if dist.is_initialized() else 1


def once_a_machine(make: Callable[[], Any]) -> Any:
    """What `make` returns, of which only the first rank of each machine is asked. Its UserError
    is raised in all of them. However long it takes: a rank that dies, the launcher notices.
    """
    here = ranks_here()
    if here == 1:
        return make()
    local_rank = int(os.environ["LOCAL_RANK"])
    first = rank() - local_rank
    told: list[Any] = [None, None]  # the outcome, or a mistake
    if local_rank:
        dist.recv_object_list(told, first, group=_patient)
    else:
        try:
            told[0] = make()
        except UserError as error:
            told[1] = str(error)
        for other in range(first + 1, first + here):
            dist.send_object_list(told, other, group=_patient)
    outcome, mistake = told
    if mistake:
        raise UserError(mistake)
    return outcome


def wait_for_all() -> None:
    """However long it takes."""
    if world() > 1:
        dist.barrier(group=_patient)


def lost_a_rank(error: BaseException) -> str:
    """A line about an error that came from waiting for another rank; empty for any other."""
    text = str(error)
    if not (isinstance(error, dist.DistError) or "gloo/transport" in text):
        return ""
    # without the place in gloo's code before it, and its advice behind
    reason = text.split("] ", 1)[-1].split(". ")[0]
    return (
        "lost another rank, which failed, left, was killed or was silent for `timeout` minutes "
        f"({reason})"
    )


def finish() -> None:
    """Waits until every rank is done, so that none takes the others for lost while rank 0
    still writes.
    """
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def replicate(model: Any) -> Any:
    """-> what to call in the model's place: a backward pass through it averages the gradients
    as they become ready.
    """
    if world() == 1:
        return model
    # broadcast_buffers has another name from torch 2.15 on
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        return DistributedDataParallel(model, broadcast_buffers=False)


def averaging(replica: Any, now: bool) -> AbstractContextManager:
    """Around forward and backward pass: gradients are averaged over the ranks now, or only
    added up until they are.
    """
    if now or world() == 1:
        return nullcontext()
    return replica.no_sync()


def average_gradients_(parameters: Iterable[nn.Parameter]) -> None:
    """The mean over the ranks, in one message. No gradient counts as 0, for another rank may
    have one.
    """
    learning = [p for p in parameters if p.requires_grad]
    if world() == 1 or not learning:
        return
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in learning]
    flat = total(torch.cat([grad.reshape(-1) for grad in grads])) / world()
    parts = flat.split([p.numel() for p in learning])
    for p, part in zip(learning, parts, strict=True):
        p.grad = part.view_as(p)


def total(values: Tensor) -> Tensor:
    """Sum over the ranks, with a gradient that is right once the ranks' gradients have been
    averaged.
    """
    if world() == 1:
        return values
    summed = values.detach().clone()
    dist.all_reduce(summed)
    if not values.requires_grad:
        return summed
    own = values * world()  # averaging will divide its gradient by the number of ranks
    return summed + (own - own.detach())


def largest(number: int, device: torch.device) -> int:
    """The largest of the ranks' numbers."""
    if world() == 1:
        return number
    maximum = torch.tensor(number, device=device)
    dist.all_reduce(maximum, dist.ReduceOp.MAX)
    return int(maximum)


def broadcast_(tensors: Iterable[Tensor]) -> None:
    """In place: what rank 0 has."""
    if world() == 1:
        return
    for tensor in tensors:
        dist.broadcast(tensor, 0)


def gather(mine: Any) -> list[Any]:
    """What each of the ranks has, by rank."""
    everybody: list[Any] = [mine]
    if world() > 1:
        everybody *= world()
        dist.all_gather_object(everybody, mine)
    return everybody


def deal(mine: list[Any]) -> list[Any]:
    """The items of all ranks, in turn: rank 0's first, rank 1's first, ..., rank 0's second,
    ...
    """
    if world() == 1:
        return mine
    lists = gather(mine)
    return [item for items in zip_longest(*lists) for item in items if item is not None]
