"""FRSKD: the pyramid and its losses against the equations, and who gets a gradient."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kdmini.contracts import Targets, UserError, View
from kdmini.terms.self_teacher import SelfTeacher
from tests.commands import assert_equal
from tests.terms.self_teacher_equation import (
    SHAPES,
    SHARES,
    SIDES,
    make_student,
    make_targets,
    make_term,
    plain_attention,
    plain_refine,
    plain_soft,
    random_view,
)
from tests.terms.views import (
    altered,
    assert_same_gradients,
    gradients,
    has_no_gradient,
    leaves,
)

GAINS = {"box": 7.0, "cls": 0.6, "dfl": 1.1}


@pytest.mark.parametrize("first_share", [0.5, -0.3])
def test_value_is_that_of_the_equations_and_the_task_loss_that_of_the_detector(
    first_share: float,
) -> None:
    shares = (first_share, *SHARES[1:])
    weights = {"attention": 3.0, "soft": 0.7, "temperature": 2.0}
    term = make_term(shares=shares, **weights, **GAINS).double()
    student = random_view(0)
    feats = list(student.feats.values())
    value = term(student, None, make_targets())

    refined = plain_refine(term.refine, feats)
    preds = term.head(refined)
    losses = make_student(**GAINS).loss(preds, make_targets())
    expected: Any = sum(losses.values())
    for s, t in zip(feats, refined, strict=True):
        expected += 3 * plain_attention(s, t)
    expected += 0.7 * plain_soft(student.preds, preds, 2.0)
    assert value.ndim == 0
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    for own, plain in zip(term.refine(feats), refined, strict=True):
        assert torch.allclose(own, plain, rtol=1e-9)


def test_the_gains_are_the_students_where_none_are_set() -> None:
    preds = random_view(0).preds

    def task(term: SelfTeacher) -> float:
        return term.task(preds, make_targets()).item()

    expected = pytest.approx(task(make_term(make_student(**GAINS))))
    assert task(make_term(**GAINS)) == expected
    assert task(make_term()) != expected


def test_the_imitation_is_zero_at_equality_and_so_is_its_gradient() -> None:
    own = random_view(1)
    same = altered(own, torch.clone)
    value = make_term().imitation(same, own, make_targets())
    value.backward()
    assert abs(value.item()) < 1e-12
    for gradient in gradients(same):
        assert gradient.abs().max() < 1e-12


# --- who gets a gradient


def test_the_student_is_no_part_of_the_self_teacher() -> None:
    student = make_student()
    term = make_term(student)
    assert all(module is not student for module in term.modules())
    rooms = {key.split(".")[0] for key in term.state_dict()}
    assert rooms == {"refine", "head"}


def test_the_student_imitates_and_the_self_teacher_does_not() -> None:
    student = random_view(0)
    own = random_view(1)
    make_term().imitation(student, own, make_targets()).backward()
    assert has_no_gradient(own)
    for feat in student.feats.values():
        assert feat.grad is not None
        assert feat.grad.any()
    for pred in student.preds:
        assert not pred.grad[:, :SIDES].any()
        assert pred.grad[:, SIDES:].any()


def test_the_self_teacher_learns_from_its_task_alone_and_all_of_it_does() -> None:
    learnt = []
    for weight in (0.0, 5.0):
        term = make_term(attention=weight, soft=weight).double()
        term(random_view(0), None, make_targets()).backward()
        by_name = {}
        for name, parameter in term.named_parameters():
            if parameter.requires_grad:
                by_name[name] = parameter.grad
        learnt.append(by_name)
    assert_equal(*learnt)
    for name, gradient in learnt[0].items():
        assert gradient is not None, name
        assert gradient.any(), name


def test_the_task_of_the_self_teacher_reaches_the_features_of_the_student_and_not_its_head() -> (
    None
):
    student = random_view(0)
    term = make_term(attention=0.0, soft=0.0).double()
    term(student, None, make_targets()).backward()
    for feat in student.feats.values():
        assert feat.grad is not None
        assert feat.grad.any()
    for pred in student.preds:
        assert pred.grad is None or not pred.grad.any()


# --- numbers


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_finite_and_near(dtype: torch.dtype) -> None:
    term = make_term()
    student = random_view(0, dtype)
    feats = {tap: feat.float() for tap, feat in student.feats.items()}
    expected = term(student._replace(feats=feats), None, make_targets())
    with torch.autocast("cpu", dtype):
        value = term(student, None, make_targets())
    value.backward()

    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(expected.item(), rel=0.03)
    for x in [*leaves(student), *term.refine.parameters()]:
        assert x.grad is not None
        assert x.grad.isfinite().all()


def test_without_objects_it_is_finite_and_the_boxes_are_not_taught() -> None:
    term = make_term(attention=0.0, soft=0.0)
    student = random_view(0, torch.float32)
    term(student, None, make_targets(objects=0)).backward()
    for parameter in term.head.cv2.parameters():
        assert parameter.grad is None or not parameter.grad.any()
    for feat in student.feats.values():
        assert feat.grad is not None
        assert feat.grad.isfinite().all()


def test_compiled_in_one_graph_it_gives_the_same_and_other_images_are_not_compiled_anew() -> None:
    torch._dynamo.reset()
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    term = make_term()
    compiled_term = torch.compile(term, backend=backend, fullgraph=True, dynamic=False)
    for ids in (["a", "b"], ["c", "d"]):
        targets: Targets = {**make_targets(), "ids": ids}
        one = random_view(0, torch.float32)
        other = random_view(0, torch.float32)
        value = term(one, None, targets)
        compiled = compiled_term(other, None, targets)
        value.backward()
        compiled.backward()
        assert torch.equal(value, compiled)
        assert_same_gradients(one, other)
    assert len(graphs) == 1


# --- settings


class Headless:
    """A student that offers no head."""

    def loss(self, preds: Any, targets: Any) -> dict[str, Tensor]:
        return {}


def of_shapes(**shapes: tuple[int, int, int, int]) -> SelfTeacher:
    return SelfTeacher(shapes, make_student())


@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda: make_term(width=7), "width is 7; use 1 to 6"),
        (lambda: of_shapes(), "needs three, .* these are 0"),
        (lambda: of_shapes(**SHAPES, more=(4, 4, 1, 1)), "these are 4"),
        (lambda: make_term(Headless()), r"method make_head\(channels\); Headless has none"),
        (lambda: make_term(make_student(cls=0.0), cls=0.6), "cls is 0.6, and YOLO11"),
    ],
)
def test_wrong_settings_are_refused_by_name(wrong: Callable[[], Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        wrong()


def test_maps_that_are_not_the_students_own_or_of_other_strides_are_refused_by_name() -> None:
    term = make_term().double()
    student = random_view(0)

    def with_feats(change: Callable[[Tensor], Tensor]) -> View:
        feats = {tap: change(feat) for tap, feat in student.feats.items()}
        return student._replace(feats=feats)

    aligned = with_feats(lambda x: x.repeat(1, 2, 1, 1))
    message = r"distill\.align: fine comes with 12 channels and has 6; use `none`"
    with pytest.raises(UserError, match=message):
        term(aligned, None, make_targets())

    small = with_feats(lambda x: x[:, :, ::2, ::2])
    message = r"distill\.taps: fine is 4x4 and the class map 8x8"
    with pytest.raises(UserError, match=message):
        term(small, None, make_targets())
