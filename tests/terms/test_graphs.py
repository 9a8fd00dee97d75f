"""Graphs of positions against loops in float64, and affinity distillation from attention."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kdmini.contracts import UserError, View
from kdmini.terms import graphs
from kdmini.terms.affinity import AffinityDistillation
from tests.terms.affinity_equation import features
from tests.terms.views import (
    IMAGES,
    Scene,
    assert_compiled_is_the_same,
    gradients,
    has_no_gradient,
    leaf,
)

GRID = 3
P = GRID**2
SIDE = 12  # of the images
NAMES = ["ground", "cat", "dog"]
MASK = torch.full((IMAGES, SIDE, SIDE), 255, dtype=torch.uint8)
MASK[:, 1:] = 0
MASK[0, 2:9, 1:6] = 1
MASK[0, 5:11, 5:11] = 2  # and in the second image there is nothing
MASKS: Any = {"mask": MASK, "ids": ["one", "two"]}


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def attention(heads: int, queries: int, keys: int, seed: int = 0) -> Tensor:
    """Softmax weights of square maps, sides of which are given."""
    scores = leaf((heads, queries**2, keys**2), rng(seed), size=2.0).detach()
    return scores.softmax(3)


# --- weights


@pytest.mark.parametrize("queries, keys", [(6, 3), (3, 3), (4, 2), (8, 4)])
def test_weights_are_pooled_over_the_parts_of_queries_and_keys(queries: int, keys: int) -> None:
    """As maps of which each cell is cut into so many that every part has whole ones."""
    weights = attention(2, queries, keys)
    fine = weights.view(IMAGES, 2, queries, queries, keys, keys)
    for dim in range(2, 6):
        fine = fine.repeat_interleave(GRID, dim)
    blocks = fine.view(IMAGES, 2, GRID, queries, GRID, queries, GRID, keys, GRID, keys)
    expected = blocks.mean((3, 5, 7, 9)).view(IMAGES, 2, P, P)

    pooled = graphs.pooled(weights, GRID)
    assert torch.allclose(pooled, expected)
    assert torch.allclose(pooled.sum(3), torch.full((), P / keys**2).double())  # as of softmax


def test_a_graph_that_is_of_no_square_map_is_refused() -> None:
    with pytest.raises(UserError, match="a graph of 6 positions is of no square map"):
        graphs.pooled(torch.ones(1, 1, 9, 6), GRID)


def test_affinity_of_weights_is_what_both_pay_each_other_in_the_mean_of_the_heads() -> None:
    """Of weights with signs, as a state-space model has them."""
    weights = leaf((3, P, P), rng()).detach()
    affinity = graphs.symmetric(weights)
    assert torch.allclose(affinity, affinity.mT)
    assert torch.allclose(affinity.mean((1, 2)), torch.ones(()).double())
    for n in range(IMAGES):
        scale = affinity[n, 0, 1] / abs(sum(w[0, 1] + w[1, 0] for w in weights[n]))
        for i in range(P):
            for j in range(P):
                both = abs(sum(w[i, j] + w[j, i] for w in weights[n]))
                assert affinity[n, i, j] == pytest.approx(float(scale * both))


# --- heads


def test_the_heads_that_keep_an_objects_weight_in_it_are_chosen_in_each_image() -> None:
    """One head looks everywhere, one at the object from within, one away from it."""
    inside = torch.tensor([True, True, True, False, False, False, False, False, False])
    same = inside[:, None] == inside[None, :]
    heads = torch.stack([torch.full((P, P), 0.5), same.float(), (~same).float()])
    weights = torch.stack([heads, heads.flip(0)])  # (2, 3, P, P)
    regions = inside.float().expand(IMAGES, 1, P)

    def kept(heads: int, regions: Tensor) -> list[list[bool]]:
        return graphs.of_objects(weights, regions, heads).flatten(2).any(2).tolist()

    assert kept(1, regions) == [[False, True, False], [False, True, False]]
    assert kept(2, regions) == [[True, True, False], [False, True, True]]
    assert kept(9, regions) == [[True] * 3] * 2
    assert kept(1, 0 * regions) == [[True] * 3] * 2  # no objects to choose by


# --- matrices


def test_the_three_matrices_are_those_of_their_definitions() -> None:
    affinity = graphs.similarity(leaf((4, 5, 5), rng()).detach(), GRID, 0.3)
    for n in range(IMAGES):
        a = affinity[n].numpy()
        d = a.sum(1)
        u = np.sqrt(d / d.sum())
        even = np.ones(P) / math.sqrt(P)
        expected = {
            "normalised": a / np.sqrt(np.outer(d, d)) - np.outer(u, u),
            "adjacency": a / d.mean(),
            "laplacian": np.eye(P) - (np.diag(d) - a) / d.mean() - np.outer(even, even),
        }
        for kind, matrix in expected.items():
            assert np.allclose(graphs.matrix_of(affinity, kind)[n], matrix)  # type: ignore
        # the constant vector is left out of the Laplacian's spectrum, and all is below it
        eigenvalues = np.linalg.eigvalsh(expected["laplacian"])
        assert np.allclose(expected["laplacian"] @ even, 0)
        assert eigenvalues.max() < 1


@pytest.mark.parametrize("kind", ["normalised", "laplacian", "adjacency"])
def test_a_position_that_belongs_to_nothing_leaves_all_finite(kind: Any) -> None:
    weights = torch.ones(1, 1, P, P)
    weights[..., 0, :] = 0
    weights[..., 0] = 0
    for values in (weights, torch.zeros(1, 1, P, P)):
        values = values.requires_grad_()
        matrix = graphs.matrix_of(graphs.symmetric(values), kind)
        matrix.square().sum().backward()
        assert matrix.isfinite().all()
        assert values.grad is not None
        assert values.grad.isfinite().all()


# --- query and key


def test_query_and_key_are_one_head_of_attention_over_the_positions() -> None:
    torch.manual_seed(0)
    feat = leaf((4, 6, 6), rng()).detach()
    layer = graphs.QueryKey(4, GRID).double()
    weights = layer(feat)
    assert weights.shape == (IMAGES, 1, P, P)
    for n in range(IMAGES):
        z = [math.sqrt(4) * position for position in features(feat[n])]  # of mean square 1
        for i in range(P):
            query = layer.query.weight @ z[i] + layer.query.bias
            keys = [layer.key.weight @ position for position in z]
            powers = [(query.dot(key) / math.sqrt(4)).exp() for key in keys]
            for j in range(P):
                expected = powers[j] / sum(powers)
                assert weights[n, 0, i, j].item() == pytest.approx(expected.item(), rel=1e-5)


# --- what objects a mask has


def test_classes_of_a_mask_weigh_the_positions_and_ground_and_void_do_not() -> None:
    term = AffinityDistillation(GRID, 4, background=0.25, names=NAMES)
    images = torch.empty(IMAGES, 3, SIDE, SIDE)
    regions = term.regions(MASKS, images)
    assert regions.shape == (IMAGES, 2, P)
    part = SIDE // GRID
    for n in range(IMAGES):
        for label in (1, 2):
            for i in range(GRID):
                for j in range(GRID):
                    rows = slice(i * part, (i + 1) * part)
                    columns = slice(j * part, (j + 1) * part)
                    share = (MASK[n, rows, columns] == label).float().mean()
                    assert regions[n, label - 1, i * GRID + j] == pytest.approx(share.item())
    weights = term.weights(regions)
    assert torch.allclose(weights, 0.25 + 0.75 * regions.amax(1))
    assert (weights[1] == 0.25).all()


def test_a_rectangle_weighs_the_same_as_a_mask_and_as_a_box() -> None:
    term = AffinityDistillation(GRID, 4, names=NAMES)
    mask = torch.zeros(1, SIDE, SIDE, dtype=torch.uint8)
    mask[:, 2:9, 1:6] = 1
    box: Any = {
        "boxes_xyxy": torch.tensor([[[1.0, 2.0, 6.0, 9.0]]]),
        "labels": torch.zeros(1, 1, dtype=torch.int64),
    }
    images = torch.empty(1, 3, SIDE, SIDE)
    by_mask = term.weights(term.regions({"mask": mask}, images))
    by_box = term.weights(term.regions(box, images))
    assert torch.allclose(by_mask, by_box)
    assert by_mask.max() > 0.5


# --- the term

SHAPES = {"map": (4, 2, 6, 6), "block.graph": (4, 2, 9, 9), "plain": (3, 3, 5, 5)}
GRAPHS = {tap: SHAPES[tap] for tap in ("map", "block.graph")}


def scene() -> Scene:
    """A map and state affinities under a teacher's attention, and a pair of maps."""
    generator = rng()
    images = torch.empty(IMAGES, 3, SIDE, SIDE)
    of_student = {"map": leaf((4, 6, 6), generator), "block.graph": leaf((4, P, P), generator)}
    of_teacher = {}
    for tap, (heads, queries, keys) in {"map": (3, 6, 3), "block.graph": (2, 6, 6)}.items():
        of_teacher[tap] = attention(heads, queries, keys).requires_grad_()
    student = View({"plain": leaf((3, 5, 5), generator)}, None, images, graphs=of_student)
    teacher = View({"plain": leaf((3, 5, 5), generator)}, None, images, graphs=of_teacher)
    return Scene(student, teacher)


def make(**settings: Any) -> AffinityDistillation:
    torch.manual_seed(0)
    term = AffinityDistillation(GRID, 5, graphs=GRAPHS, names=NAMES, **settings)
    return term.double()


def value_of(term: Any, scene: Scene) -> Tensor:
    return term(*scene, MASKS)


def plain(scene: Scene, kind: Any, heads: int | None, query_key: Any) -> float:
    """Of positions, weights and matrices as the tests above have found them."""
    total = 0.0
    for tap in SHAPES:
        if tap == "plain":
            pairs = [graphs.similarity(view.feats[tap], GRID, 0.25) for view in scene]
        else:
            ours = scene.student.graphs[tap]  # type: ignore[index]
            weights = graphs.pooled(scene.teacher.graphs[tap], GRID)  # type: ignore[index]
            if heads:
                regions = make().regions(MASKS, scene.student.images).double()
                weights = graphs.of_objects(weights, regions, heads)
            if tap == "block.graph":
                student = graphs.symmetric(graphs.pooled(ours, GRID))
            elif query_key:
                student = graphs.symmetric(query_key(ours))
            else:
                student = graphs.similarity(ours, GRID, 0.25)
            pairs = [student, graphs.symmetric(weights)]
        q_s, q_t = (graphs.matrix_of(pair, kind).detach().numpy() for pair in pairs)
        for n in range(IMAGES):
            v = make().weights(make().regions(MASKS, scene.student.images))[n].double()
            mu, vectors = np.linalg.eigh(q_t[n])
            basis = np.sqrt(v.numpy())[:, None] * vectors[:, -5:] * np.sqrt(mu[-5:].clip(0))
            error = basis.T @ (q_s[n] - q_t[n]) @ basis
            total += (error**2).sum() / ((basis.T @ basis) ** 2).sum() / IMAGES
    return total


@pytest.mark.parametrize("kind", ["normalised", "laplacian", "adjacency"])
@pytest.mark.parametrize("heads", [None, 1])
@pytest.mark.parametrize("student_graph", ["similarity", "query_key"])
def test_value_is_that_of_the_equation_and_the_gradient_reaches_the_student_alone(
    kind: Any, heads: int | None, student_graph: Any
) -> None:
    term = make(matrix=kind, heads=heads, student_graph=student_graph)
    both = scene()
    value = value_of(term, both)
    value.backward()
    query_key = term.query_keys[0] if student_graph == "query_key" else None
    assert value.item() == pytest.approx(plain(both, kind, heads, query_key), rel=1e-6)

    ours = {**both.student.feats, **(both.student.graphs or {})}
    for tap in SHAPES:
        gradient = ours[tap].grad
        assert gradient is not None
        assert gradient.isfinite().all()
        assert gradient.abs().max() > 1e-6
    assert has_no_gradient(both.teacher)
    assert all(x.grad is None for x in (both.teacher.graphs or {}).values())
    for parameter in term.parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 1e-6


def test_zero_where_the_student_has_the_teachers_weights() -> None:
    weights = attention(3, 6, 3)
    images = torch.empty(IMAGES, 3, SIDE, SIDE)
    student = View({}, None, images, graphs={"block.graph": 5 * weights.clone().requires_grad_()})
    teacher = View({}, None, images, graphs={"block.graph": weights})
    for kind in ("normalised", "laplacian", "adjacency"):
        value = value_of(make(matrix=kind), Scene(student, teacher))
        assert value.item() < 1e-15
    assert gradients(student) == []


def test_a_batch_is_the_mean_of_its_images() -> None:
    """With objects in the one and none in the other, and heads that are chosen by them."""
    term = make(heads=1, student_graph="query_key")
    both = scene()
    whole = value_of(term, both).item()
    parts = []
    for n in range(IMAGES):
        views = []
        for view in both:
            feats = {tap: x[n : n + 1] for tap, x in view.feats.items()}
            of_taps = {tap: x[n : n + 1] for tap, x in (view.graphs or {}).items()}
            views.append(View(feats, None, view.images[n : n + 1], graphs=of_taps))
        parts.append(term(*views, {"mask": MASK[n : n + 1]}).item())
    assert parts[0] != pytest.approx(parts[1])
    assert whole == pytest.approx(sum(parts) / IMAGES, rel=1e-9)


def test_compiled_in_one_graph_it_gives_the_same_from_attention() -> None:
    term = make(heads=1, student_graph="query_key")
    assert_compiled_is_the_same(term, value_of, scene)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    both = scene()

    def cast(change: torch.dtype) -> Scene:
        views = []
        for view in both:
            feats = {tap: x.detach().to(dtype).to(change) for tap, x in view.feats.items()}
            of_taps = {
                tap: x.detach().to(dtype).to(change) for tap, x in (view.graphs or {}).items()
            }
            views.append(View(feats, None, view.images, graphs=of_taps))
        return Scene(*views)

    term = make(student_graph="query_key").float()
    with torch.autocast("cpu", dtype):
        value = value_of(term, cast(dtype))
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(value_of(term, cast(torch.float32)).item(), rel=1e-5)


def test_query_and_key_want_a_map_that_attention_teaches() -> None:
    for of_taps in ({}, {"block.graph": SHAPES["block.graph"]}):
        with pytest.raises(UserError, match=r"distill\.taps: query_key is for a map"):
            AffinityDistillation(GRID, 4, student_graph="query_key", graphs=of_taps)
