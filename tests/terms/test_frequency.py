"""Frequency attention against its equation in loops, in float64.

The filter is written out as a convolution, without an FFT.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kdmini.contracts import UserError, View
from kdmini.distill.attention import AttentionTransfer
from kdmini.terms.frequency import FrequencyAttention, bands, haar_bands
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

NO_TARGETS: Any = {}
SHAPES = {  # student C, teacher C, H, W
    "fine": (3, 2, 8, 6),
    "middle": (3, 3, 5, 5),
    "coarse": (3, 2, 4, 4),
}
RADIUS: dict[str, float] = {"fine": 0.45, "middle": 0.6}
LOW: dict[str, float] = {"fine": 0.3, "middle": 0.0}
STRATEGIES = ["basic", "inverse", "both", "teacher", "student"]


def random_scene(dtype: torch.dtype = torch.float64, seed: int = 0, size: float = 1.0) -> Scene:
    generator = torch.Generator().manual_seed(seed)

    def view(side: int) -> View:
        feats = {}
        for tap, (*channels, height, width) in SHAPES.items():
            shape = (channels[side], height, width)
            feats[tap] = leaf(shape, generator, dtype, size)
        return View(feats, None, torch.empty(0))

    return Scene(view(0), view(1))


def value_of(term: Any, scene: Scene) -> Tensor:
    return term(*scene, NO_TARGETS)


# --- the equation, in loops


def frequency(index: int, size: int) -> float:
    """In units of Nyquist's."""
    return 2 * min(index, size - index) / size


def plain_low(feat: Tensor, radius: float) -> Tensor:
    """The low-pass disc as a circular convolution with a sum of cosines."""
    height, width = feat.shape[2:]
    disc = []
    for u in range(height):
        for v in range(width):
            distance = math.hypot(frequency(u, height), frequency(v, width))
            if distance <= radius + 1e-9:
                disc.append((u / height, v / width))

    low = torch.zeros_like(feat)
    for dy in range(height):
        for dx in range(width):
            waves = [math.cos(2 * math.pi * (fy * dy + fx * dx)) for fy, fx in disc]
            weight = sum(waves) / (height * width)
            low = low + weight * feat.roll((dy, dx), (2, 3))
    return low


def plain_map(feat: Tensor) -> list[Tensor]:
    """(C, H, W) -> the attention map, cell by cell."""
    _, height, width = feat.shape
    energies = []
    for y in range(height):
        for x in range(width):
            energies.append(feat[:, y, x].square().sum())
    squares: Any = sum(energy * energy for energy in energies)
    return [energy / squares.sqrt() for energy in energies]


def plain_distance(one: Tensor, other: Tensor) -> Any:
    """(N, C, H, W) twice -> the distance of the attention maps, the mean over the images."""
    total: Any = 0
    for map_one, map_other in zip(map(plain_map, one), map(plain_map, other), strict=True):
        square: Any = 0
        for a, b in zip(map_one, map_other, strict=True):
            square += (a - b) ** 2
        total += square.sqrt() / IMAGES
    return total


def plain(
    scene: Scene, strategy: str, radius: Mapping[str, float], low: Mapping[str, float]
) -> Any:
    total: Any = 0
    for tap, share in low.items():
        s = scene.student.feats[tap]
        t = scene.teacher.feats[tap]
        low_s = s if strategy == "teacher" else plain_low(s, radius[tap])
        low_t = t if strategy == "student" else plain_low(t, radius[tap])
        high_s = s if strategy == "teacher" else s - low_s
        high_t = t if strategy == "student" else t - low_t
        if share > 0:
            total += share * plain_distance(low_s, low_t)
        if share < 1:
            total += (1 - share) * plain_distance(high_s, high_t)
    return total


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("low", [None, LOW])
def test_value_and_gradient_are_those_of_the_equation(
    strategy: Any, low: dict[str, float] | None
) -> None:
    radii = {"coarse": 0.5, **RADIUS}
    shares = dict.fromkeys(SHAPES, 0.5)
    if strategy == "basic":
        shares = {"fine": 0.0, "middle": 1.0, "coarse": 1.0}
    if strategy == "inverse":
        shares = {"fine": 1.0, "middle": 0.0, "coarse": 0.0}
    if low is not None:
        shares.update(low)

    ours = random_scene()
    theirs = random_scene()
    term = FrequencyAttention(SHAPES, strategy, RADIUS, low)
    value = value_of(term, ours)
    expected = plain(theirs, strategy, radii, shares)
    value.backward()
    expected.backward()

    assert value.ndim == 0
    assert value > 0.1
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    assert len(gradients(ours.student)) == len(SHAPES)
    for gradient in gradients(ours.student):
        assert gradient.abs().max() > 1e-3
    assert_same_gradients(ours.student, theirs.student, rtol=1e-5, atol=1e-7)
    assert has_no_gradient(ours.teacher)


# --- the filters


@pytest.mark.parametrize("size", [(8, 8), (5, 7), (1, 6), (2, 2), (1, 1)])
@pytest.mark.parametrize("radius", [0.0, 0.3, 0.7, 1.0])
def test_the_two_filters_are_complementary(size: tuple[int, int], radius: float) -> None:
    """They sum to the identity.

    numpy finds the spectrum of the one within the disc, that of the other outside.
    """
    feat = leaf((3, *size), torch.Generator().manual_seed(0)).detach()
    low, high = bands(feat, radius)
    assert low.shape == high.shape == feat.shape
    assert torch.allclose(low + high, feat, rtol=0, atol=1e-14)

    height, width = size
    fy = 2 * np.fft.fftfreq(height)[:, None]
    fx = 2 * np.fft.fftfreq(width)
    inside = np.hypot(fy, fx) <= radius + 1e-9
    spectrum = np.fft.fft2(feat)
    assert np.allclose(np.fft.fft2(low), spectrum * inside, atol=1e-10)
    assert np.allclose(np.fft.fft2(high), spectrum * ~inside, atol=1e-10)


def test_the_mean_is_low_a_checkerboard_high_and_a_slow_wave_on_either_side_of_the_radius() -> None:
    x = torch.arange(16.0)
    shape = (1, 1, 16, 16)
    mean = torch.ones(shape)
    signs = torch.where(x % 2 == 0, 1.0, -1.0)
    checkerboard = torch.outer(signs, signs).expand(shape)
    wave = torch.cos(2 * math.pi * 2 * x / 16).expand(shape)  # 2 of 8 periods: Nyquist's / 4
    nothing = torch.zeros(shape)
    for feat, radius, is_low in (
        (mean, 0.0, True),
        (checkerboard, 1.0, False),
        (wave, 0.25, True),
        (wave, 0.24, False),
    ):
        low, high = bands(feat, radius)
        assert torch.allclose(low, feat if is_low else nothing, atol=1e-5)
        assert torch.allclose(high, nothing if is_low else feat, atol=1e-5)


@pytest.mark.parametrize("size", range(2, 41))
def test_a_frequency_on_the_radius_is_low_however_it_is_rounded(size: int) -> None:
    for turns in range(1, size // 2 + 1):
        angles = 2 * math.pi * turns * torch.arange(size) / size
        wave = torch.cos(angles).expand(1, 1, 2, size)
        low, high = bands(wave, 2 * turns / size)
        assert torch.allclose(low, wave, atol=1e-5)
        assert high.abs().max() < 1e-5


# --- the bands of a wavelet


def plain_haar(feat: np.ndarray, levels: int) -> np.ndarray:
    """(H, W) -> the same from LL alone: the transform of pairs, level by level, and back."""
    if levels == 0:
        return feat
    a = feat[0::2, 0::2]
    b = feat[0::2, 1::2]
    c = feat[1::2, 0::2]
    d = feat[1::2, 1::2]
    approximation = plain_haar((a + b + c + d) / 2, levels - 1)
    back = np.zeros_like(feat)
    for row in (0, 1):
        for column in (0, 1):
            back[row::2, column::2] = approximation / 2  # LH, HL and HH are 0
    return back


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_haar_keeps_what_the_wavelet_gives_without_its_details(levels: int) -> None:
    feat = leaf((3, 8, 16), torch.Generator().manual_seed(0)).detach()
    low, high = haar_bands(feat, levels)
    for n in range(IMAGES):
        for c in range(3):
            expected = plain_haar(feat[n, c].numpy(), levels)
            assert np.allclose(low[n, c], expected, rtol=0, atol=1e-14)
    assert torch.allclose(low + high, feat, rtol=0, atol=1e-14)
    assert (low * high).sum().abs() < 1e-10  # the bands are orthogonal


def test_haar_blocks_at_the_far_edges_may_be_smaller() -> None:
    feat = torch.arange(15.0).view(1, 1, 3, 5)
    low, _ = haar_bands(feat, 1)
    expected = torch.tensor([[3.0, 3, 5, 5, 6.5], [3, 3, 5, 5, 6.5], [10.5, 10.5, 12.5, 12.5, 14]])
    assert torch.equal(low[0, 0], expected)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_term_is_the_same_with_the_bands_of_a_wavelet(strategy: Any) -> None:
    """Two levels at one tap; its value is that of the parts that are made by hand."""
    levels = {"fine": 2, "middle": 1, "coarse": 1}
    shares = {"fine": 0.3, "middle": 0.0, "coarse": 0.5}
    ours = random_scene()
    term = FrequencyAttention(SHAPES, strategy, low=shares, filter="haar", levels={"fine": 2})
    value = value_of(term, ours)
    value.backward()

    expected: Any = 0
    for tap, share in shares.items():
        parts = []
        for side, whole in zip(ours, ("teacher", "student"), strict=True):
            feat = side.feats[tap].detach()
            low, high = haar_bands(feat, levels[tap])
            parts.append((feat, feat) if strategy == whole else (low, high))
        (low_s, high_s), (low_t, high_t) = parts
        expected += share * plain_distance(low_s, low_t)
        expected += (1 - share) * plain_distance(high_s, high_t)
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    assert len(gradients(ours.student)) == len(SHAPES)
    for gradient in gradients(ours.student):
        assert gradient.isfinite().all()
        assert gradient.abs().max() > 1e-3
    assert has_no_gradient(ours.teacher)
    assert_compiled_is_the_same(term, value_of, random_scene)


# --- the strategies of the notes, for segmentation

ENCODER = {"stages.1": 32, "pooled": 32}
DECODER = {"fusion": 8}


@pytest.mark.parametrize("filter", ["fourier", "haar"])
@pytest.mark.parametrize("encoder", [1.0, 0.0, 0.7])
def test_low_parts_encoder_and_decoder_whatever_their_resolution(
    filter: Any, encoder: float
) -> None:
    """1: the basic strategy; 0: the reverse; else a ratio. What the other band holds is not seen
    where a share is 0 or 1.
    """
    strides = {"higher": 8, **ENCODER, **DECODER}
    shapes = {tap: (4, 4, 128 // stride, 128 // stride) for tap, stride in strides.items()}
    low = {"higher": encoder, **dict.fromkeys(ENCODER, encoder), "fusion": 1 - encoder}
    term = FrequencyAttention(shapes, low=low, filter=filter)
    assert term.low == low

    generator = torch.Generator().manual_seed(0)
    for tap, (_, channels, height, width) in shapes.items():
        teacher = leaf((channels, height, width), generator)
        other = leaf((channels, height, width), generator).detach()
        low_t, high_t = term.bands(tap, teacher.detach())
        low_o, high_o = term.bands(tap, other)
        if low[tap] == 1:
            assert term.distance(tap, low_t + high_o, teacher) < 1e-6
        if low[tap] == 0:
            assert term.distance(tap, low_o + high_t, teacher) < 1e-6
        assert term.distance(tap, other, teacher) > 0.1


@pytest.mark.parametrize("first_low", [1, 2, 3])
def test_stages_are_split_where_one_likes(first_low: int) -> None:
    """High-pass before, low-pass from there on; 2|2 is what `basic` does by itself."""
    shapes = {f"stages.{i}": (4, 4, 32 >> i, 32 >> i) for i in range(4)}
    low = {f"stages.{i}": float(i >= first_low) for i in range(4)}
    by_itself = FrequencyAttention(shapes).low
    assert FrequencyAttention(shapes, low=low).low == low
    assert (by_itself == low) == (first_low == 2)


# --- the strategies


def test_basic_takes_detail_where_the_resolution_is_high_as_in_the_notes() -> None:
    def low(strides: dict[str, int], strategy: Any) -> dict[str, float]:
        shapes = {}
        for tap, stride in strides.items():
            shapes[tap] = (8, 8, 640 // stride, 480 // stride)
        return FrequencyAttention(shapes, strategy).low

    notes = {"6": 16, "8": 32, "13": 16, "16": 8, "19": 16, "22": 32}
    assert low(notes, "basic") == {**dict.fromkeys(notes, 1), "16": 0}
    assert low(notes, "inverse") == {**dict.fromkeys(notes, 0), "16": 1}
    pyramid = {"c2": 4, "c3": 8, "c4": 16, "c5": 32}
    assert low(pyramid, "basic") == {"c2": 0, "c3": 0, "c4": 1, "c5": 1}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_zero_at_equality_unless_only_one_side_is_filtered(strategy: Any) -> None:
    teacher = random_scene().teacher
    same = altered(teacher, torch.clone)
    value = value_of(FrequencyAttention(SHAPES, strategy), Scene(same, teacher))
    value.backward()
    one_sided = strategy in ("teacher", "student")
    if one_sided:
        assert value > 0.1
    else:
        assert value == 0
    assert len(gradients(same)) == len(SHAPES)
    for gradient in gradients(same):
        assert gradient.isfinite().all()
        assert one_sided or gradient.abs().max() == 0


def test_of_maps_without_high_frequencies_the_low_part_is_plain_attention_transfer() -> None:
    scene = random_scene()
    slow = scene.map(lambda x: plain_low(x, 0.5))
    attention = AttentionTransfer("sample")
    low_alone = FrequencyAttention(SHAPES, "both", low=1.0)
    expected = pytest.approx(value_of(attention, slow).item())
    assert value_of(low_alone, slow).item() == expected
    assert value_of(attention, scene).item() != expected


# --- numbers


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_half_precision_is_computed_in_float32(
    strategy: Any, dtype: torch.dtype, autocast: bool
) -> None:
    """Features of 300, whose squares float16 cannot hold."""
    half = random_scene(dtype, size=300)
    full = half.map(torch.Tensor.float)
    term = FrequencyAttention(SHAPES, strategy, low=0.5)
    with torch.autocast("cpu", dtype, enabled=autocast):
        value = value_of(term, half)
    value.backward()

    expected = value_of(term, full).item()
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(expected, rel=1e-5)
    assert len(gradients(half.student)) == len(SHAPES)
    for gradient in gradients(half.student):
        assert gradient.isfinite().all()


# of flat maps, nothing but rounding is left of the high frequencies
CASES = ["zeros", "student zero", "teacher zero", "flat", "far"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_value_and_gradient_are_finite_at_the_edges(strategy: Any, case: str) -> None:
    scene = edge_case(random_scene(torch.float32), case, far=1e6)
    value = value_of(FrequencyAttention(SHAPES, strategy, low=0.5), scene)
    value.backward()
    assert value.isfinite()
    assert len(gradients(scene.student)) == len(SHAPES)
    for gradient in gradients(scene.student):
        assert gradient.abs().max() < 1e4


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_compiled_in_one_graph_it_gives_the_same(strategy: Any) -> None:
    term = FrequencyAttention(SHAPES, strategy, RADIUS, LOW)
    assert_compiled_is_the_same(term, value_of, random_scene)


# --- settings


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"radius": 0.49}, "radius 0.49 keeps only the mean of coarse, 4x4; use 0.5 or more"),
        (
            {"radius": {"fine": 0.2}, "strategy": "inverse"},
            "radius 0.2 keeps only the mean of fine, 8x6; use 0.25",
        ),
        ({"low": {"middel": 0.5}}, "low names middel, .* fine, middle, coarse"),
        (
            {"filter": "haar", "levels": 2},
            "levels 2 keeps only the mean of coarse, 4x4; use 1 or less",
        ),
        ({"levels": {"middel": 2}}, "levels names middel, .* fine, middle, coarse"),
    ],
)
def test_wrong_settings_are_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        FrequencyAttention(SHAPES, **settings)


def test_of_two_cells_a_wavelet_has_no_low_band() -> None:
    shapes = {"tap": (3, 3, 2, 2)}
    with pytest.raises(UserError, match=r"levels 1 keeps .* 2x2; use a `low` of 0 there"):
        FrequencyAttention(shapes, "both", filter="haar")
    FrequencyAttention(shapes, low=0.0, filter="haar")


def test_it_asks_for_taps() -> None:
    nothing = View({}, None, torch.empty(0))
    with pytest.raises(UserError, match=r"distill\.taps"):
        value_of(FrequencyAttention({}), Scene(nothing, nothing))
