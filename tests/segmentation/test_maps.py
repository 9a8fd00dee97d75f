"""The loss of a map of logits, and what is done with a network that is only used."""

import math

import pytest
import torch
from torch import Tensor, nn

from kdmini.segmentation.fast_scnn import FastSCNN
from kdmini.segmentation.maps import VOID, Segmenter, cross_entropy
from kdmini.segmentation.segformer import SegFormer

NAMES = ["background", "cat", "dog"]
SIDE = 64


def mask_of(images: int, side: int = SIDE, seed: int = 0) -> Tensor:
    """A quarter void, unequally over the images."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.randint(len(NAMES), (images, side, side), generator=generator)
    mask[:, : side // 4] = VOID
    mask[0, : side // 2] = VOID
    return mask.to(torch.uint8)


def logits_of(images: int, seed: int = 0) -> Tensor:
    return torch.randn(images, 3, 5, 7, generator=torch.Generator().manual_seed(seed))


def by_pixels(logits: Tensor, mask: Tensor) -> float:
    """The loss in a loop, in float64, with the bilinear map by hand."""
    logits = logits.double()
    rows, columns = logits.shape[2:]
    images, side, _ = mask.shape
    total = 0.0
    for n in range(images):
        for y in range(side):
            for x in range(side):
                label = int(mask[n, y, x])
                if label == 255:
                    continue
                row = min(max((y + 0.5) * rows / side - 0.5, 0), rows - 1)
                column = min(max((x + 0.5) * columns / side - 0.5, 0), columns - 1)
                top, left = int(row), int(column)
                down, right = min(top + 1, rows - 1), min(left + 1, columns - 1)
                a, b = row - top, column - left
                here = (1 - a) * ((1 - b) * logits[n, :, top, left] + b * logits[n, :, top, right])
                here += a * ((1 - b) * logits[n, :, down, left] + b * logits[n, :, down, right])
                total += math.log(sum(map(math.exp, here.tolist()))) - here[label].item()
    return total / (images * side * side)


def test_the_loss_is_that_of_a_loop_over_pixels() -> None:
    logits = logits_of(2)
    mask = mask_of(2, 12)
    assert cross_entropy(logits, mask).item() == pytest.approx(by_pixels(logits, mask), rel=1e-6)


def test_half_precision_is_summed_in_float32() -> None:
    """Thousands of pixels in bfloat16 would lose all but two digits."""
    logits = logits_of(2).bfloat16()
    loss = cross_entropy(logits, mask_of(2))
    assert loss.dtype == torch.float32
    assert loss == cross_entropy(logits.float(), mask_of(2))


def test_a_batch_without_a_class_costs_nothing() -> None:
    logits = logits_of(2).requires_grad_()
    loss = cross_entropy(logits, torch.full((2, SIDE, SIDE), VOID, dtype=torch.uint8))
    loss.backward()
    assert loss == 0
    assert logits.grad is not None
    assert (logits.grad == 0).all()


def test_two_halves_of_a_batch_make_the_whole() -> None:
    """Though one has fewer pixels that count."""
    logits = logits_of(4)
    mask = mask_of(4)
    halves = [cross_entropy(logits[part], mask[part]) for part in (slice(2), slice(2, 4))]
    whole = cross_entropy(logits, mask)
    assert torch.stack(halves).mean().item() == pytest.approx(whole.item(), rel=1e-6)
    assert abs(halves[0] - halves[1]) > 0.01


def test_auxiliary_maps_have_a_loss_of_their_own() -> None:
    maps = [logits_of(2, seed) for seed in range(3)]
    targets = {"mask": mask_of(2)}
    losses = Segmenter(NAMES, aux=0.25).loss(maps, targets)
    others = cross_entropy(maps[1], targets["mask"]) + cross_entropy(maps[2], targets["mask"])
    assert losses["ce"] == cross_entropy(maps[0], targets["mask"])
    assert losses["aux"].item() == pytest.approx(0.25 * others.item(), rel=1e-6)
    assert losses.keys() == {"ce", "aux"}
    assert Segmenter(NAMES).loss(maps[:1], targets).keys() == {"ce"}


def test_the_first_map_is_what_counts() -> None:
    network = Segmenter(NAMES)
    maps = [logits_of(2, seed) for seed in range(3)]
    assert [list(prediction) for prediction in network.decode(maps)] == [["logits"]] * 2
    assert torch.equal(network.decode(maps)[1]["logits"], maps[0][1])
    (for_a_student,) = network.class_maps(maps)
    assert for_a_student is maps[0]


def test_a_fresh_head_reads_all_maps_and_gives_preds_that_loss_takes() -> None:
    network = Segmenter(NAMES)
    head = network.make_head([8, 12])
    feats = [torch.rand(2, 8, 9, 7).requires_grad_(), torch.rand(2, 12, 5, 4).requires_grad_()]
    preds = head(feats)
    assert [tuple(logits.shape) for logits in preds] == [(2, 3, 9, 7)]
    losses = network.loss(preds, {"mask": mask_of(2)})
    assert losses.keys() == {"ce"}
    losses["ce"].backward()
    for feat in feats:
        assert feat.grad is not None
        assert feat.grad.any()
    assert not set(head.parameters()) & set(network.parameters())


def networks() -> list[Segmenter]:
    torch.manual_seed(0)
    return [SegFormer(NAMES), FastSCNN(NAMES)]


@pytest.mark.parametrize("number", range(2))
def test_every_parameter_learns_and_the_same_twice(number: int) -> None:
    gradients = []
    for _ in range(2):
        network = networks()[number].train()
        preds = network(torch.rand(2, 3, SIDE, SIDE))
        losses = network.loss(preds, {"mask": mask_of(2)})
        torch.stack(list(losses.values())).sum().backward()
        gradients.append({name: value.grad for name, value in network.named_parameters()})
    idle = [name for name, gradient in gradients[0].items() if gradient is None]
    assert not idle
    still = [name for name, gradient in gradients[0].items() if not gradient.any()]
    assert not still
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


@pytest.mark.parametrize("number", range(2))
@pytest.mark.parametrize("size", [(64, 96), (75, 101)])
def test_images_may_be_oblong_or_odd(number: int, size: tuple[int, int]) -> None:
    network = networks()[number].eval()
    preds = network(torch.rand(2, 3, *size))
    coarse = 4 if isinstance(network, SegFormer) else 8
    assert preds[0].shape == (2, 3, *(-(-side // coarse) for side in size))
    assert all(logits.isfinite().all() for logits in preds)


@pytest.mark.parametrize("number", range(2))
def test_a_folded_copy_gives_the_same(number: int) -> None:
    network = networks()[number]
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2)
            module.running_mean.normal_()
    network = network.double().eval()
    images = torch.rand(2, 3, SIDE, SIDE).double()
    with torch.no_grad():
        before = network(images)
        after = network.fold()(images)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("number", range(2))
def test_held_in_half_precision_autocast_gives_the_same(number: int) -> None:
    network = networks()[number].eval()
    images = torch.rand(2, 3, SIDE, SIDE)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = network(images)
        network.hold_in(torch.bfloat16)
        after = network(images)
    held = {tensor.dtype for name, tensor in network.named_parameters() if tensor.ndim == 4}
    assert held == {torch.bfloat16}
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("number", range(2))
def test_features_run_all_that_a_hook_may_want(number: int) -> None:
    network = networks()[number].eval()
    tap = "decoder" if isinstance(network, SegFormer) else "fusion"
    seen = []
    network.get_submodule(tap).register_forward_hook(lambda *call: seen.append(call[2]))
    images = torch.rand(2, 3, SIDE, SIDE)
    with torch.no_grad():
        assert network.features(images) is None
        network(images)
    assert len(seen) == 2
    assert torch.equal(seen[0], seen[1])


@pytest.mark.parametrize("number", range(2))
def test_images_are_normalised_inside(number: int) -> None:
    network = networks()[number]
    grey = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
    assert network.normalised(grey).abs().max() < 1e-6
    assert not {"mean", "std"} & network.state_dict().keys()
