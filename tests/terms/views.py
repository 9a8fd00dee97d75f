"""What two networks make of two images, and what their gradients are.

Every map is a leaf of the graph, so that its gradient can be looked at.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kdmini.contracts import View

IMAGES = 2


class Scene(NamedTuple):
    student: View
    teacher: View

    def map(self, change: Callable[[Tensor], Tensor]) -> "Scene":
        """A scene of new leaves."""
        return Scene(altered(self.student, change), altered(self.teacher, change))


def leaf(
    shape: tuple[int, ...],
    generator: torch.Generator,
    dtype: torch.dtype = torch.float64,
    size: float = 1.0,
) -> Tensor:
    """Normal values times `size`, (IMAGES, *shape); the same in every dtype, but for rounding."""
    values = torch.randn(IMAGES, *shape, generator=generator, dtype=torch.float64)
    return (size * values).to(dtype).requires_grad_()


def leaves(view: View) -> list[Tensor]:
    return [*view.feats.values(), *(view.preds or [])]


def gradients(view: View) -> list[Tensor]:
    """Of those leaves that have one."""
    return [x.grad for x in leaves(view) if x.grad is not None]


def has_no_gradient(view: View) -> bool:
    return not gradients(view)


def assert_same_gradients(one: View, other: View, rtol: float = 0.0, atol: float = 0.0) -> None:
    """On the same leaves, and of the same values: bit for bit, if no bound is given."""
    for a, b in zip(leaves(one), leaves(other), strict=True):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=rtol, atol=atol)


def assert_compiled_is_the_same(
    term: nn.Module,
    value_of: Callable[[Any, Scene], Tensor],
    make_scene: Callable[[], Scene],
) -> None:
    """In one graph; value and gradient bit for bit."""
    torch._dynamo.reset()
    compiled_term = torch.compile(term, backend="eager", fullgraph=True)
    scene = make_scene()
    other = make_scene()
    value = value_of(term, scene)
    compiled = value_of(compiled_term, other)
    value.backward()
    compiled.backward()
    assert torch.equal(value, compiled)
    assert_same_gradients(scene.student, other.student)


# --- other views


def altered(view: View, change: Callable[[Tensor], Tensor]) -> View:
    """A view of new leaves."""

    def new(x: Tensor) -> Tensor:
        return change(x.detach()).requires_grad_()

    feats = {tap: new(feat) for tap, feat in view.feats.items()}
    if view.preds is None:
        return View(feats, None, view.images)
    preds = [new(pred) for pred in view.preds]
    assert view.classes
    classes = [pred[:, -level.shape[1] :] for pred, level in zip(preds, view.classes, strict=True)]
    return View(feats, preds, view.images, classes)


def edge_case(scene: Scene, case: str, far: float) -> Scene:
    """The scene, one or both of its views replaced by what is hard to compute with.

    far: factor of maps that are far apart, the student's with the other sign.
    """
    student, teacher = scene
    if case in ("zeros", "student zero"):
        student = altered(student, torch.zeros_like)
    if case in ("zeros", "teacher zero"):
        teacher = altered(teacher, torch.zeros_like)
    if case == "equal":
        student = altered(teacher, torch.clone)
    if case == "constant channel":
        student = altered(student, with_constant_channel)
    if case == "flat":
        return scene.map(flat)
    if case == "nearly flat":
        return scene.map(nearly_flat)
    if case == "far":
        student = altered(student, lambda x: -far * x)
        teacher = altered(teacher, lambda x: far * x)
    return Scene(student, teacher)


def with_constant_channel(x: Tensor) -> Tensor:
    x = x.clone()
    x[:, 0] = 1
    return x


def flat(x: Tensor) -> Tensor:
    return x.mean((2, 3), keepdim=True) + 0 * x


def nearly_flat(x: Tensor) -> Tensor:
    return 3 + 1e-6 * x
