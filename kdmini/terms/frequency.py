"""Frequency attention: attention transfer of coarse structure and of fine detail apart.

Source: idea 1 of the research notes, after Pham et al., "Frequency Attention for
Knowledge Distillation", WACV 2024. Detectors have been distilled in the frequency
domain before: Zhang et al., "FreeKD: Knowledge Distillation via Semantic Frequency
Prompt", CVPR 2024, compares the bands of a Haar wavelet of three levels under learnt
masks. Attention maps of Fourier discs, as here, we have found nowhere else.
Legend: N images (n one of them), C channels, H W cells, l a tap, S and T the maps of
student and teacher, F either of them, f a frequency in units of Nyquist's; att(F) is
the attention map of kdmini/distill/attention.py.

    Low(F)  = IFFT(FFT(F) * [|f| <= radius_l])     with `filter: fourier`
            = mean of F over blocks of 2^levels_l  with `filter: haar`, cell by cell
    High(F) = F - Low(F)
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
low-pass to high-pass, low : 1 - low, and with it any other division: the low-pass on
the encoder and the high-pass on the decoder, or stages split 1|3 or 3|1. With `teacher`
and `student`, equal networks do not give zero: a whole map is held against two halves.

`haar` parts F as FreeKD does: its Low is the LL band of the Haar wavelet of that many
levels, and its High is LH, HL and HH of all of them, each put together again at the size
of F. Where a side does not divide, the last block of it is smaller.

Simplified: fixed discs with sharp edges, where the paper learns its filter, and bands
without FreeKD's learnt masks; maps are periodic to an FFT, so left and right edge are
neighbours; taps are of equal size already, so the FFT resizes nothing. The attention
maps are those of filtered features, and do not see how much of the energy lies in which
band. Compiled, it is one graph; Inductor leaves products of complex numbers to the
library, and says so once.
"""

from collections.abc import Mapping
from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdmini.bounds import Range, Share
from kdmini.contracts import Targets, UserError, View
from kdmini.distill.align import Shapes
from kdmini.distill.attention import map_distance
from kdmini.terms.pairs import require_maps, wide

Levels = Annotated[int, Range(1, 12)]

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
    filter: `fourier`, a disc of that radius, or `haar`, the bands of a wavelet.
    levels: of the wavelet, one number or {tap: number}; taps that are not named keep 1.

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
        filter: Literal["fourier", "haar"] = "fourier",
        levels: Levels | dict[str, Levels] = 1,
    ):
        super().__init__()
        self.strategy = strategy
        self.filter = filter
        self.radius = per_tap("radius", radius, dict.fromkeys(shapes, 0.5))
        shares = low_shares(shapes, strategy)
        self.low = shares if low is None else per_tap("low", low, shares)

        self.levels = per_tap("levels", levels, dict.fromkeys(shapes, 1))

        for tap, (_, _, height, width) in shapes.items():
            if self.low[tap]:
                self.refuse_the_mean(tap, height, width)

    def refuse_the_mean(self, tap: str, height: int, width: int) -> None:
        side = max(height, width)
        if self.filter == "haar":
            setting = f"levels {self.levels[tap]}"
            most = (side - 1).bit_length() - 1  # with which there are two blocks a side
            too_small = self.levels[tap] > most >= 0
            remedy = f"{most} or less" if most else "a `low` of 0 there"
        else:
            setting = f"radius {self.radius[tap]}"
            least = 2 / side  # the lowest frequency that is not the mean
            too_small = self.radius[tap] < least <= 1
            remedy = f"{least:.3g} or more"
        if too_small:
            raise UserError(
                f"distill: {setting} keeps only the mean of {tap}, {height}x{width}; use {remedy}"
            )

    def forward(self, student: View, teacher: View, targets: Targets) -> Tensor:
        require_maps(teacher)
        each = []
        for tap, feat in teacher.feats.items():
            s = wide(student.feats[tap])
            t = wide(feat).detach()
            each.append(self.distance(tap, s, t))
        return torch.stack(each).sum()

    def distance(self, tap: str, s: Tensor, t: Tensor) -> Tensor:
        """(N, C, H, W), (N, C', H, W) -> scalar."""
        student = Bands(s, s) if self.strategy == "teacher" else self.bands(tap, s)
        teacher = Bands(t, t) if self.strategy == "student" else self.bands(tap, t)

        low = self.low[tap]
        parts = []
        if low > 0:
            parts.append(low * map_distance(student.low, teacher.low).mean())
        if low < 1:
            parts.append((1 - low) * map_distance(student.high, teacher.high).mean())
        return torch.stack(parts).sum()

    def bands(self, tap: str, feat: Tensor) -> Bands:
        if self.filter == "haar":
            return haar_bands(feat, int(self.levels[tap]))
        return bands(feat, self.radius[tap])


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


def haar_bands(feat: Tensor, levels: int) -> Bands:
    """(N, C, H, W) -> the band LL of that many levels, and all others together.

    Their sum is feat.
    """
    height, width = feat.shape[-2:]
    side = 2**levels
    means = F.avg_pool2d(feat, side, ceil_mode=True)
    low = means.repeat_interleave(side, 2).repeat_interleave(side, 3)[..., :height, :width]
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
    """-> {tap: value} for all taps of `defaults`.

    Raises UserError for an unknown tap.
    """
    named = setting if isinstance(setting, Mapping) else dict.fromkeys(defaults, setting)
    for tap in named:
        if tap not in defaults:
            taps = ", ".join(defaults)
            raise UserError(f"distill: {key} names {tap}, which is no tap; the taps are {taps}")
    return {**defaults, **named}
