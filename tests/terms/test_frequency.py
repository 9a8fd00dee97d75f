"""Frequency attention against its equation in loops, in float64: the filter as a convolution,
without an FFT.
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
from kdmini.distill.attention import AttentionTransfer
from kdmini.terms.frequency import FrequencyAttention, bands
from tests.conftest import ROOT
from tests.terms.teaching import SMALL, teach

NO_TARGETS: Any = {}
SHAPES = {
    "fine": (3, 2, 8, 6),
    "middle": (3, 3, 5, 5),
    "coarse": (3, 2, 4, 4),
}  # the student's channels are its own
RADIUS: dict[str, float] = {"fine": 0.45, "middle": 0.6}
LOW = {"fine": 0.3, "middle": 0.0}
CONFIG = ROOT / "configs/terms/frequency.yaml"
STRATEGIES = ["basic", "inverse", "both", "teacher", "student"]


def scene(
    dtype: torch.dtype = torch.float64, seed: int = 0, size: float = 1.0
) -> tuple[View, View]:
    """Two images, as student and teacher see them."""
    generator = torch.Generator().manual_seed(seed)

    def view(side: int) -> View:
        feats = {
            tap: size
            * torch.randn(2, shape[side], *shape[2:], generator=generator, dtype=torch.float64)
            for tap, shape in SHAPES.items()
        }
        return View(
            {tap: feat.to(dtype).requires_grad_() for tap, feat in feats.items()},
            None,
            torch.empty(0),
        )

    return view(0), view(1)


def altered(view: View, change: Callable[[Tensor], Tensor]) -> View:
    return View(
        {tap: change(feat.detach()).requires_grad_() for tap, feat in view.feats.items()},
        None,
        view.images,
    )


def frequency(index: int, size: int) -> float:
    """In units of Nyquist's."""
    return 2 * min(index, size - index) / size


def plain_low(feat: Tensor, radius: float) -> Tensor:
    """The low-pass disc as a circular convolution with a sum of cosines."""
    height, width = feat.shape[2:]
    kept = [
        (u, v)
        for u in range(height)
        for v in range(width)
        if math.hypot(frequency(u, height), frequency(v, width)) <= radius + 1e-9
    ]
    out = torch.zeros_like(feat)
    for dy in range(height):
        for dx in range(width):
            kernel = sum(
                math.cos(2 * math.pi * (u * dy / height + v * dx / width)) for u, v in kept
            )
            out = out + kernel / (height * width) * feat.roll((dy, dx), (2, 3))
    return out


def plain_map(feat: Tensor) -> list[Tensor]:
    """(C, H, W) -> A, cell by cell."""
    _, height, width = feat.shape
    energy = [(feat[:, y, x] * feat[:, y, x]).sum() for y in range(height) for x in range(width)]
    norm = sum(e * e for e in energy).sqrt()  # type: ignore[union-attr]
    return [e / norm for e in energy]


def plain(
    student: View, teacher: View, strategy: str, radius: dict[str, float], low: dict[str, float]
) -> Any:
    total: Any = 0
    for tap, low_share in low.items():
        s, t = student.feats[tap], teacher.feats[tap]
        for share, band in ((low_share, "low"), (1 - low_share, "high")):
            if not share:
                continue
            seen = []
            for who, feat in (("student", s), ("teacher", t)):
                part = plain_low(feat, radius[tap])
                part = part if band == "low" else feat - part
                seen.append(feat if strategy not in (who, "both", "basic", "inverse") else part)
            for n in range(2):
                gap = sum(
                    (a - b) ** 2
                    for a, b in zip(plain_map(seen[0][n]), plain_map(seen[1][n]), strict=True)
                )
                total += share * gap.sqrt() / 2  # type: ignore[union-attr]
    return total


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_value_and_gradient_are_those_of_the_equation(strategy: Any) -> None:
    usual = {"basic": [0.0, 1.0, 1.0], "inverse": [1.0, 0.0, 0.0]}.get(strategy, [0.5, 0.5, 0.5])
    for given in (None, LOW):
        ours, theirs = scene(), scene()
        found = FrequencyAttention(SHAPES, strategy, RADIUS, given)(*ours, NO_TARGETS)
        low = dict(zip(SHAPES, usual, strict=True)) | (given or {})
        expected = plain(*theirs, strategy, {"coarse": 0.5} | RADIUS, low)
        found.backward()
        expected.backward()
        assert (
            found.ndim == 0
            and found.item() == pytest.approx(expected.item(), rel=1e-6)
            and found > 0.1
        )
        for tap in SHAPES:
            mine, other = ours[0].feats[tap].grad, theirs[0].feats[tap].grad
            assert mine is not None and other is not None and mine.abs().max() > 1e-3
            assert torch.allclose(mine, other, rtol=1e-5, atol=1e-7)
        assert all(feat.grad is None for feat in ours[1].feats.values())


@pytest.mark.parametrize("size", [(8, 8), (5, 7), (1, 6), (2, 2), (1, 1)])
@pytest.mark.parametrize("radius", [0.0, 0.3, 0.7, 1.0])
def test_the_two_filters_are_complementary(size: tuple[int, int], radius: float) -> None:
    """They sum to the identity, and numpy finds the one's spectrum within the disc, the other's
    outside.
    """
    feat = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    low, high = bands(feat, radius)
    assert low.shape == high.shape == feat.shape and torch.allclose(
        low + high, feat, rtol=0, atol=1e-14
    )
    fy, fx = np.meshgrid(*(2 * np.fft.fftfreq(n) for n in size), indexing="ij")
    inside = np.hypot(fy, fx) <= radius + 1e-9
    whole, below, above = (np.fft.fft2(x.numpy()) for x in (feat, low, high))
    assert np.allclose(below, np.where(inside, whole, 0), atol=1e-10)
    assert np.allclose(above, np.where(inside, 0, whole), atol=1e-10)


def test_the_mean_is_low_a_checkerboard_high_and_a_slow_wave_on_either_side_of_the_radius() -> None:
    x = torch.arange(16.0)
    wave = torch.cos(2 * math.pi * 2 * x / 16).expand(
        1, 1, 16, 16
    )  # 2 of 8 periods: a quarter of Nyquist's
    checkerboard = (1 - 2 * ((x[:, None] + x) % 2)).expand(1, 1, 16, 16)
    for feat, radius, is_low in (
        (torch.ones(1, 1, 16, 16), 0.0, True),
        (checkerboard, 1.0, False),
        (wave, 0.25, True),
        (wave, 0.24, False),
    ):
        low, high = bands(feat, radius)
        assert torch.allclose(low, feat if is_low else torch.zeros_like(feat), atol=1e-5)
        assert torch.allclose(high, torch.zeros_like(feat) if is_low else feat, atol=1e-5)


def test_basic_takes_detail_where_the_resolution_is_high_as_in_the_notes() -> None:
    def low(strides: list[int], strategy: Any) -> list[float]:
        shapes = {str(i): (8, 8, 640 // stride, 480 // stride) for i, stride in enumerate(strides)}
        return list(FrequencyAttention(shapes, strategy).low.values())

    assert low([16, 32, 16, 8, 16, 32], "basic") == [1, 1, 1, 0, 1, 1]
    assert low([16, 32, 16, 8, 16, 32], "inverse") == [0, 0, 0, 1, 0, 0]
    assert low([4, 8, 16, 32], "basic") == [0, 0, 1, 1]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_zero_at_equality_unless_only_one_side_is_filtered(strategy: Any) -> None:
    _, teacher = scene()
    same = altered(teacher, torch.clone)
    found = FrequencyAttention(SHAPES, strategy)(same, teacher, NO_TARGETS)
    found.backward()
    grads = [feat.grad for feat in same.feats.values()]
    assert all(grad is not None and grad.isfinite().all() for grad in grads)
    if strategy in ("teacher", "student"):
        assert found > 0.1
    else:
        assert found == 0 and all(grad.abs().max() == 0 for grad in grads if grad is not None)


def test_of_maps_without_high_frequencies_the_low_part_is_plain_attention_transfer() -> None:
    slow = [altered(view, lambda x: plain_low(x, 0.5)) for view in scene()]
    expected = AttentionTransfer("sample")(*slow, NO_TARGETS)
    assert FrequencyAttention(SHAPES, "both", low=1.0)(*slow, NO_TARGETS).item() == pytest.approx(
        expected.item()
    )
    assert AttentionTransfer("sample")(*scene(), NO_TARGETS).item() != pytest.approx(
        expected.item()
    )


@pytest.mark.parametrize("size", range(2, 41))
def test_a_frequency_on_the_radius_is_low_however_it_is_rounded(size: int) -> None:
    for turns in range(1, size // 2 + 1):
        wave = torch.cos(2 * math.pi * turns * torch.arange(size) / size).expand(1, 1, 2, size)
        low, high = bands(wave, 2 * turns / size)
        assert torch.allclose(low, wave, atol=1e-5) and high.abs().max() < 1e-5


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_half_precision_is_computed_in_float32(
    strategy: Any, dtype: torch.dtype, autocast: bool
) -> None:
    """Features of 300, whose squares float16 cannot hold."""
    half = scene(dtype, size=300)
    full = [altered(view, torch.Tensor.float) for view in half]
    term = FrequencyAttention(SHAPES, strategy, low=0.5)
    with torch.autocast("cpu", dtype, enabled=autocast):
        found = term(*half, NO_TARGETS)
    found.backward()
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(term(*full, NO_TARGETS).item(), rel=1e-5)
    assert all(
        feat.grad is not None and feat.grad.isfinite().all() for feat in half[0].feats.values()
    )


@pytest.mark.parametrize("case", ["zeros", "student zero", "teacher zero", "flat", "far"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_value_and_gradient_are_finite_at_the_edges(strategy: Any, case: str) -> None:
    student, teacher = scene(torch.float32)
    if case in ("zeros", "student zero"):
        student = altered(student, torch.zeros_like)
    if case in ("zeros", "teacher zero"):
        teacher = altered(teacher, torch.zeros_like)
    if case == "flat":  # nothing but rounding is left of the high frequencies
        student, teacher = (
            altered(v, lambda x: x.mean((2, 3), keepdim=True) + 0 * x) for v in (student, teacher)
        )
    if case == "far":
        student, teacher = altered(student, lambda x: -1e6 * x), altered(teacher, lambda x: 1e6 * x)
    found = FrequencyAttention(SHAPES, strategy, low=0.5)(student, teacher, NO_TARGETS)
    found.backward()
    grads = [feat.grad for feat in student.feats.values()]
    assert found.isfinite() and all(grad is not None and grad.abs().max() < 1e4 for grad in grads)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_compiled_in_one_graph_it_gives_the_same(strategy: Any) -> None:
    torch._dynamo.reset()
    term, one, other = FrequencyAttention(SHAPES, strategy, RADIUS, LOW), scene(), scene()
    plain_value = term(*one, NO_TARGETS)
    compiled = torch.compile(term, backend="eager", fullgraph=True)(*other, NO_TARGETS)
    plain_value.backward()
    compiled.backward()
    assert torch.equal(plain_value, compiled)
    for tap in SHAPES:
        assert torch.equal(one[0].feats[tap].grad, other[0].feats[tap].grad)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "settings, named",
    [
        ({"radius": -0.1}, "radius is -0.1"),
        ({"radius": {"fine": 1.5}}, "radius is 1.5"),
        ({"radius": math.nan}, "radius is nan"),
        ({"low": 2}, "low is 2"),
        ({"radius": 0.49}, "radius 0.49 keeps only the mean of coarse, 4x4; use 0.5 or more"),
        (
            {"radius": {"fine": 0.2}, "strategy": "inverse"},
            "radius 0.2 keeps only the mean of fine, 8x6; use 0.25",
        ),
        ({"low": {"middel": 0.5}}, "low names middel, .* fine, middle, coarse"),
    ],
)
def test_wrong_settings_are_refused_by_name(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        FrequencyAttention(SHAPES, **settings)


def test_it_asks_for_taps() -> None:
    with pytest.raises(UserError, match=r"distill\.taps"):
        FrequencyAttention({})(*2 * [View({}, None, torch.empty(0))], NO_TARGETS)


def test_the_config_teaches_the_student_and_leaves_the_teacher() -> None:
    """The term alone, without the task, on one batch: it falls."""
    losses = teach(CONFIG, 128, NO_TARGETS, steps=12)
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize(
    "override",
    [[], ["distill.frequency.strategy=teacher", "distill.frequency.low={model.16: 0.7}"]],
)
def test_the_config_trains(
    override: list[str], tmp_path: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = [
        f"data.root={shapes}",
        f"run={tmp_path / 'run'}",
        "device=cpu",
        "data.limit=8",
        "data.imgsz=128",
    ]
    short = ["train.epochs=1", "train.batch=4", "train.val_every=1", *override]
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(CONFIG), *SMALL, *run, *short])
    train_script.main()
    record = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert record["skipped"] == 0 and math.isfinite(record["frequency"]) and record["frequency"] > 0
