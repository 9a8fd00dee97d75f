"""The selective scan step by step, as its equations stand: what the fast one is held to.

Legend: as in kdmini/segmentation/scan.py.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from kdmini.segmentation.mamba import SS2D


def recurrence(a: Tensor, b: Tensor) -> Tensor:
    """h_t = a_t h_{t-1} + b_t, one step after the other; (L, ...) -> (L, ...)."""
    h = torch.zeros_like(b[0])
    steps = []
    for a_t, b_t in zip(a, b, strict=True):
        h = a_t * h + b_t
        steps.append(h)
    return torch.stack(steps)


def orders(height: int, width: int) -> Iterator[list[tuple[int, int]]]:
    """The cells (row, column) in each of the four orders."""
    rows = [(i, j) for i in range(height) for j in range(width)]
    columns = [(i, j) for j in range(width) for i in range(height)]
    yield from (rows, columns, rows[::-1], columns[::-1])


def ss2d(mixer: SS2D, x: Tensor) -> Tensor:
    """What the module makes of (N, C, H, W), cell by cell and order by order."""
    u = F.silu(mixer.depthwise(mixer.expand(x)))  # (N, D, H, W)
    size = u.shape[1]
    selected = mixer.select(u)
    rank = (selected.shape[1] - 8) // 4
    total = torch.zeros_like(u)
    for k, cells in enumerate(orders(*u.shape[2:])):
        of_order = slice(k * size, (k + 1) * size)
        up = mixer.dt.weight[of_order, :, 0, 0]  # (D, R)
        rate = -mixer.a_log[of_order].exp()  # A, (D,)
        h = torch.zeros_like(u[:, :, 0, 0])
        for i, j in cells:
            low = selected[:, k * rank : (k + 1) * rank, i, j]
            b = selected[:, 4 * rank + k, i, j, None]
            c = selected[:, 4 * rank + 4 + k, i, j, None]
            dt = F.softplus(low @ up.T + mixer.dt_bias[of_order])  # (N, D)
            h = (dt * rate).exp() * h + dt * b * u[:, :, i, j]
            total[:, :, i, j] += c * h + mixer.d[of_order] * u[:, :, i, j]
    normed = F.layer_norm(total.permute(0, 2, 3, 1), (size,), mixer.norm.weight, mixer.norm.bias)
    return mixer.shrink(normed.permute(0, 3, 1, 2))
