"""What the method costs, by counting: parameters, FLOPs, memory by batch size.

python -m bench.complexity [--imgsz 640]

Needs no GPU and no weights: what is counted here runs on the meta device, where tensors have
shapes and no content. A multiply-add is two FLOPs. Tables: YOLO11 n, s and m; the
attention maps of m and s, tap by tap, beside the research notes' table (N = 64) and
beside the forward passes; and batch sizes by card, from the memory of a training step. The tables
stand in docs/speed.md, docs/notes.md and docs/small.md.
Legend: N images, C channels, H W cells.
"""

import argparse
from collections.abc import Iterable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from bench.memory import sizing
from bench.meta import TAPS, detector, image, parameters, table
from kdmini.bounds import ImageSize
from kdmini.distill.align import Align
from kdmini.distill.step import tap_shapes
from kdmini.typed import argument


class Noted(NamedTuple):
    """What the notes say of a layer, for NOTES_BATCH images."""

    mflop: float  # millions of FLOPs
    mb: float


NOTES_BATCH = 64
NOTES = {
    16: Noted(1.31, 1.31),
    6: Noted(2.62, 2.62),
    13: Noted(2.62, 2.62),
    19: Noted(2.62, 2.62),
    8: Noted(0.66, 0.66),
    22: Noted(0.66, 0.66),
}


@torch.no_grad()
def flops(model: nn.Module, inputs: Any) -> int:
    """Of one pass: convolutions and matrix products, those of layer 10's attention too."""
    with FlopCounterMode(display=False) as counter:
        model.eval()(inputs)
    return counter.get_total_flops()


def counts(imgsz: int) -> str:
    """Parameters and FLOPs of YOLO11 n, s and m with the classes of VOC and of COCO."""
    rows = []
    for scale in "nsm":
        for classes in (20, 80):
            model = detector(scale, classes)
            giga = flops(model, image(imgsz)) / 1e9
            rows.append((scale, classes, f"{parameters(model):,}", f"{giga:.1f}"))
    return table(("YOLO11", "classes", "parameters", "GFLOPs"), rows)


class Tap(NamedTuple):
    """What one tap costs an image."""

    name: str
    shape: tuple[int, int, int, int]  # C of s, C of m, H, W
    # of one network's map: |F|^2 and the sum over C; the norm of H W cells is left out
    map_flops: int
    align_flops: int  # of the 1x1 convolution, forward
    kept: int  # bytes of |F|^2 in float32, which eager code keeps
    # bytes: the features of both read once in bf16, both maps written in float32
    moved: int

    @property
    def layer(self) -> int:
        return int(self.name.removeprefix("model."))


@cache
def tap_costs(imgsz: int) -> list[Tap]:
    """Where m teaches s.

    The student's features are aligned, so both maps are of the teacher's channels.
    """
    costs = []
    for name, shape in tap_shapes(detector("s"), detector("m"), TAPS, imgsz).items():
        student_channels, channels, height, width = shape
        cells = height * width
        with torch.device("meta"):
            feats = {name: torch.empty(1, student_channels, height, width)}
            align_flops = flops(Align({name: shape}), feats)
        costs.append(
            Tap(
                name,
                shape,
                map_flops=2 * channels * cells,
                align_flops=align_flops,
                kept=4 * channels * cells,
                moved=2 * (2 * channels + 4) * cells,
            )
        )
    return costs


def taps_beside_notes(imgsz: int) -> str:
    """The notes' table, with what it says and the factor between.

    For N = 64 and the maps of one network.
    """
    costs = tap_costs(imgsz)
    noted = [NOTES[tap.layer] for tap in costs]
    mflops = [NOTES_BATCH * tap.map_flops / 1e6 for tap in costs]
    megabytes = [NOTES_BATCH * tap.kept / 1e6 for tap in costs]
    rows: list[tuple[str, ...]] = []
    for tap, mflop, mb, notes in zip(costs, mflops, megabytes, noted, strict=True):
        student_channels, channels, height, width = tap.shape
        sizes = (f"{student_channels}, {channels}", f"{height}x{width}")
        rows.append((tap.name, *sizes, *beside(mflop, notes.mflop), *beside(mb, notes.mb)))

    # of the figures as they stand in the table, so that it adds up
    all_mflop = sum(round(mflop, 1) for mflop in mflops)
    all_mb = sum(round(mb, 1) for mb in megabytes)
    noted_mflop = sum(notes.mflop for notes in noted)
    noted_mb = sum(notes.mb for notes in noted)
    rows.append(("all", "", "", *beside(all_mflop, noted_mflop), *beside(all_mb, noted_mb)))
    head = ("tap", "C of s, m", "H x W", "MFLOP", "notes", "factor", "MB", "notes", "factor")
    return table(head, rows)


def beside(counted: float, noted: float) -> tuple[str, str, str]:
    """Both, and their ratio."""
    return f"{counted:.1f}", f"{noted:.2f}", f"{counted / noted:.0f}"


def taps_per_image(imgsz: int) -> str:
    """What an image costs at each tap, both networks, and beside the forward passes."""
    costs = tap_costs(imgsz)
    maps = [2 * tap.map_flops for tap in costs]
    aligns = [tap.align_flops for tap in costs]
    moved = [tap.moved for tap in costs]
    names = [tap.name for tap in costs]
    rows: list[tuple[str, ...]] = []
    for name, *values in zip(names, maps, aligns, moved, strict=True):
        rows.append((name, *millions(values)))
    rows.append(("all", *millions([sum(maps), sum(aligns), sum(moved)])))
    for scale in "sm":
        forward = flops(detector(scale), image(imgsz))
        shares = [f"{100 * sum(values) / forward:.2f} %" for values in (maps, aligns)]
        rows.append((f"share of the forward pass of {scale}", *shares, ""))
    head = ("tap", "maps of both, MFLOP", "align, MFLOP", "maps of both, MB moved")
    return table(head, rows)


def millions(values: Iterable[float]) -> list[str]:
    return [f"{value / 1e6:.1f}" for value in values]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--imgsz", type=argument(ImageSize), default=640)
    imgsz = parser.parse_args().imgsz
    print(f"{imgsz} pixels, torch {torch.__version__}")
    maps = f"Attention maps of one network, N = {NOTES_BATCH}, beside the notes"
    parts = {
        "Parameters, and FLOPs of a forward pass": counts,
        maps: taps_beside_notes,
        "What distillation adds to an image, forward": taps_per_image,
        "Batch size by card, 640 pixels, bf16: counted, not measured": lambda _: sizing(),
    }
    for title, part in parts.items():
        print(f"\n{title}\n\n{part(imgsz)}")


if __name__ == "__main__":
    main()
