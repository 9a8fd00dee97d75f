"""Attention transfer, against the code of the notes and that of the authors."""

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdmini.contracts import View
from kdmini.distill.attention import AttentionTransfer, attention_map, map_distance, to_largest

REDUCTIONS: Any = ("notes", "sample", "mean_square")
NO_TARGETS: Any = {}


def notes_map(fm: Tensor, p: float = 2) -> Tensor:
    """As printed in the research notes."""
    am = torch.pow(torch.abs(fm), p)
    am = torch.sum(am, dim=1, keepdim=False)
    norm = torch.norm(am, p=2, dim=(1, 2), keepdim=True)
    am = torch.div(am, norm + 1e-8)
    return am


def notes_loss(y_s: list[Tensor], y_t: list[Tensor], p: float = 2) -> Tensor:
    """As printed in the research notes."""
    losses = []
    for s, t in zip(y_s, y_t, strict=True):
        s_attention = notes_map(s, p)
        t_attention = notes_map(t, p)
        loss = torch.norm(s_attention - t_attention, p=2) / s_attention.shape[0]
        losses.append(loss)
    return torch.stack(losses).sum()


def authors_map(x: Tensor) -> Tensor:
    """The formula of the published code of Zagoruyko & Komodakis.

    It takes a mean over channels, which the L2 norm undoes.
    """
    return F.normalize(x.pow(2).mean(1).view(x.size(0), -1))


class Pair(NamedTuple):
    """Feats of student and teacher at three taps."""

    student: list[Tensor]
    teacher: list[Tensor]


SIZES = [(8, 6, 6), (5, 4, 7), (16, 3, 3)]  # C, H, W of the student; the teacher has 2 C


def pair(images: int = 3, seed: int = 0, dtype: torch.dtype = torch.float64) -> Pair:
    """The student's carry a gradient."""
    torch.manual_seed(seed)
    student = [torch.randn(images, *size, dtype=dtype).requires_grad_() for size in SIZES]
    teacher = [torch.randn(images, 2 * c, h, w, dtype=dtype) for c, h, w in SIZES]
    return Pair(student, teacher)


def view(feats: list[Tensor]) -> View:
    return View({f"tap{i}": feat for i, feat in enumerate(feats)}, None, torch.empty(0))


def loss_of(term: AttentionTransfer, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    return term(view(student), view(teacher), NO_TARGETS)


# --- against what others wrote


def assert_gradients_near(ours: Pair, theirs: Pair, rtol: float, atol: float) -> None:
    for mine, other in zip(ours.student, theirs.student, strict=True):
        assert mine.grad is not None
        assert other.grad is not None
        assert torch.allclose(mine.grad, other.grad, rtol=rtol, atol=atol)


@pytest.mark.parametrize("p", [2.0, 1.0, 4.0])
def test_values_and_gradients_are_those_of_the_notes(p: float) -> None:
    ours = pair()
    theirs = pair()
    loss = loss_of(AttentionTransfer("notes", p), *ours)
    expected = notes_loss(*theirs, p)
    loss.backward()
    expected.backward()
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert_gradients_near(ours, theirs, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("p", [2.0, 1.0, 4.0])
def test_maps_are_those_of_the_notes(p: float) -> None:
    for feat in pair().student:
        assert torch.allclose(attention_map(feat, p), notes_map(feat, p), rtol=1e-12)


def test_notes_reduction_is_the_default() -> None:
    default = loss_of(AttentionTransfer(), *pair())
    assert default == loss_of(AttentionTransfer("notes"), *pair())


def test_values_and_gradients_of_mean_square_are_those_of_the_authors() -> None:
    ours = pair()
    theirs = pair()
    loss = loss_of(AttentionTransfer("mean_square"), *ours)
    expected: Any = 0
    for s, t in zip(*theirs, strict=True):
        expected += (authors_map(s) - authors_map(t)).pow(2).mean()
    loss.backward()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-7)  # their eps stands elsewhere
    assert_gradients_near(ours, theirs, rtol=1e-6, atol=1e-12)


def test_sample_is_the_mean_of_the_distances_image_by_image() -> None:
    student, teacher = pair()
    expected = 0.0
    for s, t in zip(student, teacher, strict=True):
        for n in range(3):
            expected += torch.dist(notes_map(s)[n], notes_map(t)[n]).item() / 3
    loss = loss_of(AttentionTransfer("sample"), student, teacher)
    assert loss.item() == pytest.approx(expected)
    assert map_distance(student[0], teacher[0]).shape == (3,)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradient_is_the_slope(reduction: Any) -> None:
    student, teacher = pair(images=2)
    term = AttentionTransfer(reduction)
    assert torch.autograd.gradcheck(lambda *feats: loss_of(term, list(feats), teacher), student)


# --- invariances


def test_maps_have_unit_norm_and_no_channels() -> None:
    maps = attention_map(torch.randn(4, 7, 5, 6))
    assert maps.shape == (4, 5, 6)
    assert maps.dtype == torch.float32
    assert torch.allclose(maps.flatten(1).norm(dim=1), torch.ones(4))
    assert (maps >= 0).all()
    assert (maps.flatten(1).mean(1) <= 1 / 30**0.5 + 1e-6).all()


def test_maps_do_not_see_scale_sign_or_order_of_channels() -> None:
    feat = torch.randn(2, 7, 5, 6, dtype=torch.float64)
    expected = attention_map(feat)
    twice = torch.cat([feat, feat], 1)
    for same in (37.5 * feat, -feat, feat[:, torch.randperm(7)], twice):
        assert torch.allclose(attention_map(same), expected)


@pytest.mark.parametrize("factor", [1e-30, 1e-6, 1e6])
def test_maps_to_look_at_do_not_see_scale_however_small(factor: float) -> None:
    """Where eps = 1e-8 makes the others darker."""
    torch.manual_seed(0)
    feat = torch.randn(2, 7, 5, 6)
    found = attention_map(to_largest(factor * feat))
    assert torch.allclose(found, attention_map(feat), rtol=1e-5)
    if factor < 1:
        assert attention_map(factor * feat).norm() < 0.1
    half = (1e-6 * feat).half()
    assert torch.allclose(attention_map(to_largest(half)).flatten(1).norm(dim=1), torch.ones(2))


def test_one_image_does_not_scale_another_and_zeros_stay_zeros() -> None:
    torch.manual_seed(0)
    feat = torch.randn(2, 7, 5, 6)
    loud = torch.stack([feat[0], 1e9 * feat[1]])
    assert torch.allclose(attention_map(to_largest(loud)), attention_map(feat), rtol=1e-5)
    assert not to_largest(torch.zeros(1, 2, 3, 3)).any()


def test_maps_see_where() -> None:
    feat = torch.randn(2, 7, 5, 6, dtype=torch.float64)
    flipped = attention_map(feat.flip(3))
    assert not torch.allclose(flipped, attention_map(feat))
    assert torch.allclose(flipped, attention_map(feat).flip(2))


def test_distance_runs_from_zero_to_the_root_of_two() -> None:
    left = torch.zeros(1, 3, 4, 4)
    right = torch.zeros(1, 3, 4, 4)
    left[..., 0] = 1
    right[..., 3] = 1
    assert map_distance(left, right).tolist() == pytest.approx([2**0.5])
    assert map_distance(left, 5 * left).tolist() == pytest.approx([0], abs=1e-6)


def parts(feats: list[Tensor], start: int) -> list[Tensor]:
    """Two images of each tap."""
    return [feat[start : start + 2] for feat in feats]


def test_sample_does_not_depend_on_how_images_are_batched() -> None:
    student, teacher = pair(images=6)
    term = AttentionTransfer("sample")
    whole = loss_of(term, student, teacher).item()
    twos = [loss_of(term, parts(student, i), parts(teacher, i)).item() for i in (0, 2, 4)]
    assert whole == pytest.approx(sum(twos) / 3)
    notes = loss_of(AttentionTransfer("notes"), student, teacher).item()
    assert notes != pytest.approx(whole, rel=0.1)


@pytest.mark.parametrize("images", [4, 16, 64])
@pytest.mark.parametrize(
    ("reduction", "power"), [("notes", -1 / 2), ("sample", 0), ("mean_square", 0)]
)
def test_notes_alone_falls_as_one_over_the_root_of_the_batch(
    images: int, reduction: Any, power: float
) -> None:
    student, teacher = pair(images=1)
    term = AttentionTransfer(reduction)
    one = loss_of(term, student, teacher).item()
    repeated = [[feat.repeat(images, 1, 1, 1) for feat in feats] for feats in (student, teacher)]
    assert loss_of(term, *repeated).item() == pytest.approx(one * images**power)


def test_taps_are_summed() -> None:
    student, teacher = pair()
    term = AttentionTransfer("notes")
    each = [loss_of(term, [s], [t]).item() for s, t in zip(student, teacher, strict=True)]
    assert loss_of(term, student, teacher).item() == pytest.approx(sum(each))


def test_it_learns_nothing_and_reads_feats_alone() -> None:
    term = AttentionTransfer()
    assert not list(term.parameters())
    assert term.uses == {"feats"}


# --- numbers


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_features_do_not_overflow(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    student = (300 * torch.rand(2, 512, 4, 4, dtype=torch.float64)).to(dtype)
    teacher = (300 * torch.rand(2, 512, 4, 4, dtype=torch.float64)).to(dtype)
    assert attention_map(student).dtype == torch.float32
    assert torch.equal(attention_map(student), attention_map(student.float()))
    for reduction in REDUCTIONS:
        term = AttentionTransfer(reduction)
        feat = student.clone().requires_grad_()
        loss = term.distance(feat, teacher)
        loss.backward()
        plain = term.distance(student.double(), teacher.double())
        assert loss > 0
        assert loss.item() == pytest.approx(plain.item(), rel=1e-4)
        assert feat.grad is not None
        assert feat.grad.isfinite().all()


def test_half_precision_features_do_not_vanish() -> None:
    """1e-4 squared is 0 in float16, and so is eps."""
    feat = torch.full((1, 8, 2, 2), 1e-4, dtype=torch.float16)
    feat[..., 0] = 0
    assert attention_map(feat)[0, :, 1].tolist() == pytest.approx([0.5**0.5] * 2, rel=0.2)


def test_autocast_does_not_lower_the_precision_of_the_maps() -> None:
    student, teacher = pair(dtype=torch.float32)
    plain = loss_of(AttentionTransfer("notes"), student, teacher)
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(AttentionTransfer("notes"), student, teacher)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(plain.item(), rel=1e-6)


def edge_case(case: str) -> tuple[Tensor, Tensor]:
    """-> student, teacher, where some norm is zero."""
    torch.manual_seed(0)
    student = torch.randn(2, 3, 4, 4)
    teacher = torch.randn(2, 3, 4, 4)
    if case in ("zeros", "student zero"):
        student = torch.zeros_like(student)
    if case in ("zeros", "teacher zero"):
        teacher = torch.zeros_like(teacher)
    if case == "equal":
        teacher = student.clone()
    if case == "one image zero":
        student[0] = 0
        teacher[0] = 0
    return student.requires_grad_(), teacher


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    "case", ["zeros", "student zero", "teacher zero", "equal", "one image zero"]
)
def test_loss_and_gradient_are_finite_where_a_norm_is_zero(reduction: Any, case: str) -> None:
    student, teacher = edge_case(case)
    loss = AttentionTransfer(reduction).distance(student, teacher)
    loss.backward()
    assert loss.isfinite()
    assert (loss == 0) == (case in ("zeros", "equal"))
    assert student.grad is not None
    assert student.grad.isfinite().all()
