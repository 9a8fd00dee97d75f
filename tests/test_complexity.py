"""What bench/complexity.py counts, against published figures, formulas and a second way of
counting.
"""

from pathlib import Path

import pytest
import torch
from torch import nn

from bench import complexity
from tests.conftest import ROOT, TINY

TINY_SCALE = [float(part) for part in TINY.strip("[]").split(",")]
PUBLISHED = [  # scale, classes, parameters, GFLOPs at 640 px without the products of layer 10's attention
    ("n", 80, 2_624_080, 6.5),
    ("s", 80, 9_458_752, 21.5),
    ("m", 80, 20_114_688, 68.0),
    ("s", 20, 9_435_532, None),
    ("m", 20, 20_068_428, None),
]


@pytest.mark.parametrize("scale, classes, parameters, gflops", PUBLISHED)
def test_counts_are_the_published_ones(
    scale: str, classes: int, parameters: int, gflops: float | None
) -> None:
    model, of_convolutions, of_products = complexity.detector(scale, classes), 0, 0

    def convolution(conv: nn.Conv2d, given: tuple, out: torch.Tensor) -> None:
        nonlocal of_convolutions
        of_convolutions += 2 * out.numel() * conv.weight[0].numel()

    def products(attention: nn.Module, given: tuple, out: torch.Tensor) -> None:
        nonlocal of_products  # q k and v a: all pairs of cells, by the widths of key and value
        cells, heads = out.shape[2] * out.shape[3], attention.heads
        of_products += 2 * cells**2 * heads * (attention.key_dim + attention.value_dim)

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(convolution)
    model.get_submodule("model.10.m.0.attn").register_forward_hook(products)
    counted = complexity.flops(model, complexity.image(640))
    assert complexity.parameters(model) == parameters
    assert counted == of_convolutions + of_products
    if gflops:
        assert round(of_convolutions / 1e9, 1) == gflops


def test_the_maps_and_the_alignment_cost_what_the_formulas_say() -> None:
    found = {tap.name.removeprefix("model."): tap for tap in complexity.tap_costs(640)}
    student, teacher = (256, 512, 256, 128, 256, 512), (512, 512, 512, 256, 512, 512)
    for layer, cs, ct, side in zip(found, student, teacher, (40, 20, 40, 80, 40, 20), strict=True):
        tap = found[layer]
        assert tap.shape == (cs, ct, side, side)
        assert tap.align_flops == 2 * cs * ct * side**2
        assert tap.kept == 2 * tap.map_flops == torch.empty(ct, side, side).nbytes
    assert found["16"].map_flops == 3_276_800  # 256 * 80 * 80 * 2
    features = torch.empty(2, 256, 80, 80, dtype=torch.bfloat16)
    assert found["16"].moved == features.nbytes + torch.empty(2, 80, 80).nbytes


def test_the_notes_total_is_the_sum_of_their_layers() -> None:
    assert [round(sum(said), 2) for said in zip(*complexity.NOTES.values(), strict=True)] == [
        10.49,
        10.49,
    ]


def test_bytes_alive_are_counted_as_on_paper() -> None:
    with complexity.Live() as live:
        first = torch.empty(1000)  # 4000 bytes
        second = first * 2  # 8000
        view = second[:10]
        assert (live.now, live.peak) == (8000, 8000)
        del second
        assert live.now == 8000  # the view holds it
        del view
        third = first.double()  # 4000 + 8000
        assert (live.now, live.peak) == (12000, 12000)
        first.add_(1)
        del third
    assert (live.now, live.peak) == (4000, 12000)


def test_what_lives_after_a_forward_pass_is_what_autograd_saves_and_the_preds() -> None:
    model = complexity.detector(TINY_SCALE).train()
    own = {tensor.untyped_storage()._cdata for tensor in [*model.parameters(), *model.buffers()]}
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved.setdefault(storage._cdata, storage)
        return tensor

    with (
        complexity.Live() as live,
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        preds = model(torch.empty(2, 3, 64, 64, device="meta"))
    held = {key: storage.nbytes() for key, storage in saved.items() if key not in own}
    held |= {p.untyped_storage()._cdata: p.nbytes for p in preds}
    assert live.now == sum(held.values())


def test_memory_is_a_line_in_the_batch_size_and_a_teacher_costs_some() -> None:
    needed = complexity.need(64, TINY_SCALE, TINY_SCALE)
    eight, fixed = complexity.step_peak(8, 64, TINY_SCALE, TINY_SCALE)
    alone, fixed_alone = complexity.step_peak(8, 64, None, TINY_SCALE)
    assert eight == pytest.approx(8 * needed.per_image, rel=0.02) and fixed == needed.fixed
    assert alone < eight and fixed_alone < fixed


def test_the_largest_batch_that_fits() -> None:
    needed = complexity.Need(fixed=2**30, per_image=2**30 // 4)
    room = (10 * complexity.SHARE - complexity.CONTEXT - 1) * 4  # images
    assert complexity.largest(10, needed) == max(size for size in complexity.SIZES if size <= room)
    assert complexity.largest(10, needed, 3 * 2**30) == max(
        size for size in complexity.SIZES if size <= room - 12
    )
    assert complexity.largest(2, needed) == 0


def test_the_document_has_the_tables_as_they_are_counted() -> None:
    text = (ROOT / "docs" / "ideas.md").read_text(encoding="utf-8")
    for part in (complexity.counts, complexity.taps_beside_notes, complexity.taps_per_image):
        assert part(640) in text


def test_the_document_has_the_pictures_that_it_shows() -> None:
    text = (ROOT / "docs" / "ideas.md").read_text(encoding="utf-8")
    shown = {
        line.partition("](")[2].rstrip(")") for line in text.splitlines() if line.startswith("![")
    }
    kept = {f"pictures/{path.name}" for path in Path(ROOT / "docs" / "pictures").glob("*.png")}
    assert shown == kept != set()
    for name in kept:
        assert (ROOT / "docs" / name).stat().st_size < 150_000, name
