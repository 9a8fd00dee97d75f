"""The distillation terms of kdmini/terms: each against its equation written out in loops, in
float64.
"""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import train as train_script
from kdmini import config
from kdmini.contracts import UserError, View
from kdmini.terms.channelwise import ChannelWise
from kdmini.terms.localisation import LocalisationDistillation
from kdmini.terms.logits import LogitDistillation
from kdmini.terms.masked import MaskedGeneration
from kdmini.terms.pearson import PearsonDistillation
from kdmini.terms.score_weighted import ScoreWeighted
from kdmini.terms.spatial import SpatialImitation
from tests.conftest import ROOT
from tests.terms.teaching import SMALL, teach

NO_TARGETS: Any = {}
BINS, CLASSES = 5, 3
SIZES = [(3, 4), (2, 2)]  # of the two levels, and of the tap at each
CHANNELS = [5, 4]
SHAPES = {f"tap{i}": (7, c, *size) for i, (c, size) in enumerate(zip(CHANNELS, SIZES, strict=True))}


class Scene(NamedTuple):
    """What both networks give for two images: feats and preds of each, two levels."""

    student: View
    teacher: View

    def leaves(self, view: View) -> list[Tensor]:
        return [*view.feats.values(), *view.preds]


def scene(dtype: torch.dtype = torch.float64, seed: int = 0, size: float = 1.0) -> Scene:
    generator = torch.Generator().manual_seed(seed)

    def view() -> View:
        feats = {
            tap: (size * torch.randn(2, c, h, w, generator=generator, dtype=torch.float64))
            .to(dtype)
            .requires_grad_()
            for tap, (_, c, h, w) in SHAPES.items()
        }
        preds = [
            (
                3
                * torch.randn(2, 4 * BINS + CLASSES, h, w, generator=generator, dtype=torch.float64)
            ).to(dtype)
            for h, w in SIZES
        ]
        return View(feats, [pred.requires_grad_() for pred in preds], torch.empty(0))

    return Scene(view(), view())


def altered(view: View, change: Callable[[Tensor], Tensor]) -> View:
    feats = {tap: change(feat.detach()).requires_grad_() for tap, feat in view.feats.items()}
    return View(feats, [change(pred.detach()).requires_grad_() for pred in view.preds], view.images)


# --- the equations, in loops


def softmax(logits: list[Tensor]) -> list[Tensor]:
    total = sum((z.exp() for z in logits), torch.zeros(()))
    return [z.exp() / total for z in logits]


def kl(p: list[Tensor], q: list[Tensor]) -> Any:
    return sum(a * (a / b).log() for a, b in zip(p, q, strict=True))


def cells(s: Scene):
    """(level, image, row, column) of every cell."""
    for level, (h, w) in enumerate(SIZES):
        yield from ((level, n, y, x) for n in range(2) for y in range(h) for x in range(w))


def logits_of(view: View, cell: tuple[int, int, int, int], start: int, count: int) -> list[Tensor]:
    level, n, y, x = cell
    return [view.preds[level][n, start + i, y, x] for i in range(count)]


def sure(s: Scene, cell: tuple[int, int, int, int]) -> float:
    return max(1 / (1 + math.exp(-z.item())) for z in logits_of(s.teacher, cell, 4 * BINS, CLASSES))


def over_cells(s: Scene, value: Callable[[Any], Any], gamma: float = 1.0) -> Any:
    each = [(sure(s, cell) ** gamma, value(cell)) for cell in cells(s)]
    return sum(w * v for w, v in each) / sum(w for w, _ in each)


def plain_logits(s: Scene, temperature: float, gamma: float, form: str) -> Any:
    def value(cell: Any) -> Any:
        t, z = (logits_of(view, cell, 4 * BINS, CLASSES) for view in (s.teacher, s.student))
        if form == "softmax":
            return temperature**2 * kl(
                softmax([a / temperature for a in t]), softmax([a / temperature for a in z])
            )
        p, q = ([1 / (1 + (-a / temperature).exp()) for a in logits] for logits in (t, z))
        return temperature**2 * sum(kl([a, 1 - a], [b, 1 - b]) for a, b in zip(p, q, strict=True))

    return over_cells(s, value, gamma)


def plain_localisation(s: Scene, temperature: float) -> Any:
    def value(cell: Any) -> Any:
        total: Any = 0
        for side in range(4):
            t, z = (logits_of(view, cell, side * BINS, BINS) for view in (s.teacher, s.student))
            total += (
                kl(softmax([a / temperature for a in t]), softmax([a / temperature for a in z])) / 4
            )
        return temperature**2 * total

    return over_cells(s, value)


def plain_channelwise(s: Scene, temperature: float) -> Any:
    total: Any = 0
    for tap, (_, channels, h, w) in SHAPES.items():
        for n in range(2):
            for c in range(channels):
                p, q = (
                    softmax(
                        [
                            view.feats[tap][n, c, y, x] / temperature
                            for y in range(h)
                            for x in range(w)
                        ]
                    )
                    for view in (s.teacher, s.student)
                )
                total += temperature**2 * kl(p, q) / (2 * channels)
    return total


def plain_pearson(s: Scene) -> Any:
    total: Any = 0
    for tap, (_, channels, _, _) in SHAPES.items():
        for c in range(channels):
            a, b = (view.feats[tap][:, c].reshape(-1) for view in (s.student, s.teacher))
            a, b = a - a.sum() / len(a), b - b.sum() / len(b)
            total += (1 - (a * b).sum() / ((a * a).sum() * (b * b).sum()).sqrt()) / channels
    return total


def plain_spatial(s: Scene) -> Any:
    total: Any = 0
    for tap, (_, c, h, w) in SHAPES.items():
        difference = (s.student.feats[tap] - s.teacher.feats[tap]).reshape(-1)
        total += sum(d * d for d in difference) / (2 * c * h * w)
    return total


def plain_score_weighted(s: Scene) -> Any:
    total: Any = 0
    for level, (tap, (_, c, _, _)) in enumerate(SHAPES.items()):
        each = []
        for cell in cells(s):
            _, n, y, x = cell
            if cell[0] == level:
                d = s.student.feats[tap][n, :, y, x] - s.teacher.feats[tap][n, :, y, x]
                each.append((sure(s, cell), sum(e * e for e in d) / c))
        total += sum(w * v for w, v in each) / sum(w for w, _ in each)
    return total


def plain_conv(x: Tensor, layer: Any) -> Tensor:
    """3x3, zeros around."""
    _, _, h, w = x.shape
    wide = torch.zeros(*x.shape[:2], h + 2, w + 2, dtype=x.dtype)
    wide[:, :, 1:-1, 1:-1] = x
    out = layer.bias.view(1, -1, 1, 1)
    for dy in range(3):
        for dx in range(3):
            out = out + torch.einsum(
                "nchw,oc->nohw", wide[:, :, dy : dy + h, dx : dx + w], layer.weight[:, :, dy, dx]
            )
    return out


def plain_masked(s: Scene, term: Any) -> Any:
    total: Any = 0
    for (tap, (_, c, h, w)), (first, _, second) in zip(
        SHAPES.items(), term.generators, strict=True
    ):
        shown = torch.rand(2, 1, h, w, dtype=torch.float64) >= 0.65
        hidden = torch.where(shown, s.student.feats[tap], torch.zeros(()).double())
        made = plain_conv(plain_conv(hidden, first).clamp(min=0), second)
        total += ((made - s.teacher.feats[tap]) ** 2).sum() / (2 * c * h * w)
    return total


def masked(**settings: Any) -> MaskedGeneration:
    torch.manual_seed(11)
    return MaskedGeneration(SHAPES, **settings).double()


MADE = masked()
TERMS: dict[str, tuple[Any, Callable[[Scene], Any]]] = {
    "logits": (LogitDistillation(reg_max=BINS), lambda s: plain_logits(s, 4, 1, "sigmoid")),
    "logits softmax": (
        LogitDistillation("softmax", 2.0, 0.5, BINS),
        lambda s: plain_logits(s, 2, 0.5, "softmax"),
    ),
    "localisation": (LocalisationDistillation(reg_max=BINS), lambda s: plain_localisation(s, 10)),
    "channelwise": (ChannelWise(), lambda s: plain_channelwise(s, 1)),
    "channelwise warm": (ChannelWise(3.0), lambda s: plain_channelwise(s, 3)),
    "pearson": (PearsonDistillation(), plain_pearson),
    "spatial": (SpatialImitation(), plain_spatial),
    "score_weighted": (ScoreWeighted(BINS), plain_score_weighted),
    "masked": (MADE, lambda s: plain_masked(s, MADE)),
}
EQUAL_IS_ZERO = [name for name in TERMS if name != "masked"]


def value_of(term: Any, s: Scene) -> Tensor:
    torch.manual_seed(5)  # of the masks
    return term(s.student, s.teacher, NO_TARGETS)


# --- values and gradients


@pytest.mark.parametrize("name", TERMS)
def test_value_and_gradient_are_those_of_the_equation(name: str) -> None:
    term, plain = TERMS[name]
    ours, theirs = scene(), scene()
    found = value_of(term, ours)
    torch.manual_seed(5)
    expected = plain(theirs)
    found.backward()
    expected.backward()
    loose = 1e-5 if name == "pearson" else 1e-9  # its eps
    assert (
        found.ndim == 0 and found.item() == pytest.approx(expected.item(), rel=loose) and found > 0
    )
    reached = 0
    for mine, other in zip(ours.leaves(ours.student), theirs.leaves(theirs.student), strict=True):
        if other.grad is not None:
            assert mine.grad is not None and torch.allclose(
                mine.grad, other.grad, rtol=loose, atol=loose * 0.1
            )
            reached += int(mine.grad.abs().sum() > 0)
        else:
            assert mine.grad is None
    assert reached == len(SIZES)


def test_without_weights_the_softmax_form_is_the_code_of_the_notes() -> None:
    s = scene()
    student, teacher = (
        torch.cat([p[:, 4 * BINS :].permute(0, 2, 3, 1).reshape(-1, CLASSES) for p in view.preds])
        for view in s
    )
    temperature = 4
    teacher_probs = F.softmax(teacher / temperature, dim=-1)
    student_probs = F.log_softmax(student / temperature, dim=-1)
    notes = F.kl_div(student_probs, teacher_probs, reduction="batchmean") * (temperature**2)
    assert value_of(LogitDistillation("softmax", gamma=0, reg_max=BINS), s).item() == pytest.approx(
        notes.item()
    )


def test_pearson_is_one_minus_the_correlation_and_does_not_see_scale_or_offset() -> None:
    s = scene()
    expected = sum(
        np.mean(
            [
                1 - np.corrcoef(*(v.feats[tap][:, i].detach().flatten() for v in s))[0, 1]
                for i in range(c)
            ]
        )
        for tap, (_, c, _, _) in SHAPES.items()
    )
    term = PearsonDistillation()
    assert value_of(term, s).item() == pytest.approx(float(expected), rel=1e-5)
    moved = altered(s.student, lambda x: 40 * x - 7)
    assert value_of(term, Scene(moved, s.teacher)).item() == pytest.approx(
        float(expected), rel=1e-5
    )


@pytest.mark.parametrize("name", EQUAL_IS_ZERO)
def test_zero_at_equality_and_so_is_the_gradient(name: str) -> None:
    s = scene()
    same = Scene(altered(s.teacher, torch.clone), s.teacher)
    found = value_of(TERMS[name][0], same)
    found.backward()
    assert abs(found.item()) < 1e-13
    for leaf in same.leaves(same.student):
        assert leaf.grad is None or leaf.grad.abs().max() < 1e-13


def test_masked_is_zero_where_nothing_is_hidden_and_the_generator_changes_nothing() -> None:
    term, s = masked(masked=0.0), scene()
    for layer in (m for m in term.modules() if isinstance(m, nn.Conv2d)):
        nn.init.dirac_(layer.weight)
        nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    positive = altered(s.teacher, torch.abs)  # so that the ReLU changes nothing either
    assert value_of(term, Scene(positive, positive)) == 0


def test_masked_hides_that_share_of_the_cells_anew_each_time() -> None:
    """With a generator that changes nothing, ones against zeros give the share that is shown."""
    term = MaskedGeneration({"tap": (2, 2, 100, 100)}, masked=0.8)
    term.generators[0] = nn.Identity()
    student, teacher = (
        View({"tap": x}, None, torch.empty(0))
        for x in (torch.ones(1, 2, 100, 100), torch.zeros(1, 2, 100, 100))
    )
    torch.manual_seed(0)
    first, second = term(student, teacher, NO_TARGETS), term(student, teacher, NO_TARGETS)
    torch.manual_seed(0)
    assert first == term(student, teacher, NO_TARGETS) != second
    assert first.item() == pytest.approx(0.2, abs=0.02)


# --- who gets a gradient


@pytest.mark.parametrize("name", TERMS)
def test_no_gradient_reaches_the_teacher(name: str) -> None:
    s = scene()
    value_of(TERMS[name][0], s).backward()
    assert all(leaf.grad is None for leaf in s.leaves(s.teacher))


# --- numbers


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", TERMS)
def test_half_precision_is_computed_in_float32(name: str, dtype: torch.dtype) -> None:
    """Features of 300, whose squares float16 cannot hold."""
    term = masked().float() if name == "masked" else TERMS[name][0]
    half, plain = scene(dtype, size=300), scene(dtype, size=300)
    plain = Scene(*(altered(view, torch.Tensor.float) for view in plain))
    with torch.autocast("cpu", dtype):
        found = value_of(term, half)
    found.backward()
    assert found.dtype == torch.float32 and found.isfinite()
    bound = 0.02 if name == "masked" else 1e-5  # its convolutions run in half precision
    assert found.item() == pytest.approx(value_of(term, plain).item(), rel=bound)
    grads = [leaf.grad for leaf in half.leaves(half.student) if leaf.grad is not None]
    assert grads and all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize(
    "case", ["zeros", "student zero", "teacher zero", "equal", "constant channel", "far"]
)
@pytest.mark.parametrize("name", TERMS)
def test_value_and_gradient_are_finite_at_the_edges(name: str, case: str) -> None:
    student, teacher = scene(torch.float32)
    if case in ("zeros", "student zero"):
        student = altered(student, torch.zeros_like)
    if case in ("zeros", "teacher zero"):
        teacher = altered(teacher, torch.zeros_like)
    if case == "equal":
        student = altered(teacher, torch.clone)
    if case == "constant channel":
        student = altered(student, lambda x: torch.cat([torch.ones_like(x[:, :1]), x[:, 1:]], 1))
    if case == "far":  # where exp() overflows, and scores are 0 and 1
        student, teacher = altered(student, lambda x: -1e3 * x), altered(teacher, lambda x: 1e3 * x)
    s = Scene(student, teacher)
    term = masked().float() if name == "masked" else TERMS[name][0]
    found = value_of(term, s)
    found.backward()
    assert found.isfinite() and (found != 0 or case in ("zeros", "equal"))
    grads = [leaf.grad for leaf in s.leaves(student) if leaf.grad is not None]
    assert len(grads) == len(SIZES) and all(grad.isfinite().all() for grad in grads)
    assert case == "far" or all(grad.abs().max() < 1e3 for grad in grads)


def test_a_teacher_that_sees_nothing_gives_zero_and_not_nan() -> None:
    s = scene(torch.float32)
    blind = altered(s.teacher, lambda x: x - 1e4)
    for name in ("logits", "localisation", "score_weighted"):
        assert value_of(TERMS[name][0], Scene(s.student, blind)) == 0


@pytest.mark.parametrize("name", TERMS)
def test_compiled_in_one_graph_it_gives_the_same(name: str) -> None:
    torch._dynamo.reset()
    term, (one, other) = TERMS[name][0], (scene(), scene())
    plain, compiled = (
        value_of(term, one),
        value_of(torch.compile(term, backend="eager", fullgraph=True), other),
    )
    plain.backward()
    compiled.backward()
    assert torch.equal(plain, compiled)
    for mine, theirs in zip(one.leaves(one.student), other.leaves(other.student), strict=True):
        assert mine.grad is theirs.grad is None or torch.equal(mine.grad, theirs.grad)  # type: ignore[arg-type]


# --- settings


@pytest.mark.parametrize(
    "wrong, named",
    [
        (lambda: LogitDistillation(temperature=0), "temperature is 0"),
        (lambda: ChannelWise(-1.0), "temperature is -1"),
        (lambda: LocalisationDistillation(math.inf), "temperature is inf"),
        (lambda: LogitDistillation(gamma=-0.5), "gamma is -0.5"),
        (lambda: LocalisationDistillation(reg_max=1), "reg_max is 1"),
        (lambda: masked(masked=1.0), "masked is 1"),
        (lambda: masked(masked=-0.1), "masked is -0.1"),
        (lambda: value_of(LogitDistillation(), scene()), "reg_max=16 .* 23 channels"),
        (lambda: value_of(ScoreWeighted(-1), scene()), "reg_max=-1"),
        (
            lambda: LogitDistillation()(
                *2 * [View({}, [torch.ones(1, 64, 2, 2)], torch.empty(0))], NO_TARGETS
            ),
            "reg_max=16",
        ),
        (
            lambda: LogitDistillation()(*2 * [View({}, {"boxes": 0}, torch.empty(0))], NO_TARGETS),
            "this is a dict",
        ),
        (
            lambda: SpatialImitation()(*2 * [View({}, None, torch.empty(0))], NO_TARGETS),
            "distill.taps",
        ),
    ],
)
def test_wrong_settings_are_refused_by_name(wrong: Callable[[], Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        wrong()


def test_feats_that_do_not_fit_are_refused_by_name() -> None:
    student, teacher = scene()
    narrow = View({tap: feat[:, :2] for tap, feat in student.feats.items()}, None, student.images)
    with pytest.raises(UserError, match="tap0 has 2 channels, the teacher 5"):
        SpatialImitation()(narrow, teacher, NO_TARGETS)
    small = View({"tap0": teacher.feats["tap0"][:, :, :2]}, teacher.preds, teacher.images)
    with pytest.raises(UserError, match="tap0 is 2x4"):
        ScoreWeighted(BINS)(small, small, NO_TARGETS)


# --- the configs

CONFIGS = [
    "logits",
    "localisation",
    "channelwise",
    "masked",
    "pearson",
    "score_weighted",
    "spatial",
    "hybrid",
]


def tiny(name: str, *overrides: str) -> tuple[Path, list[str]]:
    return ROOT / f"configs/terms/{name}.yaml", [
        *SMALL,
        "data.imgsz=64",
        "data.limit=8",
        "device=cpu",
        *overrides,
    ]


@pytest.mark.parametrize("name", CONFIGS)
def test_each_config_teaches_the_student_and_leaves_the_teacher(name: str) -> None:
    """The terms alone, without the task and with `align` as it begins, on one batch: their sum
    falls.
    """
    losses = teach(ROOT / f"configs/terms/{name}.yaml", 64, NO_TARGETS, steps=10)
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("name", CONFIGS)
def test_each_config_trains(
    name: str, tmp_path: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two epochs of two steps: every term is logged, and finite."""
    path, overrides = tiny(
        name, f"data.root={shapes}", f"run={tmp_path / 'run'}", "train.epochs=2", "train.batch=4"
    )
    monkeypatch.setattr(
        sys, "argv", ["train.py", "--config", str(path), *overrides, "train.val_every=2"]
    )
    train_script.main()
    records = [
        json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    ]
    terms = config.load(path)["distill"].keys() - {"taps", "kd_scale"}
    for record in records[1:]:
        assert record["skipped"] == 0 and all(
            math.isfinite(record[term]) and record[term] > 0 for term in terms
        )
    saved = torch.load(sorted((tmp_path / "run/ckpt").glob("*.pt"))[-1], weights_only=True)[
        "distillation"
    ]
    assert any(key.startswith("terms.") for key in saved) == (name == "masked")
