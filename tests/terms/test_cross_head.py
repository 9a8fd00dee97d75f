"""Cross-head distillation against its equation in loops, in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kdmini.contracts import UserError, View
from kdmini.terms.cross_head import CrossHead
from tests.terms.views import (
    Scene,
    altered,
    assert_compiled_is_the_same,
    assert_same_gradients,
    gradients,
    has_no_gradient,
    leaf,
)

NO_TARGETS: Any = {}
CLASSES = 3
BINS = 5
SIZES = [(3, 4), (2, 2)]
SHAPES = {
    f"head.{branch}.{level}.0": (7, width, height, cells)
    for branch, width in (("cv3", 4), ("cv2", 6))
    for level, (height, cells) in enumerate(SIZES)
}


class Teacher(nn.Module):
    """Of its head, two branches at two levels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.head = nn.ModuleDict({"cv3": branches(4, CLASSES), "cv2": branches(6, 4 * BINS)})
        self.requires_grad_(False)


def branches(width: int, out: int) -> nn.ModuleList:
    return nn.ModuleList(
        nn.Sequential(nn.Conv2d(2, width, 1), nn.Conv2d(width, width, 1), nn.Conv2d(width, out, 1))
        for _ in SIZES
    )


def make_term(**settings: Any) -> CrossHead:
    return CrossHead(SHAPES, Teacher().double(), **settings)


def random_scene(dtype: torch.dtype = torch.float64, size: float = 1.0) -> Scene:
    generator = torch.Generator().manual_seed(0)

    def view() -> View:
        feats = {}
        for tap, (_, *shape) in SHAPES.items():
            feats[tap] = leaf(tuple(shape), generator, dtype, size)
        return View(feats, None, torch.empty(0))

    return Scene(view(), view())


def value_of(term: Any, scene: Scene) -> Tensor:
    return term(scene.student, scene.teacher, NO_TARGETS)


def plain(scene: Scene, gamma: float) -> Any:
    """Cell by cell, the branch as matrices."""
    head = Teacher().double().head

    def logits(view: View, branch: str, level: int, n: int, y: int, x: int) -> Tensor:
        cell = view.feats[f"head.{branch}.{level}.0"][n, :, y, x]
        for conv in list(head[branch][level])[1:]:
            cell = conv.weight[:, :, 0, 0] @ cell + conv.bias
        return cell

    total: Any = 0
    whole = 0.0
    for level, (height, width) in enumerate(SIZES):
        for n in range(len(scene.student.feats["head.cv3.0.0"])):
            for y in range(height):
                for x in range(width):
                    place = (level, n, y, x)
                    p = 1 / (1 + (-logits(scene.teacher, "cv3", *place).detach()).exp())
                    q = 1 / (1 + (-logits(scene.student, "cv3", *place)).exp())
                    entropy = -p * q.log() - (1 - p) * (1 - q).log()
                    total += ((p - q).abs() ** gamma * entropy).sum()
                    w = max(p.tolist())
                    whole += w
                    t = logits(scene.teacher, "cv2", *place).detach().view(4, BINS).softmax(1)
                    s = logits(scene.student, "cv2", *place).view(4, BINS).softmax(1)
                    total += w * (t * (t / s).log()).sum() / 4
    return total / whole


@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0])
def test_value_and_gradient_are_those_of_the_equation(gamma: float) -> None:
    ours = random_scene()
    theirs = random_scene()
    value = value_of(make_term(gamma=gamma), ours)
    expected = plain(theirs, gamma)
    value.backward()
    expected.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    assert_same_gradients(ours.student, theirs.student, rtol=1e-9, atol=1e-12)
    assert len(gradients(ours.student)) == len(SHAPES)
    assert has_no_gradient(ours.teacher)


def test_by_sample_it_is_the_mean_over_the_images() -> None:
    term = make_term(reduction="sample")
    scene = random_scene()
    each = []
    for n in range(2):
        one = scene.map(lambda x, n=n: x[n : n + 1])
        each.append(value_of(make_term(), one).item())
    assert value_of(term, scene).item() == pytest.approx(sum(each) / 2, rel=1e-12)
    assert value_of(make_term(), scene).item() != pytest.approx(sum(each) / 2, rel=1e-6)


def test_zero_at_equality() -> None:
    teacher = random_scene().teacher
    same = altered(teacher, torch.clone)
    assert value_of(make_term(), Scene(same, teacher)).item() == 0


def test_half_precision_and_far_features_are_finite() -> None:
    term = CrossHead(SHAPES, Teacher())
    for scene in (random_scene(torch.float16, 300), random_scene(torch.float32, 1e4)):
        with torch.autocast("cpu", torch.float16):
            value = value_of(term, scene)
        value.backward()
        assert value.dtype == torch.float32
        for gradient in gradients(scene.student):
            assert gradient.isfinite().all()


def test_compiled_in_one_graph_it_gives_the_same() -> None:
    assert_compiled_is_the_same(make_term(), value_of, random_scene)


def test_the_layers_of_the_teacher_are_none_of_the_term() -> None:
    assert not [*make_term().parameters()]


@pytest.mark.parametrize(
    ("taps", "reason"),
    [
        (["head.cv3.0"], "no layer of a Sequential"),
        (["head.cv3.0.2"], "the last of its branch"),
        (["head.cv4.0.0"], "no layer of a Sequential"),
        (["head.cv2.0.0"], "those of the classes at least"),
        ([], "those of the classes at least"),
    ],
)
def test_taps_that_are_no_branch_are_refused(taps: list[str], reason: str) -> None:
    shapes = dict.fromkeys(taps, (7, 4, 3, 4))
    with pytest.raises(UserError, match=rf"distill\.taps: .*{reason}"):
        CrossHead(shapes, Teacher())


def test_sides_without_classes_at_their_level_are_refused() -> None:
    taps = ["head.cv3.0.0", "head.cv2.1.0"]
    term = CrossHead({tap: SHAPES[tap] for tap in taps}, Teacher().double())
    student, teacher = random_scene()
    few = [
        view._replace(feats={tap: view.feats[tap] for tap in taps}) for view in (student, teacher)
    ]
    with pytest.raises(UserError, match=r"cv2\.1\.0 has no tap of the classes at its level"):
        value_of(term, Scene(*few))
