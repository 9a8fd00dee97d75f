"""Frequency attention: attention transfer, coarse structure and fine detail told apart by a Fourier
transform.

Source: idea 1 of the research notes, after Pham et al., "Frequency Attention for Knowledge
Distillation", WACV 2024; the attention maps A are those of kdmini/distill/attention.py.
Legend: N images, C channels, H W cells, l a tap, S and T student and teacher, f a frequency in
units of Nyquist's.

    Low(F)  = IFFT(FFT(F) * [|f| <= radius_l])        High(F) = F - Low(F)
    L       = sum_l mean_n  low_l * ||A(Low S) - A(Low T)||_2 + (1 - low_l) * ||A(High S) - A(High T)||_2

    strategy   low_l, where it is not set                             filtered
    basic      0 at taps of high resolution (detail), else 1          both networks
    inverse    1 at taps of high resolution, else 0                   both networks
    both       1/2                                                    both networks
    teacher    1/2                                                    the teacher; the student's S stays whole
    student    1/2                                                    the student; the teacher's T stays whole

High resolution: above the geometric mean of the largest and the smallest tap; of strides 8 to 32,
or 4 to 32, those up to 8, as in the notes. `low` sets the ratio of low-pass to high-pass, low : 1 -
low, and with it any other division. With `teacher` and `student`, equal networks do not give zero:
a whole map is held against two halves.

Simplified: fixed discs with sharp edges, where the paper learns its filter; maps are periodic to an
FFT, so left and right edge are neighbours; taps are of equal size already, so the FFT resizes
nothing. The attention maps are those of filtered features, and do not see how much of the energy
lies in which band. Compiled, it is one graph; Inductor leaves products of complex numbers to the
library, and says so once."""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from kdmini.contracts import Targets, UserError, View
from kdmini.distill.align import Shapes
from kdmini.distill.attention import map_distance
from kdmini.terms.pairs import wide


class FrequencyAttention(nn.Module):
    """radius, low: one number for all taps, or {tap: number}; taps that are not named keep 0.5 and
    the strategy's. Raises UserError where a low-pass part would be the mean alone, whose attention
    map is even."""

    uses = frozenset({"feats"})

    def __init__(
        self,
        shapes: Shapes,
        strategy: Literal["basic", "inverse", "teacher", "student", "both"] = "basic",
        radius: float | dict[str, float] = 0.5,
        low: float | dict[str, float] | None = None,
    ):
        super().__init__()
        self.strategy = strategy
        self.radius = per_tap("radius", radius, dict.fromkeys(shapes, 0.5))
        self.low = per_tap("low", {} if low is None else low, low_shares(shapes, strategy))
        for tap, (_, _, height, width) in shapes.items():
            if self.low[tap] and self.radius[tap] < (least := 2 / max(height, width)) <= 1:
                size = f"{tap}, {height}x{width}"
                raise UserError(
                    f"distill: radius {self.radius[tap]} keeps only the mean of {size}; use {least:.3g} or more"
                )

    def forward(self, student: View, teacher: View, targets: Targets) -> Tensor:
        if not teacher.feats:
            raise UserError("distill.taps: a term that compares attention maps has none; name some")
        return torch.stack(
            [self.distance(tap, student.feats[tap], feat) for tap, feat in teacher.feats.items()]
        ).sum()

    def distance(self, tap: str, student: Tensor, teacher: Tensor) -> Tensor:
        """(N, C, H, W), (N, C', H, W) -> scalar."""
        s, t, radius = wide(student), wide(teacher).detach(), self.radius[tap]
        students = (s, s) if self.strategy == "teacher" else bands(s, radius)
        teachers = (t, t) if self.strategy == "student" else bands(t, radius)
        shares = self.low[tap], 1 - self.low[tap]
        parts = zip(shares, students, teachers, strict=True)
        return torch.stack(
            [share * map_distance(a, b).mean() for share, a, b in parts if share]
        ).sum()


def bands(feat: Tensor, radius: float) -> tuple[Tensor, Tensor]:
    """(N, C, H, W), not in half precision -> its low-pass and its high-pass part; their sum is
    feat.
    """
    height, width = feat.shape[-2:]
    fy = 2 * torch.fft.fftfreq(height, device=feat.device, dtype=feat.dtype)  # (H,) in -1..1
    fx = 2 * torch.fft.rfftfreq(
        width, device=feat.device, dtype=feat.dtype
    )  # (W // 2 + 1,) in 0..1
    inside = (
        fy[:, None].square() + fx.square() <= radius**2 + 1e-6
    )  # a frequency on the edge, however it is rounded
    low = torch.fft.irfft2(torch.fft.rfft2(feat) * inside, s=(height, width))
    return low, feat - low


def low_shares(shapes: Shapes, strategy: str) -> dict[str, float]:
    """tap -> share of the low-pass part that the strategy has there."""
    if strategy not in ("basic", "inverse"):
        return dict.fromkeys(shapes, 0.5)
    areas = {tap: height * width for tap, (_, _, height, width) in shapes.items()}
    fine = {tap: area**2 > max(areas.values()) * min(areas.values()) for tap, area in areas.items()}
    return {tap: float(is_fine == (strategy == "inverse")) for tap, is_fine in fine.items()}


def per_tap(
    what: str, given: float | Mapping[str, float], usual: Mapping[str, float]
) -> dict[str, float]:
    """-> {tap: value in 0..1} for all taps. Raises UserError for an unknown tap and a value out of
    range.
    """
    named = given if isinstance(given, Mapping) else dict.fromkeys(usual, given)
    for tap, value in named.items():
        if tap not in usual:
            raise UserError(
                f"distill: {what} names {tap}, which is no tap; the taps are {', '.join(usual)}"
            )
        if not 0 <= value <= 1:
            raise UserError(f"distill: {what} is {value}; use 0 to 1")
    return {**usual, **named}
