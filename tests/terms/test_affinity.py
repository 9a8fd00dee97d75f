"""Affinity distillation against its equation in loops, in float64, and against a form without
eigenvectors.
"""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import train as train_script
from kdmini.contracts import UserError, View
from kdmini.terms.affinity import AffinityDistillation, pooling
from tests.conftest import ROOT
from tests.terms.teaching import SMALL, teach

GRID, SIZE = 3, (32, 64)  # positions a side; height and width of the images
MAPS = {
    "even": (4, 6, 6),
    "uneven": (5, 4, 5),
    "small": (3, 2, 4),
}  # C, H, W; of the last, cells are shared out
CONFIG = ROOT / "configs/terms/affinity.yaml"
TARGETS: Any = {
    "boxes_xyxy": torch.tensor(
        [
            [[5.0, 3.0, 30.0, 20.0], [25.0, 10.0, 60.0, 31.0], [0.0, 0.0, 64.0, 32.0]],
            [[40.0, 0.0, 64.0, 8.0], [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]],
        ]
    ),
    "labels": torch.tensor([[1, 0, -1], [2, -1, -1]]),
    "ids": ["one", "two"],
}
EMPTY: Any = {**TARGETS, "labels": torch.full((2, 3), -1)}


def make(
    rank: int = 4, emphasis: float = 1.0, background: float = 0.25, **settings: Any
) -> AffinityDistillation:
    return AffinityDistillation(GRID, rank, emphasis=emphasis, background=background, **settings)


def scene(
    dtype: torch.dtype = torch.float64, seed: int = 0, size: float = 1.0
) -> tuple[View, View]:
    """Two images, as student and teacher see them."""
    generator = torch.Generator().manual_seed(seed)

    def view() -> View:
        feats = {
            tap: size * torch.randn(2, *shape, generator=generator, dtype=torch.float64)
            for tap, shape in MAPS.items()
        }
        feats = {tap: feat.to(dtype).requires_grad_() for tap, feat in feats.items()}
        return View(feats, None, torch.empty(2, 3, *SIZE))

    return view(), view()


def altered(view: View, change: Callable[[Tensor], Tensor]) -> View:
    return View(
        {tap: change(feat.detach()).requires_grad_() for tap, feat in view.feats.items()},
        None,
        view.images,
    )


def common(a: float, b: float, c: float, d: float) -> float:
    """Length that a..b and c..d have in common."""
    return max(0.0, min(b, d) - max(a, c))


def plain_graph(feat: Tensor, temperature: float) -> list[list[Any]]:
    """(C, H, W) -> A."""
    _, height, width = feat.shape
    cells = []
    for i in range(GRID):
        for j in range(GRID):
            total: Any = 0
            for y in range(height):
                for x in range(width):
                    tall = common(y / height, (y + 1) / height, i / GRID, (i + 1) / GRID)
                    total += (
                        tall
                        * common(x / width, (x + 1) / width, j / GRID, (j + 1) / GRID)
                        * feat[:, y, x]
                    )
            cells.append(total * GRID**2)
    mean = sum(cells) / len(cells)
    units = [(f - mean) / ((f - mean).dot(f - mean) + 1e-6 * len(f)).sqrt() for f in cells]
    w = [[(-(a - b).dot(a - b) / (2 * temperature)).exp() for b in units] for a in units]
    degree = [sum(row) for row in w]
    roots = [(a * b).sqrt() for a in degree for b in degree]
    every = range(len(w))
    return [
        [w[i][j] / roots[i * len(w) + j] - roots[i * len(w) + j] / sum(degree) for j in every]
        for i in every
    ]


def plain_weights(n: int, background: float) -> list[float]:
    height, width = SIZE[0] / GRID, SIZE[1] / GRID
    out = []
    for i in range(GRID):
        for j in range(GRID):
            best = 0.0
            for box, label in zip(
                TARGETS["boxes_xyxy"][n].tolist(), TARGETS["labels"][n].tolist(), strict=True
            ):
                if label >= 0:
                    x1, y1, x2, y2 = box
                    across = common(x1, x2, j * width, (j + 1) * width)
                    best = max(
                        best,
                        across * common(y1, y2, i * height, (i + 1) * height) / (height * width),
                    )
            out.append(background + (1 - background) * best)
    return out


def plain(
    views: tuple[View, View], rank: int, emphasis: float, background: float, temperature: float
) -> Any:
    total: Any = 0
    every = range(GRID**2)
    for tap in MAPS:
        for n in range(2):
            ours, theirs = (plain_graph(view.feats[tap][n], temperature) for view in views)
            matrix = np.array([[entry.item() for entry in row] for row in theirs])
            values, vectors = np.linalg.eigh(
                np.eye(len(matrix)) - matrix
            )  # as of the Laplacian: lowest first
            m = plain_weights(n, background)
            columns = []
            for k in range(rank):
                strength = (1 - values[k]) ** (emphasis / 2)
                columns.append(
                    torch.tensor(
                        [math.sqrt(m[i]) * vectors[i, k] * strength for i in every],
                        dtype=torch.float64,
                    )
                )
            rows = [torch.stack([ours[i][j] - theirs[i][j].item() for j in every]) for i in every]
            gap: Any = 0
            whole = 0.0
            for a in columns:
                for b in columns:
                    gap += sum(a[i] * rows[i].dot(b) for i in every) ** 2
                    whole += float(a.dot(b)) ** 2
            total += gap / whole / 2
    return total


def plain_without_eigenvectors(
    views: tuple[View, View], background: float, temperature: float
) -> Any:
    """Emphasis 2 and all that is not 0: B B^T = m^1/2 A_T^2 m^1/2; powers of the teacher's graph
    say it all.
    """
    total: Any = 0
    for tap in MAPS:
        for n in range(2):
            ours, theirs = (
                torch.stack(
                    [torch.stack(row) for row in plain_graph(view.feats[tap][n], temperature)]
                )
                for view in views
            )
            theirs = theirs.detach()
            root = torch.diag(
                torch.tensor(plain_weights(n, background), dtype=torch.float64).sqrt()
            )
            gap, whole = (
                theirs @ root @ (ours - theirs) @ root @ theirs,
                root @ theirs @ theirs @ root,
            )
            total += gap.square().sum() / whole.square().sum() / 2
    return total


def agree(
    term: Any, expected_of: Callable[[tuple[View, View]], Any], ours: Any, theirs: Any
) -> None:
    found, expected = term(*ours, TARGETS), expected_of(theirs)
    found.backward()
    expected.backward()
    assert (
        found.ndim == 0
        and found.item() == pytest.approx(expected.item(), rel=1e-6)
        and found > 1e-3
    )
    for tap in MAPS:
        mine, other = ours[0].feats[tap].grad, theirs[0].feats[tap].grad
        assert mine.abs().max() > 1e-5 and torch.allclose(mine, other, rtol=1e-5, atol=1e-8)
    assert all(feat.grad is None for feat in ours[1].feats.values())


@pytest.mark.parametrize(
    "rank, emphasis, background, temperature",
    [(4, 1.0, 0.25, 0.25), (8, 0.0, 1.0, 1.0), (1, 3.0, 0.1, 0.5)],
)
def test_value_and_gradient_are_those_of_the_equation(
    rank: int, emphasis: float, background: float, temperature: float
) -> None:
    term = make(rank, emphasis, background, temperature=temperature)
    agree(
        term, lambda views: plain(views, rank, emphasis, background, temperature), scene(), scene()
    )


def test_it_is_a_function_of_the_graph_and_not_of_the_eigenvectors_that_are_found() -> None:
    term = make(rank=8, emphasis=2.0)
    agree(term, lambda views: plain_without_eigenvectors(views, 0.25, 0.25), scene(), scene())


def test_equal_eigenvalues_change_nothing_and_leave_the_gradient_finite() -> None:
    """A teacher that sees three stripes: its graph has one eigenvalue twice, and 0 seven times."""
    stripes = torch.zeros(2, 3, 3, 3, dtype=torch.float64)
    for i in range(3):
        stripes[:, i, :, i] = 1
    term = make(rank=8, emphasis=2.0)

    def views() -> tuple[View, View]:
        student, teacher = scene()
        feats = {tap: stripes.repeat_interleave(2, 1).clone().requires_grad_() for tap in MAPS}
        return student, View(feats, None, teacher.images)

    one, other = views(), views()
    values = torch.linalg.eigvalsh(term.graph(stripes)[0]).round(decimals=9)
    assert len(values.unique()) == 2
    agree(term, lambda v: plain_without_eigenvectors(v, 0.25, 0.25), one, other)


def test_graph_has_a_spectrum_of_0_to_1_and_nothing_along_the_degrees() -> None:
    student, _ = scene()
    for feat in student.feats.values():
        graph = make().graph(feat)
        values, vectors = torch.linalg.eigh(graph)
        assert torch.allclose(graph, graph.mT) and values.min() > -1e-12 and 0.1 < values.max() < 1
        # D^-1/2 W D^-1/2 has the roots of the degrees with eigenvalue 1 and else the same; its
        # entries are positive
        void = vectors[:, :, 0]
        assert torch.allclose(values[:, 0], torch.zeros(2).double(), atol=1e-12)
        assert (graph + void[:, :, None] * void[:, None, :] > 0).all()


def test_rank_and_emphasis_keep_what_is_large_in_the_teachers_graph() -> None:
    _, teacher = scene()
    graph = make().graph(teacher.feats["even"])[None]
    values = torch.linalg.eigvalsh(graph)
    for emphasis in (0.0, 1.0, 3.0):
        basis = make(rank=3, emphasis=emphasis).leading(graph)
        assert basis.shape == (1, 2, 9, 3) and not basis.requires_grad
        assert torch.allclose(
            basis.square().sum(2), values[..., -3:] ** emphasis
        )  # columns of that squared length
        assert torch.allclose(
            basis.mT @ graph @ basis, torch.diag_embed(values[..., -3:] ** (1 + emphasis))
        )


def test_boxes_weigh_the_positions_that_they_cover() -> None:
    images = torch.empty(2, 3, *SIZE)
    found = make().weights(TARGETS, images)
    assert torch.allclose(found, torch.tensor([plain_weights(n, 0.25) for n in range(2)]))
    assert found.min() >= 0.25 and found[1].max() < found[0].max() < 1
    whole: Any = {**TARGETS, "labels": torch.tensor([[-1, -1, 0], [-1, -1, -1]])}
    assert torch.equal(make().weights(whole, images), torch.tensor([[1.0], [0.25]]).expand(2, 9))
    assert torch.equal(make().weights(EMPTY, images), torch.full((2, 9), 0.25))
    assert torch.equal(make(background=1.0).weights(TARGETS, images), torch.ones(2, 9))


def test_an_error_in_the_object_costs_the_more_the_less_the_background_counts() -> None:
    """The same error, in the box and, mirrored, beside it."""
    _, teacher = scene()
    theirs = teacher.feats["even"].detach()
    ours = theirs.clone()
    ours[..., :2] = torch.randn(
        2, 4, 6, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    left: Any = {
        "boxes_xyxy": torch.tensor([[[0.0, 0.0, 22.0, 32.0]]] * 2),
        "labels": torch.zeros(2, 1).long(),
    }

    def value(background: float, mirrored: bool) -> float:
        views = (
            View({"even": x.flip(3) if mirrored else x}, None, teacher.images)
            for x in (ours, theirs)
        )
        return make(rank=8, background=background)(*views, left).item()

    ratios = [
        value(background, mirrored=False) / value(background, mirrored=True)
        for background in (0.1, 0.5, 1.0)
    ]
    assert ratios[0] > 1.2 * ratios[1] > 1.2 and ratios[2] == pytest.approx(
        1
    )  # without weights all places are alike


@pytest.mark.parametrize("size", [2, 3, 4, 5, 20, 80])
def test_pooling_is_the_mean_of_equal_parts(size: int) -> None:
    x = torch.randn(1, 1, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = x @ pooling(size, GRID, x)
    fine = x.repeat_interleave(GRID, 2)  # of which each part has whole cells
    assert torch.allclose(found, fine.view(1, 1, GRID, size).mean(3))


def test_zero_at_equality_and_so_is_the_gradient() -> None:
    _, teacher = scene()
    same = altered(teacher, torch.clone)
    found = make()(same, teacher, TARGETS)
    found.backward()
    assert found == 0
    assert all(feat.grad is not None and feat.grad.abs().max() == 0 for feat in same.feats.values())


def test_the_channels_do_not_matter_only_who_is_like_whom() -> None:
    """Rotated, scaled and moved, and of another number: the same graph."""
    _, teacher = scene()

    def turn(x: Tensor) -> Tensor:
        matrix = torch.linalg.qr(
            torch.randn(9, 9, generator=torch.Generator().manual_seed(0)).double()
        )[0]
        return 7 * torch.einsum("oc,nchw->nohw", matrix[:, : x.shape[1]], x) + 5

    student = altered(teacher, turn)
    assert student.feats["even"].shape[1] != teacher.feats["even"].shape[1]
    assert make()(student, teacher, TARGETS) < 1e-8 < make()(*scene(), TARGETS)


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype, autocast: bool) -> None:
    """Features of 300, whose squares float16 cannot hold; autocast would run the matrix products in
    half precision.
    """
    half = scene(dtype, size=300)
    full = tuple(altered(view, torch.Tensor.float) for view in half)
    with torch.autocast("cpu", dtype, enabled=autocast):
        found = make()(*half, TARGETS)
    found.backward()
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(make()(*full, TARGETS).item(), rel=1e-5)
    grads = [feat.grad for feat in half[0].feats.values()]
    assert all(
        grad is not None and grad.isfinite().all() and grad.abs().max() > 0 for grad in grads
    )


@pytest.mark.parametrize(
    "case", ["zeros", "student zero", "teacher zero", "flat", "nearly flat", "far"]
)
@pytest.mark.parametrize("temperature", [0.01, 0.25, 10.0])
def test_value_and_gradient_are_finite_at_the_edges(case: str, temperature: float) -> None:
    student, teacher = scene(torch.float32)
    if case in ("zeros", "student zero"):
        student = altered(student, torch.zeros_like)
    if case in ("zeros", "teacher zero"):
        teacher = altered(teacher, torch.zeros_like)
    if case == "flat":
        student, teacher = (
            altered(v, lambda x: x.mean((2, 3), keepdim=True) + 0 * x) for v in (student, teacher)
        )
    if case == "nearly flat":
        student, teacher = (altered(v, lambda x: 3 + 1e-6 * x) for v in (student, teacher))
    if case == "far":
        student, teacher = altered(student, lambda x: -1e6 * x), altered(teacher, lambda x: 1e6 * x)
    found = make(temperature=temperature)(student, teacher, TARGETS)
    found.backward()
    assert 0 <= found <= len(MAPS) and (found > 1e-6) == (case in ("student zero", "far"))
    grads = [feat.grad for feat in student.feats.values()]
    assert all(grad is not None and grad.abs().max() < 1e4 for grad in grads)


@pytest.mark.parametrize("who", [0, 1])
def test_a_map_that_is_not_finite_gives_nan_and_stops_nothing(who: int) -> None:
    views = scene()
    with torch.no_grad():
        views[who].feats["even"][0, 0, 0, 0] = math.inf
    assert make()(*views, TARGETS).isnan()


def test_compiled_in_one_graph_it_gives_the_same() -> None:
    torch._dynamo.reset()
    one, other = scene(), scene()
    plain_value = make()(*one, TARGETS)
    compiled = torch.compile(make(), backend="eager", fullgraph=True)(*other, TARGETS)
    plain_value.backward()
    compiled.backward()
    assert torch.equal(plain_value, compiled)
    for tap in MAPS:
        assert torch.equal(one[0].feats[tap].grad, other[0].feats[tap].grad)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "settings, named",
    [
        ({"grid": 1}, "grid is 1"),
        ({"rank": 0}, "rank is 0"),
        ({"grid": 3, "rank": 9}, "rank is 9, .* of 8"),
        ({"temperature": 0.0}, "temperature is 0"),
        ({"emphasis": -1.0}, "emphasis is -1"),
        ({"emphasis": math.nan}, "emphasis is nan"),
        ({"background": 0.0}, "background is 0"),
        ({"background": 1.5}, "background is 1.5"),
    ],
)
def test_wrong_settings_are_refused_by_name(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        AffinityDistillation(**settings)


def test_it_asks_for_taps() -> None:
    with pytest.raises(UserError, match=r"distill\.taps"):
        make()(*2 * [View({}, None, torch.empty(2, 3, *SIZE))], TARGETS)


def test_the_config_teaches_the_student_and_leaves_the_teacher() -> None:
    """The term alone, without the task, on one batch: it falls."""
    targets = {
        "boxes_xyxy": torch.tensor([[[8.0, 8.0, 40.0, 50.0]]] * 4),
        "labels": torch.ones(4, 1).long(),
    }
    losses = teach(CONFIG, 64, targets, steps=12)
    assert losses[-1] < 0.8 * losses[0]


def test_the_config_trains(tmp_path: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = [
        f"data.root={shapes}",
        f"run={tmp_path / 'run'}",
        "device=cpu",
        "data.limit=8",
        "data.imgsz=64",
    ]
    short = ["train.epochs=1", "train.batch=4", "train.val_every=1"]
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(CONFIG), *SMALL, *run, *short])
    train_script.main()
    record = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert record["skipped"] == 0 and math.isfinite(record["affinity"]) and record["affinity"] > 0
