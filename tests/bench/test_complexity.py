"""What bench/complexity.py and bench/memory.py count, against published figures, formulas
and a second way of counting.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from bench import complexity, memory, scale
from bench.meta import detector, image, parameters
from tests.conftest import ROOT

# scale, classes, parameters, GFLOPs at 640 px without the products of layer 10's attention
PUBLISHED = [
    ("n", 80, 2_624_080, 6.5),
    ("s", 80, 9_458_752, 21.5),
    ("m", 80, 20_114_688, 68.0),
    ("s", 20, 9_435_532, None),
    ("m", 20, 20_068_428, None),
]


@pytest.mark.parametrize("scale, classes, count, gflops", PUBLISHED)
def test_counts_are_the_published_ones(
    scale: str, classes: int, count: int, gflops: float | None
) -> None:
    model = detector(scale, classes)
    of_convolutions = 0
    of_products = 0

    def convolution(conv: nn.Conv2d, inputs: tuple, output: Tensor) -> None:
        nonlocal of_convolutions
        of_convolutions += 2 * output.numel() * conv.weight[0].numel()

    def products(attention: nn.Module, inputs: tuple, output: Tensor) -> None:
        # q k and v a: all pairs of cells, by the widths of key and value
        nonlocal of_products
        cells = output.shape[2] * output.shape[3]
        widths = attention.key_dim + attention.value_dim
        of_products += 2 * cells**2 * attention.heads * widths

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(convolution)
    model.get_submodule("model.10.m.0.attn").register_forward_hook(products)
    counted = complexity.flops(model, image(640))
    assert parameters(model) == count
    assert counted == of_convolutions + of_products
    if gflops:
        assert round(of_convolutions / 1e9, 1) == gflops


# layer: channels of s, channels of m, cells of a side
TAPPED = {
    6: (256, 512, 40),
    8: (512, 512, 20),
    13: (256, 512, 40),
    16: (128, 256, 80),
    19: (256, 512, 40),
    22: (512, 512, 20),
}


def test_the_maps_and_the_alignment_cost_what_the_formulas_say() -> None:
    costs = {tap.layer: tap for tap in complexity.tap_costs(640)}
    assert list(costs) == list(TAPPED)
    for layer, (student_channels, channels, side) in TAPPED.items():
        tap = costs[layer]
        squares = torch.empty(channels, side, side)
        assert tap.shape == (student_channels, channels, side, side)
        assert tap.align_flops == 2 * student_channels * channels * side**2
        assert tap.kept == 2 * tap.map_flops == squares.nbytes


def test_the_cost_of_layer_16_by_hand() -> None:
    costs = {tap.layer: tap for tap in complexity.tap_costs(640)}
    assert costs[16].map_flops == 3_276_800  # 256 * 80 * 80 * 2
    features = torch.empty(2, 256, 80, 80, dtype=torch.bfloat16)  # of both networks
    maps = torch.empty(2, 80, 80)
    assert costs[16].moved == features.nbytes + maps.nbytes


def test_the_notes_total_is_the_sum_of_their_layers() -> None:
    noted = complexity.NOTES.values()
    assert round(sum(layer.mflop for layer in noted), 2) == 10.49
    assert round(sum(layer.mb for layer in noted), 2) == 10.49


def test_the_largest_batch_that_fits() -> None:
    needed = memory.Need(fixed=2**30, image=2**30 // 4)
    room = (10 * memory.SHARE - memory.CONTEXT - 1) * 4  # images
    fitting = [size for size in memory.SIZES if size <= room]
    assert memory.largest(10, needed) == max(fitting)
    beside_photographs = [size for size in memory.SIZES if size <= room - 12]
    assert memory.largest(10, needed, 3 * 2**30) == max(beside_photographs)
    assert memory.largest(2, needed) == 0


@pytest.mark.parametrize(
    ("part", "document"),
    [
        (complexity.counts, "speed"),
        (complexity.taps_beside_notes, "notes"),
        (complexity.taps_per_image, "speed"),
        (lambda _: memory.sizing(), "small"),
        (lambda _: scale.parts(), "speed"),
        (lambda _: scale.scaling(), "speed"),
    ],
)
def test_the_documents_have_the_tables_as_they_are_counted(
    part: Callable[[int], str], document: str
) -> None:
    assert part(640) in (ROOT / f"docs/{document}.md").read_text(encoding="utf-8")


def test_the_pages_show_the_pictures_that_are_kept() -> None:
    shown = set()
    for page in (ROOT / "docs").glob("*.md"):
        text = page.read_text(encoding="utf-8")
        lines = [line for line in text.splitlines() if line.startswith("![")]
        pictures = {line.partition("](")[2].rstrip(")") for line in lines}
        shown |= {picture for picture in pictures if picture.startswith("pictures/")}
    kept = {f"pictures/{path.name}" for path in (ROOT / "docs/pictures").glob("*.png")}
    assert shown == kept
    assert kept
    for name in kept:
        assert (ROOT / "docs" / name).stat().st_size < 150_000, name
