"""Affinity distillation against its equation in loops, in float64, and its edges."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kdmini.contracts import UserError, View
from kdmini.terms.affinity import AffinityDistillation
from kdmini.terms.graphs import pooling
from tests.terms.affinity_equation import (
    GRID,
    MAPS,
    SIZE,
    TARGETS,
    Settings,
    plain,
    plain_weights,
    plain_without_eigenvectors,
)
from tests.terms.views import (
    IMAGES,
    Scene,
    altered,
    assert_compiled_is_the_same,
    assert_same_gradients,
    edge_case,
    gradients,
    has_no_gradient,
    leaf,
)


def make(**settings: Any) -> AffinityDistillation:
    return AffinityDistillation(GRID, **Settings(**settings)._asdict())


def value_of(term: Any, scene: Scene) -> Tensor:
    return term(*scene, TARGETS)


def weights_of(term: AffinityDistillation, targets: Any, images: Tensor) -> Tensor:
    return term.weights(term.regions(targets, images))


def random_scene(dtype: torch.dtype = torch.float64, seed: int = 0, size: float = 1.0) -> Scene:
    generator = torch.Generator().manual_seed(seed)

    def view() -> View:
        feats = {}
        for tap, shape in MAPS.items():
            feats[tap] = leaf(shape, generator, dtype, size)
        return View(feats, None, torch.empty(IMAGES, 3, *SIZE))

    return Scene(view(), view())


def with_labels(*labels: list[int]) -> Any:
    """The boxes of TARGETS with other labels, an image each."""
    return {**TARGETS, "labels": torch.tensor(labels)}


# --- the equation


def assert_agree(
    term: AffinityDistillation,
    written_out: Callable[[Scene], Any],
    make_scene: Callable[[], Scene] = random_scene,
) -> None:
    """Value and gradient of the term are those of the form that is written out."""
    ours = make_scene()
    theirs = make_scene()
    value = value_of(term, ours)
    expected = written_out(theirs)
    value.backward()
    expected.backward()

    assert value.ndim == 0
    assert value > 1e-3
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    assert len(gradients(ours.student)) == len(MAPS)
    for gradient in gradients(ours.student):
        assert gradient.abs().max() > 1e-5
    assert_same_gradients(ours.student, theirs.student, rtol=1e-5, atol=1e-8)
    assert has_no_gradient(ours.teacher)


@pytest.mark.parametrize(
    "settings",
    [
        Settings(4, 1.0, 0.25, 0.25),
        Settings(8, 0.0, 1.0, 1.0),
        Settings(1, 3.0, 0.1, 0.5),
    ],
)
def test_value_and_gradient_are_those_of_the_equation(settings: Settings) -> None:
    term = make(**settings._asdict())
    assert_agree(term, lambda scene: plain(scene, settings))


def test_it_is_a_function_of_the_graph_and_not_of_the_eigenvectors_that_are_found() -> None:
    term = make(rank=8, emphasis=2.0)
    assert_agree(term, lambda scene: plain_without_eigenvectors(scene, 0.25, 0.25))


def test_equal_eigenvalues_change_nothing_and_leave_the_gradient_finite() -> None:
    """A teacher that sees three stripes: its graph has one eigenvalue twice, and 0 seven times."""
    stripes = torch.zeros(IMAGES, 3, 3, 3, dtype=torch.float64)
    for i in range(3):
        stripes[:, i, :, i] = 1
    term = make(rank=8, emphasis=2.0)

    def striped_teacher() -> Scene:
        student, teacher = random_scene()
        six_channels = stripes.repeat_interleave(2, 1)
        return Scene(student, altered(teacher, lambda x: six_channels.clone()))

    eigenvalues = torch.linalg.eigvalsh(term.graph(stripes)[0])
    assert len(eigenvalues.round(decimals=9).unique()) == 2
    assert_agree(term, lambda scene: plain_without_eigenvectors(scene, 0.25, 0.25), striped_teacher)


# --- its parts


def test_graph_has_a_spectrum_of_0_to_1_and_nothing_along_the_degrees() -> None:
    for feat in random_scene().student.feats.values():
        graph = make().graph(feat)
        eigenvalues, eigenvectors = torch.linalg.eigh(graph)
        assert torch.allclose(graph, graph.mT)
        assert eigenvalues.min() > -1e-12
        assert 0.1 < eigenvalues.max() < 1
        # with u u^T, the graph has u, the roots of the degrees, with eigenvalue 1 and else
        # the same; its entries are then positive
        u = eigenvectors[:, :, :1]  # (N, P, 1)
        assert eigenvalues[:, 0].abs().max() < 1e-12
        assert (graph + u @ u.mT > 0).all()


def test_rank_and_emphasis_keep_what_is_large_in_the_teachers_graph() -> None:
    feat = random_scene().teacher.feats["even"]
    graph = make().graph(feat)[None]
    largest = torch.linalg.eigvalsh(graph)[..., -3:]
    for emphasis in (0.0, 1.0, 3.0):
        basis = make(rank=3, emphasis=emphasis).leading(graph)
        assert basis.shape == (1, IMAGES, 9, 3)
        assert not basis.requires_grad
        assert torch.allclose(basis.square().sum(2), largest**emphasis)  # squared lengths
        seen = basis.mT @ graph @ basis
        assert torch.allclose(seen, torch.diag_embed(largest ** (1 + emphasis)))


def test_boxes_weigh_the_positions_that_they_cover() -> None:
    images = torch.empty(IMAGES, 3, *SIZE)
    weights = weights_of(make(), TARGETS, images)
    expected = torch.tensor([plain_weights(n, 0.25) for n in range(IMAGES)])
    assert torch.allclose(weights, expected)
    assert weights.min() >= 0.25
    assert weights[1].max() < weights[0].max() < 1

    whole_image = with_labels([-1, -1, 0], [-1, -1, -1])
    weights = weights_of(make(), whole_image, images)
    assert (weights[0] == 1).all()
    assert (weights[1] == 0.25).all()

    no_objects = with_labels([-1, -1, -1], [-1, -1, -1])
    assert (weights_of(make(), no_objects, images) == 0.25).all()

    even = weights_of(make(background=1.0), TARGETS, images)
    assert (even == 1).all()


def test_an_error_in_the_object_costs_the_more_the_less_the_background_counts() -> None:
    """The same error, in the box and, mirrored, beside it."""
    teacher = random_scene().teacher
    right = teacher.feats["even"].detach()
    wrong = right.clone()
    wrong[..., :2] = leaf((4, 6, 2), torch.Generator().manual_seed(1)).detach()
    left_third = {
        "boxes_xyxy": torch.tensor([[[0.0, 0.0, 22.0, 32.0]]] * IMAGES),
        "labels": torch.zeros(IMAGES, 1, dtype=torch.int64),
    }

    def value(background: float, student: Tensor, teacher: Tensor) -> float:
        images = torch.empty(IMAGES, 3, *SIZE)
        views = [View({"even": feat}, None, images) for feat in (student, teacher)]
        return make(rank=8, background=background)(*views, left_third).item()

    ratios = []
    for background in (0.1, 0.5, 1.0):
        in_the_box = value(background, wrong, right)
        beside_it = value(background, wrong.flip(3), right.flip(3))
        ratios.append(in_the_box / beside_it)
    assert ratios[0] > 1.2 * ratios[1] > 1.2
    assert ratios[2] == pytest.approx(1)  # without weights all places are alike


@pytest.mark.parametrize("size", [2, 3, 4, 5, 20, 80])
def test_pooling_is_the_mean_of_equal_parts(size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 1, size, generator=generator, dtype=torch.float64)
    pooled = x @ pooling(size, GRID, x)
    fine = x.repeat_interleave(GRID, 2)  # of which each part has whole cells
    assert torch.allclose(pooled, fine.view(1, 1, GRID, size).mean(3))


def test_zero_at_equality_and_so_is_the_gradient() -> None:
    teacher = random_scene().teacher
    same = altered(teacher, torch.clone)
    value = value_of(make(), Scene(same, teacher))
    value.backward()
    assert value == 0
    assert len(gradients(same)) == len(MAPS)
    for gradient in gradients(same):
        assert gradient.abs().max() == 0


def test_the_channels_do_not_matter_only_who_is_like_whom() -> None:
    """Rotated, scaled and moved, and of another number: the same graph."""
    scene = random_scene()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(9, 9, generator=generator).double()
    rotation, _ = torch.linalg.qr(noise)

    def turn(x: Tensor) -> Tensor:
        channels = x.shape[1]
        turned = torch.einsum("oc,nchw->nohw", rotation[:, :channels], x)
        return 7 * turned + 5

    student = altered(scene.teacher, turn)
    assert student.feats["even"].shape[1] == 9
    assert value_of(make(), Scene(student, scene.teacher)) < 1e-8
    assert value_of(make(), scene) > 1e-8


# --- numbers


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype, autocast: bool) -> None:
    """Features of 300, whose squares float16 cannot hold.

    Autocast would run the matrix products in half precision.
    """
    half = random_scene(dtype, size=300)
    full = half.map(torch.Tensor.float)
    with torch.autocast("cpu", dtype, enabled=autocast):
        value = value_of(make(), half)
    value.backward()

    expected = value_of(make(), full).item()
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(expected, rel=1e-5)
    assert len(gradients(half.student)) == len(MAPS)
    for gradient in gradients(half.student):
        assert gradient.isfinite().all()
        assert gradient.abs().max() > 0


CASES = ["zeros", "student zero", "teacher zero", "flat", "nearly flat", "far"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("temperature", [0.01, 0.25, 10.0])
def test_value_and_gradient_are_finite_at_the_edges(case: str, temperature: float) -> None:
    scene = edge_case(random_scene(torch.float32), case, far=1e6)
    value = value_of(make(temperature=temperature), scene)
    value.backward()
    assert 0 <= value <= len(MAPS)
    assert (value > 1e-6) == (case in ("student zero", "far"))
    assert len(gradients(scene.student)) == len(MAPS)
    for gradient in gradients(scene.student):
        assert gradient.abs().max() < 1e4


@pytest.mark.parametrize("who", [0, 1])
def test_a_map_that_is_not_finite_gives_nan_and_stops_nothing(who: int) -> None:
    scene = random_scene()
    with torch.no_grad():
        scene[who].feats["even"][0, 0, 0, 0] = math.inf
    assert value_of(make(), scene).isnan()


def test_compiled_in_one_graph_it_gives_the_same() -> None:
    assert_compiled_is_the_same(make(), value_of, random_scene)


# --- settings


def test_more_eigenvectors_than_there_are_are_refused() -> None:
    with pytest.raises(UserError, match=r"rank is 9, .* of 8"):
        AffinityDistillation(grid=3, rank=9)


def test_it_asks_for_taps() -> None:
    nothing = View({}, None, torch.empty(IMAGES, 3, *SIZE))
    with pytest.raises(UserError, match=r"distill\.taps"):
        value_of(make(), Scene(nothing, nothing))
