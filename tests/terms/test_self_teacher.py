"""FRSKD's losses against the equations, for three tasks, and who gets a gradient."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdmini.contracts import Targets, UserError, View
from kdmini.terms.imitations import margin
from kdmini.terms.self_teacher import SelfTeacher
from tests.commands import assert_equal
from tests.terms.self_teacher_equation import (
    ODD,
    PLAIN,
    SHAPES,
    SIDES,
    Sorter,
    class_targets,
    class_view,
    make_segmenter,
    make_student,
    make_targets,
    make_term,
    mask_targets,
    mask_view,
    plain_refine,
    plain_sigmoid_kl,
    plain_softmax_kl,
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


class Task(NamedTuple):
    student: Callable[[], Any]
    view: Callable[[int], View]
    targets: Callable[[], Targets]
    shapes: Any
    form: str
    plain_kl: Callable[..., Any]


TASKS = {
    "boxes": Task(make_student, random_view, make_targets, SHAPES, "sigmoid", plain_sigmoid_kl),
    "masks": Task(make_segmenter, mask_view, mask_targets, SHAPES, "softmax", plain_softmax_kl),
    "classes": Task(Sorter, class_view, class_targets, ODD, "softmax", plain_softmax_kl),
}


def plain_task(name: str, student: Any, preds: Any, targets: Targets) -> Any:
    """The loss of the student's task: of boxes its own, else the cross-entropy in a loop."""
    if name == "boxes":
        losses: Any = student.loss(preds, targets)
        return sum(losses.values())
    if name == "classes":
        rows = [(preds[n], int(targets["labels"][n])) for n in range(len(preds))]
        return sum(cross_entropy(*row) for row in rows) / len(rows)
    total: Any = 0
    mask = targets["mask"]
    logits = F.interpolate(preds[0], mask.shape[1:], mode="bilinear", align_corners=False)
    for n, i, j in (mask != 255).nonzero().tolist():
        total = total + cross_entropy(logits[n, :, i, j], int(mask[n, i, j]))
    return total / mask.numel()


def cross_entropy(logits: Tensor, label: int) -> Tensor:
    return logits.exp().sum().log() - logits[label]


@pytest.mark.parametrize("imitate", PLAIN)
@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("settings", [{}, {"times": 1.5, "layers": 2}])
def test_the_value_is_that_of_the_equations(name: str, imitate: str, settings: Any) -> None:
    task = TASKS[name]
    student = task.student()
    weights = {"alpha": 0.7, "beta": 3.0, "temperature": 2.0}
    term = make_term(
        student, shapes=task.shapes, imitate=imitate, form=task.form, **weights, **settings
    ).double()
    view = task.view(0)
    value = term(view, None, task.targets())

    feats = list(view.feats.values())
    raw = plain_refine(term.refine, feats)
    preds = term.head([x.clamp(min=0) for x in raw])
    expected = plain_task(name, student, preds, task.targets())
    expected = expected + 3 * PLAIN[imitate](term, feats, raw)
    expected = expected + 0.7 * task.plain_kl(view.classes, term.class_maps(preds), 2.0)
    assert value.ndim == 0
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)


def test_margins_follow_the_norm_and_are_finite_where_next_to_nothing_is_below_zero() -> None:
    norm = nn.BatchNorm2d(5)
    untrained = margin(norm)
    assert untrained.tolist() == pytest.approx([-0.7979] * 5, abs=1e-4)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, -2.0, 0.0, 0.1, 1.0]))
        norm.bias.copy_(torch.tensor([0.5, -1.0, 0.0, 20.0, -9.0]))
    values = margin(norm)
    # of the last all is below 0
    expected = [-0.6411, -2.0183, 0.0, 0.0, -9.0]
    assert values.tolist() == pytest.approx(expected, abs=1e-3)
    assert not values.requires_grad


def test_the_gains_are_the_students_where_none_are_set() -> None:
    preds = random_view(0).preds

    def task(term: SelfTeacher) -> float:
        return term.task(preds, make_targets()).item()

    expected = pytest.approx(task(make_term(make_student(**GAINS))))
    assert task(make_term(**GAINS)) == expected
    assert task(make_term()) != expected


def test_the_imitation_is_zero_at_equality_and_so_is_its_gradient() -> None:
    own = random_view(1)
    feats = {tap: x.detach().relu().requires_grad_() for tap, x in own.feats.items()}
    same = altered(own, torch.clone)._replace(feats=feats)
    value = make_term(times=1.0).imitation(same, own, make_targets())
    value.backward()
    assert abs(value.item()) < 1e-12
    for gradient in gradients(same):
        assert gradient.abs().max() < 1e-12


@pytest.mark.parametrize("imitate", PLAIN)
def test_two_halves_of_a_batch_make_the_whole(imitate: str) -> None:
    """With statistics that are frozen."""
    term = make_term(imitate=imitate, times=1.0, reduction="sample").double().eval()
    student = random_view(0)
    own = random_view(1)

    def part(view: View, images: slice) -> View:
        feats = {tap: feat[images] for tap, feat in view.feats.items()}
        assert view.classes
        return View(feats, None, view.images, [level[images] for level in view.classes])

    def value(images: slice) -> float:
        return term.imitation(part(student, images), part(own, images), {}).item()

    halves = [value(slice(1)), value(slice(1, 2))]
    assert value(slice(2)) == pytest.approx(sum(halves) / 2)
    assert halves[0] != pytest.approx(halves[1], rel=1e-3)


# --- who gets a gradient


def test_the_student_is_no_part_of_the_self_teacher() -> None:
    student = make_student()
    term = make_term(student, imitate="fitnet")
    assert all(module is not student for module in term.modules())
    rooms = {key.split(".")[0] for key in term.state_dict()}
    assert rooms == {"refine", "head", "imitate"}


@pytest.mark.parametrize("imitate", PLAIN)
def test_the_student_imitates_and_the_self_teacher_does_not(imitate: str) -> None:
    student = random_view(0)
    own = random_view(1)
    term = make_term(imitate=imitate, times=1.0).double()
    term.imitation(student, own, make_targets()).backward()
    assert has_no_gradient(own)
    for parameter in [*term.refine.parameters(), *term.head.parameters()]:
        assert parameter.grad is None
    for parameter in term.imitate.parameters():
        assert parameter.grad is not None
        assert parameter.grad.any()
    for feat in student.feats.values():
        assert feat.grad is not None
        assert feat.grad.any()
    for pred in student.preds:
        assert not pred.grad[:, :SIDES].any()
        assert pred.grad[:, SIDES:].any()


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("imitate", PLAIN)
def test_the_self_teacher_learns_from_its_task_alone_and_all_of_it_does(
    name: str, imitate: str
) -> None:
    task = TASKS[name]
    learnt = []
    for weight in (0.0, 5.0):
        settings: Any = {"shapes": task.shapes, "form": task.form, "imitate": imitate}
        term = make_term(task.student(), alpha=weight, beta=weight, **settings).double()
        term(task.view(0), None, task.targets()).backward()
        by_name = {}
        for key, parameter in term.named_parameters():
            if parameter.requires_grad and not key.startswith("imitate."):
                by_name[key] = parameter.grad
        learnt.append(by_name)
    assert_equal(*learnt)
    for key, gradient in learnt[0].items():
        assert gradient is not None, key
        assert gradient.any(), key


def test_the_task_of_the_self_teacher_reaches_the_features_of_the_student_and_not_its_head() -> (
    None
):
    student = random_view(0)
    term = make_term(alpha=0.0, beta=0.0).double()
    term(student, None, make_targets()).backward()
    for feat in student.feats.values():
        assert feat.grad is not None
        assert feat.grad.any()
    for pred in student.preds:
        assert pred.grad is None or not pred.grad.any()


# --- numbers


@pytest.mark.parametrize("imitate", PLAIN)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_finite_and_near(dtype: torch.dtype, imitate: str) -> None:
    term = make_term(imitate=imitate, beta=1.0)
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
    term = make_term(alpha=0.0, beta=0.0)
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

    term = make_term(imitate="overhaul", layers=2)
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


def of_sizes(*sides: int, student: Any = None) -> SelfTeacher:
    shapes = {f"tap {number}": (4, 4, side, side) for number, side in enumerate(sides)}
    return SelfTeacher(shapes, student or Sorter())


@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda: of_sizes(), "needs 2 to 5 maps, .* these are 0"),
        (lambda: of_sizes(8), "these are 1"),
        (lambda: of_sizes(32, 16, 8, 4, 2, 1), "these are 6"),
        (lambda: of_sizes(9, 4), "tap 1 is 4x4 after tap 0 of 9x9; .* half as large"),
        (lambda: of_sizes(8, 8), "tap 1 is 8x8 after tap 0 of 8x8"),
        (lambda: of_sizes(4, 8), "tap 1 is 8x8 after tap 0 of 4x4"),
        (lambda: of_sizes(8, 4, student=make_student()), "YOLO11 reads three maps.* are 2"),
        (lambda: of_sizes(8, 4, 2, 1, student=make_student()), "YOLO11 reads three maps.* are 4"),
        (lambda: make_term(Headless()), r"method make_head\(channels\); Headless has none"),
        (lambda: make_term(make_student(cls=0.0), cls=0.6), "cls is 0.6, and YOLO11"),
    ],
)
def test_wrong_settings_are_refused_by_name(wrong: Callable[[], Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        wrong()


def test_two_to_five_maps_of_any_size_are_taken() -> None:
    for sides in [(5, 3), (8, 4, 2, 1), (33, 17, 9, 5, 3)]:
        assert len(of_sizes(*sides).channels) == len(sides)


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
    message = r"distill\.taps: .* class maps of 4x4, 2x2, 1x1, .* own head 8x8, 4x4, 2x2;"
    with pytest.raises(UserError, match=message):
        term(small, None, make_targets())
