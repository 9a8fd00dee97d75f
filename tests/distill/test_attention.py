"""Attention transfer, against the code of the research notes and that of the paper's authors."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdmini.contracts import View
from kdmini.distill.attention import AttentionTransfer, attention_map, map_distance

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
    """Zagoruyko & Komodakis, the formula of their published code: a mean over channels, which L2
    norm undoes.
    """
    return F.normalize(x.pow(2).mean(1).view(x.size(0), -1))


def pair(
    images: int = 3, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[list[Tensor], list[Tensor]]:
    """Feats of student and teacher at three taps."""
    torch.manual_seed(seed)
    sizes = [(8, 6, 6), (5, 4, 7), (16, 3, 3)]
    student = [torch.randn(images, *size, dtype=dtype).requires_grad_() for size in sizes]
    return student, [torch.randn(images, 2 * c, h, w, dtype=dtype) for c, h, w in sizes]


def view(feats: list[Tensor]) -> View:
    return View({f"tap{i}": feat for i, feat in enumerate(feats)}, None, torch.empty(0))


def loss_of(term: AttentionTransfer, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    return term(view(student), view(teacher), NO_TARGETS)


# --- against what others wrote


@pytest.mark.parametrize("p", [2.0, 1.0, 4.0])
def test_values_and_gradients_are_those_of_the_notes(p: float) -> None:
    (student, teacher), (same, _) = pair(), pair()
    ours, theirs = (
        loss_of(AttentionTransfer("notes", p), student, teacher),
        notes_loss(same, teacher, p),
    )
    ours.backward()
    theirs.backward()
    assert ours.dtype == torch.float64
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-12)
    for mine, other in zip(student, same, strict=True):
        assert mine.grad is not None and other.grad is not None
        assert torch.allclose(mine.grad, other.grad, rtol=1e-9, atol=1e-14)
        assert torch.allclose(attention_map(mine, p), notes_map(other, p), rtol=1e-12)


def test_notes_reduction_is_the_default() -> None:
    student, teacher = pair()
    assert loss_of(AttentionTransfer(), student, teacher) == loss_of(
        AttentionTransfer("notes"), student, teacher
    )


def test_values_and_gradients_of_mean_square_are_those_of_the_authors() -> None:
    (student, teacher), (same, _) = pair(), pair()
    ours = loss_of(AttentionTransfer("mean_square"), student, teacher)
    theirs: Any = sum(
        (authors_map(s) - authors_map(t)).pow(2).mean() for s, t in zip(same, teacher, strict=True)
    )
    ours.backward()
    theirs.backward()
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-7)  # their eps stands elsewhere
    for mine, other in zip(student, same, strict=True):
        assert mine.grad is not None and other.grad is not None
        assert torch.allclose(mine.grad, other.grad, rtol=1e-6, atol=1e-12)


def test_sample_is_the_mean_of_the_distances_image_by_image() -> None:
    student, teacher = pair()
    expected = 0.0
    for s, t in zip(student, teacher, strict=True):
        for n in range(3):
            expected += torch.dist(notes_map(s)[n], notes_map(t)[n]).item() / 3
    assert loss_of(AttentionTransfer("sample"), student, teacher).item() == pytest.approx(expected)
    assert map_distance(student[0], teacher[0]).shape == (3,)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradient_is_the_slope(reduction: Any) -> None:
    student, teacher = pair(images=2)
    term = AttentionTransfer(reduction)
    assert torch.autograd.gradcheck(lambda *feats: loss_of(term, list(feats), teacher), student)


# --- invariances


def test_maps_have_unit_norm_and_no_channels() -> None:
    feat = torch.randn(4, 7, 5, 6)
    found = attention_map(feat)
    assert found.shape == (4, 5, 6) and found.dtype == torch.float32
    assert torch.allclose(found.flatten(1).norm(dim=1), torch.ones(4))
    assert (found >= 0).all() and (found.flatten(1).mean(1) <= 1 / 30**0.5 + 1e-6).all()


def test_maps_do_not_see_scale_sign_or_order_of_channels() -> None:
    feat = torch.randn(2, 7, 5, 6, dtype=torch.float64)
    found = attention_map(feat)
    assert torch.allclose(attention_map(37.5 * feat), found)
    assert torch.allclose(attention_map(-feat), found)
    assert torch.allclose(attention_map(feat[:, torch.randperm(7)]), found)
    assert torch.allclose(attention_map(torch.cat([feat, feat], 1)), found)
    assert not torch.allclose(attention_map(feat.flip(3)), found)
    assert torch.allclose(attention_map(feat.flip(3)), found.flip(2))


def test_distance_runs_from_zero_to_the_root_of_two() -> None:
    left, right = torch.zeros(2, 1, 3, 4, 4)
    left[..., 0], right[..., 3] = 1, 1
    assert map_distance(left, right).tolist() == pytest.approx([2**0.5])
    assert map_distance(left, 5 * left).tolist() == pytest.approx([0], abs=1e-6)


def test_sample_does_not_depend_on_how_images_are_batched() -> None:
    student, teacher = pair(images=6)
    term = AttentionTransfer("sample")
    whole = loss_of(term, student, teacher)
    parts = [
        loss_of(term, [s[i : i + 2] for s in student], [t[i : i + 2] for t in teacher])
        for i in (0, 2, 4)
    ]
    assert whole.item() == pytest.approx(sum(p.item() for p in parts) / 3)
    assert loss_of(AttentionTransfer("notes"), student, teacher).item() != pytest.approx(
        whole.item(), rel=0.1
    )


@pytest.mark.parametrize("images", [4, 16, 64])
def test_notes_falls_as_one_over_the_root_of_the_batch(images: int) -> None:
    student, teacher = pair(images=1)
    term = AttentionTransfer("notes")
    one = loss_of(term, student, teacher).item()
    repeated = [[feat.repeat(images, 1, 1, 1) for feat in feats] for feats in (student, teacher)]
    assert loss_of(term, *repeated).item() == pytest.approx(one / images**0.5)
    for reduction in ("sample", "mean_square"):
        term = AttentionTransfer(reduction)  # type: ignore[arg-type]
        assert loss_of(term, *repeated).item() == pytest.approx(
            loss_of(term, student, teacher).item()
        )


def test_taps_are_summed_and_the_teacher_is_not_touched() -> None:
    student, teacher = pair()
    term = AttentionTransfer("notes")
    each = [loss_of(term, [s], [t]).item() for s, t in zip(student, teacher, strict=True)]
    assert loss_of(term, student, teacher).item() == pytest.approx(sum(each))
    assert not list(term.parameters()) and term.uses == {"feats"}


# --- numbers


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_features_do_not_overflow(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    student, teacher = (300 * torch.rand(2, 512, 4, 4, dtype=torch.float64) for _ in range(2))
    student, teacher = student.to(dtype), teacher.to(dtype)
    assert attention_map(student).dtype == torch.float32
    assert torch.equal(attention_map(student), attention_map(student.float()))
    for reduction in REDUCTIONS:
        feat = student.clone().requires_grad_()
        found = AttentionTransfer(reduction).distance(feat, teacher)
        found.backward()
        plain = AttentionTransfer(reduction).distance(student.double(), teacher.double())
        assert found.item() == pytest.approx(plain.item(), rel=1e-4) and found > 0
        assert feat.grad is not None and feat.grad.isfinite().all()


def test_half_precision_features_do_not_vanish() -> None:
    """1e-4 squared is 0 in float16, and so is eps."""
    feat = torch.full((1, 8, 2, 2), 1e-4, dtype=torch.float16)
    feat[..., 0] = 0
    assert attention_map(feat)[0, :, 1].tolist() == pytest.approx([0.5**0.5] * 2, rel=0.2)


def test_autocast_does_not_lower_the_precision_of_the_maps() -> None:
    student, teacher = pair(dtype=torch.float32)
    plain = loss_of(AttentionTransfer("notes"), student, teacher)
    with torch.autocast("cpu", torch.bfloat16):
        found = loss_of(AttentionTransfer("notes"), student, teacher)
    assert found.dtype == torch.float32 and found.item() == pytest.approx(plain.item(), rel=1e-6)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    "case", ["zeros", "student zero", "teacher zero", "equal", "one image zero"]
)
def test_loss_and_gradient_are_finite_where_a_norm_is_zero(reduction: Any, case: str) -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    if case in ("zeros", "student zero"):
        student = torch.zeros_like(student)
    if case in ("zeros", "teacher zero"):
        teacher = torch.zeros_like(teacher)
    if case == "equal":
        teacher = student.clone()
    if case == "one image zero":
        student[0], teacher[0] = 0, 0
    student.requires_grad_()
    found = AttentionTransfer(reduction).distance(student, teacher)
    found.backward()
    assert found.isfinite() and (found == 0) == (case in ("zeros", "equal"))
    assert student.grad is not None and student.grad.isfinite().all()
