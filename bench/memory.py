"""What memory a training step needs, by batch size: estimated, without a GPU.

Tensors without content are counted while they are alive. `python -m bench.complexity`
prints the table.
Legend: G objects of an image.
"""

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.meta import TAPS, Scale, detector, parameters, table
from kdmini.detection.truth import Targets
from kdmini.detection.yolo11.model import YOLO11
from kdmini.distill.align import Shapes
from kdmini.distill.attention import AttentionTransfer
from kdmini.distill.step import Distillation, Weighted, tap_shapes

CARDS = (8, 12, 24, 40)  # GiB
SIZES = (4, 8, 16, 24, 32, 48, 64, 96, 128)  # of a batch
SHARE = 0.9  # of a card that can be filled; assumed
CONTEXT = 1.0  # GiB of CUDA, its libraries and workspaces; assumed
# bytes of VOC2012 and the test set of VOC2007, decoded, where they are kept on the card
STORED = 16.6e9
OBJECTS = 40  # G, of a batch of mosaics

# bytes of a parameter
FROZEN = 6  # float32, and autocast's copy in bf16
LEARNED = 14  # those, gradient and momentum
AVERAGED = 18  # those, and the average that is kept of the student


class Live(TorchDispatchMode):
    """Bytes that are alive, now and at most, of the tensors made while it is on.

    A storage counts from the operation that makes it until nobody holds it: autograd's
    saved tensors, temporaries and gradients alike.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self.known: set[int] = set()  # the storages that are alive, by address

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        inputs = {storage._cdata for storage in storages((args, kwargs))}
        for storage in storages(output):
            key = storage._cdata
            if key in inputs or key in self.known:
                continue
            self.known.add(key)
            self.now += storage.nbytes()
            weakref.finalize(storage, self.free, key, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return output

    def free(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def storages(tree: Any) -> list[torch.UntypedStorage]:
    """Of the tensors in nested tuples, lists and dicts."""
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class Peak(NamedTuple):
    """Bytes of a step on some images."""

    live: int  # where most tensors of the step are alive
    fixed: int  # what does not depend on the images: weights and their like


def step_peak(count: int, imgsz: int, teacher: Scale | None = "m", student: Scale = "s") -> Peak:
    """A step on `count` images; without a teacher, of the student alone.

    Nothing is compiled. Everything is bfloat16, as autocast has it, but for the loss and
    the maps, which are float32.
    """
    ours = detector(student)
    fixed = AVERAGED * parameters(ours)
    terms: dict[str, Weighted] = {}
    shapes: Shapes = {}
    theirs: YOLO11 | None = None
    if teacher:
        theirs = detector(teacher)
        fixed += FROZEN * parameters(theirs)
        terms = {"attention": Weighted(AttentionTransfer(), 1.0)}
        shapes = tap_shapes(ours, theirs, TAPS, imgsz)
        theirs.bfloat16()
    with torch.device("meta"):
        distillation = Distillation(ours, theirs, terms, TAPS if teacher else {}, shapes)
    fixed += LEARNED * parameters(distillation)
    ours.train().bfloat16()
    distillation.bfloat16()

    with torch.device("meta"):
        targets: Targets = {
            "boxes_xyxy": torch.empty(count, OBJECTS, 4),
            "labels": torch.empty(count, OBJECTS, dtype=torch.int64),
            "ids": [""] * count,
        }
        with Live() as live:  # the engine's step, in its order
            images = torch.empty(count, 3, imgsz, imgsz).bfloat16()
            preds = ours(images)
            task = ours.loss(preds, targets)
            kd = distillation(images, preds, targets, 0)
            torch.stack([*task.values(), *kd.values()]).sum().backward()
    return Peak(live.peak, fixed)


class Need(NamedTuple):
    """Bytes of a training step."""

    fixed: int  # weights, gradients, momentum, average; CUDA is not in it
    per_image: int


def need(imgsz: int, teacher: Scale | None = "m", student: Scale = "s") -> Need:
    """The line through two batch sizes.

    What gradients of the weights are alive at the peak is in `fixed` anyway.
    """
    two = step_peak(2, imgsz, teacher, student)
    four = step_peak(4, imgsz, teacher, student)
    return Need(two.fixed, (four.live - two.live) // 2)


def largest(card: float, needed: Need, stored: float = 0) -> int:
    """The largest of SIZES that fits a card of `card` GiB, 0 where none does.

    stored: bytes of decoded photographs on it.
    """
    room = (SHARE * card - CONTEXT) * 2**30 - needed.fixed - stored
    return max((size for size in SIZES if size * needed.per_image <= room), default=0)


def sizing(imgsz: int) -> str:
    """Batch sizes by card, estimated."""
    distilled = need(imgsz)
    alone = need(imgsz, teacher=None)
    rows: list[tuple] = []
    for card in CARDS:
        sizes = [
            largest(card, distilled),
            largest(card, alone),
            largest(card, distilled, STORED),
        ]
        rows.append((f"{card} GB", *(size or "-" for size in sizes)))
    head = ("card", "distilled", "student alone", "distilled, VOC on the card")
    lines = [in_words("distilled", distilled), in_words("student alone", alone)]
    return f"{table(head, rows)}\n\n{', '.join(lines)}"


def in_words(name: str, needed: Need) -> str:
    return f"{name} {needed.fixed / 1e9:.2f} GB + {needed.per_image / 1e6:.0f} MB an image"
