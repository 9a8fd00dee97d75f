"""What a card would feel of the operators that a process calls on a pretended one: kernels,
bytes, memory that is alive, and where the host waits for it or copies to it from pageable
memory.
"""

import math
import traceback
import weakref
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.cuda.card import CARD

ROOT = Path(__file__).parents[2]
aten = torch.ops.aten

# no kernel: they only say how memory is to be read, or ask for some
FREE = {
    aten.detach.default,
    aten.alias.default,
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.empty_strided.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
    aten.lift_fresh.default,
    aten.is_pinned.default,
    aten._unsafe_view.default,
    aten.set_.source_Tensor,
}
FILLS = {aten.fill_.Scalar, aten.zero_.default, aten.zeros_like.default}
# of one launch over lists of tensors, about as many as its arguments hold
LISTED = 100
ALLOCATED = 512  # bytes; the allocator's unit
FOUND = 500  # rows of nonzero, whose number depends on contents
KEPT = 300  # boxes that non-maximum suppression leaves
CASTS = {"cat", "upsample_nearest2d", "convolution", "mm", "bmm", "addmm", "baddbmm"}


class Watch(TorchDispatchMode):
    """Counts by `phase`, which names what is being done."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = "build"
        self.kernels: Counter[str] = Counter()
        self.by_operator: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.bytes: Counter[str] = Counter()
        self.waits: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.pageable: defaultdict[str, Counter[str]] = defaultdict(Counter)
        # operators that meet a number of the CPU and a tensor of the card
        self.mixed: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.types: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.layouts: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.pinned: weakref.WeakSet[Any] = weakref.WeakSet()
        self.live: dict[int, int] = {}
        self.now = 0
        self.peak = 0

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        before = self.phase
        self.phase = phase
        try:
            yield
        finally:
            self.phase = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        ours = [tensor for tensor in given if on_card(tensor)]
        special = SPECIAL.get(func._overloadpacket)
        if special:
            return special(self, func, args, kwargs, ours)
        if ours and func._overloadpacket in ASKING:
            self.wait(name_of(func))
        known = {id_of(tensor) for tensor in given if tensor.device.type != "meta"}
        output = func(*args, **kwargs)
        made = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        if func in (aten._to_copy.default, aten.copy_.default):
            self.note_copy(func, args, kwargs, made)
        elif ours and len(ours) < len(given):
            self.mixed[self.phase][f"{name_of(func)} {where()}"] += 1
        if ours or any(on_card(tensor) for tensor in made):
            self.count(func, args, ours, made)
        self.hold(made, known)
        return output

    def note_copy(self, func: Any, args: Any, kwargs: Any, made: Sequence[Tensor]) -> None:
        if func is aten._to_copy.default:
            source = args[0]
            goal = made[0]
            at_once = not kwargs.get("non_blocking", False)
        else:
            source = args[1]
            goal = args[0]
            at_once = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        if on_card(source) and not on_card(goal):
            if at_once:
                self.wait("copy to the host")
        elif on_card(goal) and not on_card(source):
            if source.untyped_storage() not in self.pinned:
                self.pageable[self.phase][where()] += 1
            elif at_once:
                self.wait("copy to the card")

    def wait(self, what: str) -> None:
        self.waits[self.phase][f"{what}, {where()}"] += 1

    def count(self, func: Any, args: Any, ours: Sequence[Tensor], made: Sequence[Tensor]) -> None:
        """One operator: its launches, and the bytes that it reads and writes."""
        if func in FREE or is_view(func) or func.namespace not in ("aten", "torchvision"):
            return
        name = name_of(func)
        lists = [arg for arg in args if isinstance(arg, list | tuple)]
        many = 1
        if name.startswith(("_foreach", "_fused", "_amp_foreach")):
            many = math.ceil(max(map(len, lists), default=1) / LISTED)
        self.kernels[self.phase] += many
        self.by_operator[self.phase][name] += many

        read = {id_of(tensor): tensor.nbytes for tensor in ours}
        written = sum(tensor.nbytes for tensor in made)
        if func is aten.index.Tensor or "gather" in name:
            indices = sum(t.nbytes for t in tree_leaves(args[1:]) if isinstance(t, Tensor))
            read = {0: written + indices}
        elif func in FILLS:
            read = {}
        self.bytes[self.phase] += sum(read.values()) + written
        self.note_precision(name, args, ours)

    def note_precision(self, name: str, args: Any, ours: Sequence[Tensor]) -> None:
        """The type in which what costs time is computed, and the layout of convolutions."""
        kind = name.removesuffix("_backward")
        maps = [tensor for tensor in ours if tensor.is_floating_point()]
        if kind in CASTS and maps and not (kind == "cat" and maps[0].ndim != 4):
            self.types[self.phase][f"{name} {str(maps[0].dtype).removeprefix('torch.')}"] += 1
        if kind != "convolution":
            return
        first = 1 if name.endswith("backward") else 0
        for tensor in args[first : first + 2]:
            if tensor.ndim == 4 and min(tensor.shape[1:]) > 1:
                is_last = tensor.stride(1) == 1
                layout = "channels last" if is_last else f"planes, {where()}"
                self.layouts[self.phase][layout] += 1

    def hold(self, made: Sequence[Tensor], known: set[int]) -> None:
        """Counts new storages as alive until nobody holds them."""
        for tensor in made:
            key = id_of(tensor)
            if not on_card(tensor) or key in known or key in self.live:
                continue
            storage = tensor.untyped_storage()
            size = math.ceil(storage.nbytes() / ALLOCATED) * ALLOCATED
            self.live[key] = size
            self.now += size
            weakref.finalize(storage, self.drop, key)
        self.peak = max(self.peak, self.now)

    def drop(self, key: int) -> None:
        self.now -= self.live.pop(key, 0)

    # --- operators that no tensor without content can answer

    def empty(self, func: Any, args: Any, kwargs: Any, ours: Sequence[Tensor]) -> Tensor:
        pinned = kwargs.pop("pin_memory", False)
        made = func(*args, **kwargs)
        if pinned:
            self.pinned.add(made.untyped_storage())
        self.hold([made], set())
        return made

    def pin(self, func: Any, args: Any, kwargs: Any, ours: Sequence[Tensor]) -> Tensor:
        tensor = args[0]
        pinned = tensor.clone() if isinstance(tensor, FakeTensor) else torch.empty_like(tensor)
        self.pinned.add(pinned.untyped_storage())
        return pinned

    def item(self, func: Any, args: Any, kwargs: Any, ours: Sequence[Tensor]) -> Any:
        tensor = args[0]
        if ours:
            self.wait("item")
        elif not isinstance(tensor, FakeTensor):
            return func(*args, **kwargs)
        if tensor.dtype == torch.bool:
            return True
        return 1.0 if tensor.is_floating_point() else 1

    def equal(self, func: Any, args: Any, kwargs: Any, ours: Sequence[Tensor]) -> bool:
        if ours:
            self.wait("equal")
        return True

    def nonzero(self, func: Any, args: Any, kwargs: Any, ours: Sequence[Tensor]) -> Tensor:
        if ours:
            self.wait("nonzero")
            self.count(func, args, ours, [])
        tensor = args[0]
        return torch.zeros(FOUND, tensor.ndim, dtype=torch.long, device=tensor.device)

    def suppress(self, func: Any, args: Any, kwargs: Any, ours: Sequence[Tensor]) -> Tensor:
        boxes = args[0]
        if ours:
            self.wait("nms")
            self.count(func, args, ours, [])
        count = min(KEPT, boxes.shape[0])
        return torch.zeros(count, dtype=torch.long, device=boxes.device)

    def by_mask(self, func: Any, args: Any, kwargs: Any, ours: Sequence[Tensor]) -> Any:
        """Indexing waits where a mask decides how much there is."""
        indices = list(args[1])
        for place, index in enumerate(indices):
            if index is not None and index.dtype == torch.bool:
                if ours:
                    self.wait("index by mask")
                indices[place] = torch.zeros(FOUND, dtype=torch.long, device=index.device)
        known = {id_of(tensor) for tensor in ours}
        output = func(args[0], indices, *args[2:], **kwargs)
        if ours:
            self.count(func, (args[0], indices), ours, [output])
        self.hold([output], known)
        return output

    def in_place(self, func: Any, args: Any, kwargs: Any, ours: Sequence[Tensor]) -> Any:
        """Fused operators that have no form without content: all has to be on the card."""
        if not ours:
            return func(*args, **kwargs)
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor) and tensor.device != CARD:
                raise RuntimeError(f"{name_of(func)}: a tensor on {tensor.device}")
        self.count(func, args, ours, [])
        return args[0] if func is aten._amp_update_scale_.default else None


# these ask the library that computes them how it went
ASKING = {aten._linalg_eigh, aten.linalg_eig, aten._linalg_svd, aten.linalg_cholesky_ex}

SPECIAL: dict[Any, Any] = {
    aten._pin_memory: Watch.pin,
    aten.empty: Watch.empty,
    aten._local_scalar_dense: Watch.item,
    aten.equal: Watch.equal,
    aten.nonzero: Watch.nonzero,
    torch.ops.torchvision.nms: Watch.suppress,
    aten.index: Watch.by_mask,
    aten._amp_update_scale_: Watch.in_place,
    aten._fused_sgd_: Watch.in_place,
}


def on_card(tensor: Tensor) -> bool:
    return tensor.device.type == "cuda"


def id_of(tensor: Tensor) -> int:
    """Of the memory behind it."""
    return tensor.untyped_storage()._cdata


def name_of(func: Any) -> str:
    return func._overloadpacket.__name__


def is_view(func: Any) -> bool:
    """Whether an operator gives its argument's own memory back, unchanged."""
    schema = func._schema
    aliases = [argument.alias_info for argument in schema.arguments]
    taken = any(alias is not None and not alias.is_write for alias in aliases)
    return taken and all(result.alias_info is not None for result in schema.returns)


def where() -> str:
    """The innermost place in kdmini that is being run."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        inside = path.relative_to(ROOT) if path.is_relative_to(ROOT) else None
        if inside and inside.parts[0] in ("kdmini", "train.py", "eval.py"):
            return f"{inside} {frame.name}"
    return "torch"
