"""The scan against its equation, the four orders by hand, the affinity against the scan."""

import pytest
import torch
from torch import Tensor

from kdmini.segmentation.scan import cross_merge, cross_scan, scan, state_affinity
from tests.segmentation.sequential import orders, recurrence

BOUND = 1e-6  # of the largest number of what is compared


def drawn(length: int, *shape: int) -> tuple[Tensor, Tensor]:
    """Decays of all kinds, also those that underflow in a step or two, and inputs; float32."""
    torch.manual_seed(length)
    kinds = torch.tensor([0.0, 1e-42, 1e-30, 0.5, 0.999, 1.0])
    chosen = kinds[torch.randint(len(kinds), (length, *shape))]
    a = torch.where(torch.rand(length, *shape) < 0.5, torch.rand(length, *shape), chosen)
    return a, torch.randn(length, *shape)


def with_gradients(run, a: Tensor, b: Tensor, weight: Tensor) -> list[Tensor]:
    """-> h, and the gradients of (weight h) by a and b, in float64."""
    a = a.clone().requires_grad_()
    b = b.clone().requires_grad_()
    h = run(a, b)
    (weight.to(h.dtype) * h).sum().backward()
    return [h.detach().double(), a.grad.double(), b.grad.double()]


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    assert (ours - theirs).abs().max() <= BOUND * theirs.abs().max()


@pytest.mark.parametrize("length", [1, 2, 3, 6, 7, 8, 13])
def test_gradients_are_those_of_differences(length: int) -> None:
    a = torch.rand(length, 2, dtype=torch.float64, requires_grad=True)
    b = torch.randn(length, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(scan, (a, b))


@pytest.mark.parametrize("lengths", [range(1, 71), [256], [1024], [4096]], ids=str)
def test_equals_one_step_after_the_other_in_float64(lengths) -> None:
    for length in lengths:
        a, b = drawn(length, 3, 2)
        weight = torch.randn(b.shape)
        ours = with_gradients(scan, a, b, weight)
        theirs = with_gradients(recurrence, a.double(), b.double(), weight)
        for our, their in zip(ours, theirs, strict=True):
            assert_close(our, their)


def test_equals_torchs_own_scan() -> None:
    operators = pytest.importorskip("torch._higher_order_ops.associative_scan")

    def combine(first, second):
        return first[0] * second[0], second[0] * first[1] + second[1]

    a, b = drawn(333, 5)
    _, h = operators.associative_scan(combine, (a, b), dim=0, combine_mode="generic")
    assert_close(scan(a, b), h)


def test_a_gradient_of_ones_and_inputs_in_any_layout() -> None:
    a, b = drawn(21, 4, 6)
    turned = with_gradients(scan, a.mT, b.mT, torch.ones(()))
    plain = with_gradients(scan, a.mT.contiguous(), b.mT.contiguous(), torch.ones(6, 4))
    assert all(map(torch.equal, turned, plain))


def test_float32_also_under_autocast_and_of_half_precision() -> None:
    a, b = drawn(40, 8)
    weight = torch.randn(b.shape)
    outside = with_gradients(scan, a, b, weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert scan(a, b).dtype == torch.float32
        inside = with_gradients(scan, a, b, weight)
        of_halves = scan(a.bfloat16(), b.bfloat16())
    assert all(map(torch.equal, outside, inside))
    assert of_halves.dtype == torch.float32
    assert torch.equal(of_halves, scan(a.bfloat16().float(), b.bfloat16().float()))


# --- the four orders


def test_the_orders_of_a_map_of_two_by_three() -> None:
    """a b c
    d e f
    """
    cells = torch.tensor([[ord(letter) for letter in row] for row in ("abc", "def")])
    sequences = cross_scan(cells.expand(1, 4, 1, 2, 3))  # (6, 1, 4, 1)
    read = ["".join(map(chr, sequences[:, 0, k, 0])) for k in range(4)]
    assert read == ["abcdef", "adbecf", "fedcba", "fcebda"]


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (2, 3), (4, 4), (5, 3)], ids=str)
def test_what_was_unrolled_is_put_back(size: tuple[int, int]) -> None:
    maps = torch.randn(2, 4, 3, *size)
    channels_last = maps.permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2)
    for layout in (maps, channels_last):
        sequences = cross_scan(layout)
        assert sequences.is_contiguous()
        assert torch.equal(cross_merge(sequences, *size), maps)


# --- the state affinity


def test_the_affinity_is_the_scan_written_as_a_matrix() -> None:
    """C h of every channel; a mean over one channel is that channel."""
    torch.manual_seed(0)
    size = (3, 4)
    u = torch.randn(2, 4, 5, *size, dtype=torch.float64)
    dt = torch.rand(2, 4, 5, *size, dtype=torch.float64)
    log_a = -dt * torch.rand(5, 1, 1, dtype=torch.float64) * 3
    b, c = torch.randn(2, 2, 4, 1, *size, dtype=torch.float64)
    y = cross_merge(scan(cross_scan(log_a.exp()), cross_scan(dt * b * u)), *size) * c

    matrices = []
    for d in range(5):
        matrix = state_affinity(log_a[:, :, d : d + 1], dt[:, :, d : d + 1], b, c)
        handed_on = matrix @ u[:, :, d].flatten(2)[..., None]  # (N, 4, L, 1)
        assert torch.allclose(handed_on[..., 0], y[:, :, d].flatten(2), rtol=0, atol=1e-12)
        matrices.append(matrix)
    mean = state_affinity(log_a, dt, b, c)
    assert torch.allclose(mean, torch.stack(matrices).mean(0), rtol=0, atol=1e-14)

    for k, cells in enumerate(orders(*size)):
        place = [i * size[1] + j for i, j in cells]
        in_order = mean[:, k][:, place][:, :, place]
        assert not in_order.triu(1).any()  # nothing comes from what is read later


def test_the_affinity_stays_finite_where_decays_underflow() -> None:
    dt = torch.full((1, 4, 2, 4, 4), 50.0)
    log_a = (-20 * dt).requires_grad_()
    ones = torch.ones(1, 4, 1, 4, 4)
    matrix = state_affinity(log_a, dt, ones, ones)
    matrix.sum().backward()
    assert torch.equal(matrix, 50 * torch.eye(16).expand(1, 4, 16, 16))
    assert log_a.grad.isfinite().all()
