"""What the filter of a distillation term leaves: spectra of features, whole and in bands.

A term that parts features has `bands(tap, feat)`, (N, C, H, W) -> two such parts, the low and
the high, as that of kdmini/terms/frequency.py.

Legend: N images, C channels, H W cells of a map.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kdmini.tools.draw import SMALL, Figure, blank

CELL = 1.9  # inches
PARTS = ("whole", "low", "high")
LEAST = 1e-4  # of the largest amplitude, that is drawn as black


def spectra(term: Any, name: str, sides: Mapping[str, Mapping[str, Tensor]]) -> Figure:
    """A row for each tap of each network: the amplitudes before the filter and in its bands.

    term: with `bands`. name: of the term. sides: network -> tap -> (N, C, H, W).
    """
    rows = [(tap, side, feats[tap]) for side, feats in sides.items() for tap in feats]
    rows.sort(key=lambda row: list(sides["student"]).index(row[0]))  # of one tap together
    title = f"Spectra before and after the filter of {name}: mean over images and channels"
    figure = blank(CELL * (len(PARTS) + 1), (CELL + 0.3) * len(rows) + 0.8, title)
    axes = figure.subplots(len(rows), len(PARTS), squeeze=False)
    for line, (tap, side, feat) in zip(axes, rows, strict=True):
        draw_parts(line, [feat.float(), *term.bands(tap, feat.float())])
        line[0].set_ylabel(f"{tap}\n{side}", fontsize=SMALL)
    for axis, part in zip(axes[0], PARTS, strict=True):
        axis.set_title(part, fontsize=SMALL + 1)
    return figure


def draw_parts(axes: Sequence[Any], parts: Sequence[Tensor]) -> None:
    """Logarithms on one scale, the mean in the middle, and below each what share of the energy
    without the mean it has.
    """
    amplitudes = [amplitude(part) for part in parts]
    largest = float(amplitudes[0].max()) or 1.0
    whole = energy(parts[0])
    for axis, part, values in zip(axes, parts, amplitudes, strict=True):
        shown = (values / largest).clamp(min=LEAST).log10()
        axis.imshow(shown.cpu().numpy(), "viridis", vmin=torch.tensor(LEAST).log10(), vmax=0)
        axis.set(xticks=[], yticks=[])
        axis.set_xlabel(f"{energy(part) / max(whole, 1e-30):.1%} of the energy", fontsize=SMALL)


def amplitude(feat: Tensor) -> Tensor:
    """(N, C, H, W) -> (H, W), frequency 0 in the middle."""
    spectrum = torch.fft.fft2(feat).abs().mean((0, 1))
    return torch.fft.fftshift(spectrum)


def energy(feat: Tensor) -> float:
    """Of the differences from the mean of each map."""
    return float((feat - feat.mean((2, 3), keepdim=True)).square().sum())
