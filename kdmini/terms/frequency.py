"""Frequency attention: attention transfer of coarse structure and of fine detail apart.

Source: idea 1 of the research notes, after Pham et al., "Frequency Attention for
Knowledge Distillation", WACV 2024. Detectors have been distilled in the frequency
domain before: Zhang et al., "FreeKD: Knowledge Distillation via Semantic Frequency
Prompt", CVPR 2024, compares the bands of a Haar wavelet of three levels under learnt
masks. Attention maps of Fourier discs, as here, we have found nowhere else.
Legend: N images (n one of them), C channels, H W cells, l a tap, S and T the maps of
student and teacher, F either of them, f a frequency in units of Nyquist's; att(F) is
the attention map of kdmini/distill/attention.py.

    Low(F)  = IFFT(FFT(F) * [|f| <= radius_l]),    High(F) = F - Low(F)
    L       = sum_l mean_n [ low_l       * ||att(Low(S_l)) - att(Low(T_l))||_2
                           + (1 - low_l) * ||att(High(S_l)) - att(High(T_l))||_2 ]

    strategy   low_l, where it is not set                     filtered
    basic      0 at taps of high resolution (detail), else 1  both networks
    inverse    1 at taps of high resolution, else 0           both networks
    both       1/2                                            both networks
    teacher    1/2                                            the teacher; S stays whole
    student    1/2                                            the student; T stays whole

High resolution: above the geometric mean of the largest and the smallest tap; of
strides 8 to 32, or 4 to 32, those up to 8, as in the notes. `low` sets the ratio of
low-pass to high-pass, low : 1 - low, and with it any other division. With `teacher` and
`student`, equal networks do not give zero: a whole map is held against two halves.

Simplified: fixed discs with sharp edges, where the paper learns its filter; maps are
periodic to an FFT, so left and right edge are neighbours; taps are of equal size
already, so the FFT resizes nothing. The attention maps are those of filtered features,
and do not see how much of the energy lies in which band. Compiled, it is one graph;
Inductor leaves products of complex numbers to the library, and says so once.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from kdmini.bounds import Share
from kdmini.contracts import Targets, UserError, View
from kdmini.distill.align import Shapes
from kdmini.distill.attention import map_distance
from kdmini.terms.pairs import wide

EDGE = 1e-6  # beside radius^2: a frequency on the edge is inside, however it is rounded


class Bands(NamedTuple):
    """A map in two parts, (N, C, H, W) each."""

    low: Tensor
    high: Tensor


class FrequencyAttention(nn.Module):
    """The distance of the attention maps of filtered features, summed over the taps.

    strategy: which band counts at which tap, and which network is filtered.
    radius: of the low-pass disc, one number for all taps or {tap: number}; taps that are
        not named keep 0.5.
    low: share of the low-pass part, likewise; taps that are not named keep that of the
        strategy.

    Raises UserError where a low-pass part would be the mean alone, whose attention map
    is even.
    """

    uses = frozenset({"feats"})

    def __init__(
        self,
        shapes: Shapes,
        strategy: Literal["basic", "inverse", "teacher", "student", "both"] = "basic",
        radius: Share | dict[str, Share] = 0.5,
        low: Share | dict[str, Share] | None = None,
    ):
        super().__init__()
        self.strategy = strategy
        self.radius = per_tap("radius", radius, dict.fromkeys(shapes, 0.5))
        shares = low_shares(shapes, strategy)
        self.low = shares if low is None else per_tap("low", low, shares)

        for tap, (_, _, height, width) in shapes.items():
            least = 2 / max(height, width)  # the lowest frequency that is not the mean
            too_small = self.radius[tap] < least <= 1
            if self.low[tap] and too_small:
                raise UserError(
                    f"distill: radius {self.radius[tap]} keeps only the mean of "
                    f"{tap}, {height}x{width}; use {least:.3g} or more"
                )

    def forward(self, student: View, teacher: View, targets: Targets) -> Tensor:
        if not teacher.feats:
            raise UserError("distill.taps: a term that compares attention maps has none; name some")
        each = []
        for tap, feat in teacher.feats.items():
            s = wide(student.feats[tap])
            t = wide(feat).detach()
            each.append(self.distance(tap, s, t))
        return torch.stack(each).sum()

    def distance(self, tap: str, s: Tensor, t: Tensor) -> Tensor:
        """(N, C, H, W), (N, C', H, W) -> scalar."""
        radius = self.radius[tap]
        student = Bands(s, s) if self.strategy == "teacher" else bands(s, radius)
        teacher = Bands(t, t) if self.strategy == "student" else bands(t, radius)

        low = self.low[tap]
        parts = []
        if low > 0:
            parts.append(low * map_distance(student.low, teacher.low).mean())
        if low < 1:
            parts.append((1 - low) * map_distance(student.high, teacher.high).mean())
        return torch.stack(parts).sum()


def bands(feat: Tensor, radius: float) -> Bands:
    """(N, C, H, W), not in half precision -> its low-pass and its high-pass part.

    Their sum is feat.
    """
    height, width = feat.shape[-2:]
    kind = {"device": feat.device, "dtype": feat.dtype}
    fy = 2 * torch.fft.fftfreq(height, **kind)  # (H,) in -1..1
    fx = 2 * torch.fft.rfftfreq(width, **kind)  # (W/2 + 1,) in 0..1
    inside = fy[:, None].square() + fx.square() <= radius**2 + EDGE

    spectrum = torch.fft.rfft2(feat)  # (N, C, H, W/2 + 1), complex
    low = torch.fft.irfft2(spectrum * inside, s=(height, width))
    return Bands(low, feat - low)


def low_shares(shapes: Shapes, strategy: str) -> dict[str, float]:
    """tap -> share of the low-pass part that the strategy has there."""
    if strategy not in ("basic", "inverse"):
        return dict.fromkeys(shapes, 0.5)

    areas = {tap: height * width for tap, (_, _, height, width) in shapes.items()}
    largest = max(areas.values(), default=0)
    smallest = min(areas.values(), default=0)
    shares = {}
    for tap, area in areas.items():
        is_fine = area**2 > largest * smallest  # above the geometric mean of the two
        shares[tap] = float(is_fine == (strategy == "inverse"))
    return shares


def per_tap(
    key: str, setting: float | Mapping[str, float], defaults: Mapping[str, float]
) -> dict[str, float]:
    """-> {tap: value in 0..1} for all taps of `defaults`.

    Raises UserError for an unknown tap.
    """
    named = setting if isinstance(setting, Mapping) else dict.fromkeys(defaults, setting)
    for tap in named:
        if tap not in defaults:
            taps = ", ".join(defaults)
            raise UserError(f"distill: {key} names {tap}, which is no tap; the taps are {taps}")
    return {**defaults, **named}
