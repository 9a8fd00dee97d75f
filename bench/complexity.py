"""What the method costs, by counting: parameters, FLOPs, and memory by batch size. Needs no GPU and
no weights.

python -m bench.complexity [--imgsz 640]

Everything runs on the meta device, where tensors have shapes and no content. A multiply-add is two
FLOPs. Three tables: YOLO11 n, s and m; the attention maps of m and s, tap by tap, beside the
research notes' table (N = 64); and an estimate of the memory of a training step. The tables are
those of docs/ideas.md.
Legend: N images, C channels, H W cells, G objects of an image.
"""

import argparse
import weakref
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from kdmini.contracts import Targets
from kdmini.detection.yolo11.model import YOLO11
from kdmini.distill.align import Align, Shapes
from kdmini.distill.attention import AttentionTransfer
from kdmini.distill.step import Distillation, Weighted, tap_shapes

Scale = str | list[float]
TAPS = {f"model.{layer}": f"model.{layer}" for layer in (6, 8, 13, 16, 19, 22)}
NOTES_BATCH = 64
# of a layer at N = 64, as the notes have it: millions of FLOPs, MB
NOTES = {
    16: (1.31, 1.31),
    6: (2.62, 2.62),
    13: (2.62, 2.62),
    19: (2.62, 2.62),
    8: (0.66, 0.66),
    22: (0.66, 0.66),
}

CARDS = (8, 12, 24, 40)  # GiB
SIZES = (4, 8, 16, 24, 32, 48, 64, 96, 128)  # of a batch
SHARE, CONTEXT = (
    0.9,
    1.0,
)  # assumed: of the card that can be filled; GiB of CUDA, its libraries and workspaces
STORED = (
    16.6e9  # bytes of VOC2012 and the test set of VOC2007, decoded, where they are kept on the card
)
OBJECTS = 40  # G, of a batch of mosaics


def detector(scale: Scale, classes: int = 20) -> YOLO11:
    """A detector without content."""
    with torch.device("meta"):
        return YOLO11([str(label) for label in range(classes)], scale)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@torch.no_grad()
def flops(model: nn.Module, given: Any) -> int:
    """Of one pass: convolutions and matrix products, the attention of layer 10 among them."""
    with FlopCounterMode(display=False) as counter:
        model.eval()(given)
    return counter.get_total_flops()


def image(imgsz: int) -> Tensor:
    return torch.empty(1, 3, imgsz, imgsz, device="meta")


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def counts(imgsz: int) -> str:
    """Parameters and FLOPs of YOLO11 n, s and m with the classes of VOC and of COCO."""
    rows = []
    for scale in "nsm":
        for classes in (20, 80):
            model = detector(scale, classes)
            rows.append(
                (
                    scale,
                    classes,
                    f"{parameters(model):,}",
                    f"{flops(model, image(imgsz)) / 1e9:.1f}",
                )
            )
    return table(("YOLO11", "classes", "parameters", "GFLOPs"), rows)


class Tap(NamedTuple):
    """What one tap costs an image."""

    name: str
    shape: tuple[int, int, int, int]  # C of s, C of m, H, W
    map_flops: (
        int  # of one network's map: |F|^2 and the sum over C; the norm of H W cells does not count
    )
    align_flops: int  # of the 1x1 convolution, forward
    kept: int  # bytes of |F|^2 in float32, which eager code keeps
    moved: int  # bytes: the features of both read once in bf16, both maps written in float32


@cache
def tap_costs(imgsz: int) -> list[Tap]:
    """m teaches s. The student's features are aligned, so both maps are of the teacher's channels."""
    costs = []
    for name, shape in tap_shapes(detector("s"), detector("m"), TAPS, imgsz).items():
        cs, ct, height, width = shape
        cells = height * width
        with torch.device("meta"):
            align = flops(Align({name: shape}), {name: torch.empty(1, cs, height, width)})
        costs.append(
            Tap(name, shape, 2 * ct * cells, align, 4 * ct * cells, 2 * (2 * ct + 4) * cells)
        )
    return costs


def taps_beside_notes(imgsz: int) -> str:
    """The notes' table, for N = 64 and the maps of one network, with what it says and the factor
    between.
    """
    rows: list[tuple] = []
    for tap in tap_costs(imgsz):
        cs, ct, height, width = tap.shape
        said_flops, said_mb = NOTES[int(tap.name.removeprefix("model."))]
        mflop, mb = NOTES_BATCH * tap.map_flops / 1e6, NOTES_BATCH * tap.kept / 1e6
        of_flops = (f"{mflop:.1f}", said_flops, f"{mflop / said_flops:.0f}")
        of_memory = (f"{mb:.1f}", said_mb, f"{mb / said_mb:.0f}")
        rows.append((tap.name, f"{cs}, {ct}", f"{height}x{width}", *of_flops, *of_memory))
    # the columns of what is computed here, and of what the notes say
    sums = [sum(float(row[column]) for row in rows) for column in (3, 4, 6, 7)]
    mflop, said_flops, mb, said_mb = sums
    total = (f"{mflop:.1f}", f"{said_flops:.2f}", f"{mflop / said_flops:.0f}")
    rows.append(("all", "", "", *total, f"{mb:.1f}", f"{said_mb:.2f}", f"{mb / said_mb:.0f}"))
    head = ("tap", "C of s, m", "H x W", "MFLOP", "notes", "factor", "MB", "notes", "factor")
    return table(head, rows)


def taps_per_image(imgsz: int) -> str:
    """What an image costs at each tap, both networks, and beside the forward passes."""
    costs = tap_costs(imgsz)
    whole = [flops(detector(scale), image(imgsz)) for scale in "sm"]
    figures = {tap.name: (2 * tap.map_flops, tap.align_flops, tap.moved) for tap in costs}
    figures["all"] = total = tuple(map(sum, zip(*figures.values(), strict=True)))
    rows: list[tuple] = [
        (name, *(f"{value / 1e6:.1f}" for value in values)) for name, values in figures.items()
    ]
    for name, forward in zip(("s", "m"), whole, strict=True):
        shares = (f"{100 * value / forward:.2f} %" for value in total[:2])
        rows.append((f"share of the forward pass of {name}", *shares, ""))
    return table(("tap", "maps of both, MFLOP", "align, MFLOP", "maps of both, MB moved"), rows)


class Live(TorchDispatchMode):
    """Bytes of the tensors that are alive, now and at most, of those made while it is on.

    A storage counts from the operation that makes it until nobody holds it: autograd's saved
    tensors, temporaries and gradients alike.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {storage._cdata for storage in storages((args, kwargs))}
        for storage in storages(out):
            if (key := storage._cdata) not in given and key not in self.known:
                self.known.add(key)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.free, key, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def free(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def storages(tree: Any) -> list[torch.UntypedStorage]:
    """Of the tensors in nested tuples, lists and dicts."""
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def step_peak(
    count: int, imgsz: int, teacher: Scale | None = "m", student: Scale = "s"
) -> tuple[int, int]:
    """-> bytes of a step on `count` images at its peak, and those that do not depend on them:
    weights and their like.

    Nothing is compiled. Everything is bfloat16, as autocast has it, but for the loss and the maps,
    which are float32."""
    ours = detector(student)
    terms: dict[str, Weighted] = {}
    pairs: dict[str, str] = {}
    shapes: Shapes = {}
    theirs, fixed = None, 0
    if teacher:
        theirs = detector(teacher)
        terms, pairs = {"attention": Weighted(AttentionTransfer(), 1.0)}, TAPS
        shapes = tap_shapes(ours, theirs, pairs, imgsz)
        fixed += 6 * parameters(theirs)  # float32, and autocast's copies in bf16
        theirs.bfloat16()
    with torch.device("meta"):
        distillation = Distillation(ours, theirs, terms, pairs, shapes)
    fixed += 14 * parameters(distillation) + 18 * parameters(
        ours
    )  # those, gradient, momentum; the student's average
    ours.bfloat16()
    distillation.bfloat16()
    with torch.device("meta"):
        labels = torch.empty(count, OBJECTS, dtype=torch.int64)
        targets: Targets = {
            "boxes_xyxy": torch.empty(count, OBJECTS, 4),
            "labels": labels,
            "ids": [""] * count,
        }
        with Live() as live:  # the engine's step, in its order
            images = torch.empty(count, 3, imgsz, imgsz).bfloat16()
            preds = ours.train()(images)
            task = ours.loss(preds, targets)
            kd = distillation(images, preds, targets, 0)
            torch.stack([*task.values(), *kd.values()]).sum().backward()
    return live.peak, fixed


class Need(NamedTuple):
    """Bytes of a training step."""

    fixed: int  # weights, gradients, momentum, average; CUDA is not in it
    per_image: int


def need(imgsz: int, teacher: Scale | None = "m", student: Scale = "s") -> Need:
    """The line through two batch sizes; what gradients of the weights are alive at the peak is in
    `fixed` anyway.
    """
    (two, fixed), (four, _) = (step_peak(count, imgsz, teacher, student) for count in (2, 4))
    return Need(fixed, (four - two) // 2)


def largest(card: float, needed: Need, stored: float = 0) -> int:
    """The largest of SIZES that fits a card of `card` GiB, 0 where none does."""
    room = (SHARE * card - CONTEXT) * 2**30 - needed.fixed - stored
    return max((size for size in SIZES if size * needed.per_image <= room), default=0)


def sizing(imgsz: int) -> str:
    """Batch sizes by card, estimated."""
    with_teacher, alone = need(imgsz), need(imgsz, teacher=None)
    cases = ((with_teacher, 0), (alone, 0), (with_teacher, STORED))
    rows: list[tuple] = [
        (f"{card} GB", *(largest(card, *case) or "-" for case in cases)) for card in CARDS
    ]
    told = ", ".join(
        f"{name} {needed.fixed / 1e9:.2f} GB + {needed.per_image / 1e6:.0f} MB an image"
        for name, needed in (("distilled", with_teacher), ("student alone", alone))
    )
    return f"{table(('card', 'distilled', 'student alone', 'distilled, VOC on the card'), rows)}\n\n{told}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--imgsz", type=int, default=640)
    imgsz = parser.parse_args().imgsz
    print(f"{imgsz} pixels, torch {torch.__version__}")
    for title, part in (
        ("Parameters, and FLOPs of a forward pass", counts),
        (f"Attention maps of one network, N = {NOTES_BATCH}, beside the notes", taps_beside_notes),
        ("What distillation adds to an image, forward", taps_per_image),
        ("Batch size by card, bf16: estimated, not measured", sizing),
    ):
        print(f"\n{title}\n\n{part(imgsz)}")


if __name__ == "__main__":
    main()
