"""CutMix and MixUp: an image that is in part another one.

Sources: Yun et al., "CutMix: Regularization Strategy to Train Strong Classifiers with
Localizable Features", ICCV 2019; Zhang et al., "mixup: Beyond Empirical Risk Minimization",
ICLR 2018.
Legend: N images, S image size.
"""

from dataclasses import replace
from functools import cache

import numpy as np

from kdmini.data.layout import Layout

STEPS = 4096  # of the table of a Beta distribution


def cut(layout: Layout, other: Layout, hole: np.ndarray) -> Layout:
    """One image, and within a rectangle another one: both at the place that they have in
    their own layouts, which have one tile.

    hole: (N, 2, 2) [low, high) of x, y.
    """

    def tiles(own: np.ndarray, others: np.ndarray) -> np.ndarray:
        """The last tile, the second along x and y both, is the other image."""
        return np.concatenate([own[:, [0, 0, 0]], others[:, :1]], 1)

    return replace(
        layout,
        image=tiles(layout.image, other.image),
        a=tiles(layout.a, other.a),
        b=tiles(layout.b, other.b),
        shown=tiles(layout.shown, other.shown),
        second=hole,
    )


def rectangle(share: np.ndarray, middle: np.ndarray, imgsz: int) -> np.ndarray:
    """(N, 2, 2) [low, high) of x, y, whole pixels: a square that fills `share`, (N,), of the
    picture round `middle`, (N, 2) in 0..1, and less where it is cut off at the border.
    """
    half = np.sqrt(share)[:, None] / 2
    ends = np.stack([middle - half, middle + half], -1)
    return np.round(ends * imgsz).clip(0, imgsz)


def beta(drawn: np.ndarray, alpha: float) -> np.ndarray:
    """Uniform in [0, 1) -> of the distribution Beta(alpha, alpha), by the inverse of its sum."""
    sums, values = lower_half(alpha)
    low = np.interp(np.minimum(drawn, 1 - drawn), sums, values)
    return np.where(drawn < 0.5, low, 1 - low)


@cache
def lower_half(alpha: float) -> tuple[np.ndarray, np.ndarray]:
    """Of Beta(alpha, alpha), which is symmetric: its sum 0 to a half, and the values there.

    By trapezoids over x^m, m = min(alpha, 1), by which the density is finite at 0.
    """
    m = min(alpha, 1.0)
    grid = np.linspace(0, 0.5**m, STEPS + 1)
    values = grid ** (1 / m)
    density = values ** (alpha - m) * (1 - values) ** (alpha - 1)
    sums = np.concatenate([[0], (density[1:] + density[:-1]).cumsum()])
    return sums / (2 * sums[-1]), values
