"""The selective scan in plain PyTorch, over the four orders of a map's cells.

Sources: Gu & Dao, "Mamba", 2023; Liu et al., "VMamba", NeurIPS 2024 (cross-scan); the
scan is that of Brent & Kung, "A Regular Layout for Parallel Adders", 1982.
Legend: N images, H W cells of a map, L = H W steps of a sequence (t, s two of them), D
channels, M sequences that are scanned side by side, u the input.

    h_t = a_t h_{t-1} + b_t,    h_{-1} = 0,    a_t = exp(dt_t A) in 0..1,    b_t = dt_t B_t u_t
    y_t = C_t h_t + D u_t

Only products of a are made, never a quotient: a sum of logarithms that is subtracted
again, as in exp(S_t) sum_s exp(-S_s) b_s, leaves float32 after e^88.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable


def scan(a: Tensor, b: Tensor) -> Tensor:
    """a, b (L, ...) -> h (L, ...), in float32 at least, also under autocast. Any L above 0."""
    with torch.autocast(a.device.type, enabled=False):
        return Recurrence.apply(wide(a), wide(b))


def wide(x: Tensor) -> Tensor:
    """Half precision to float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Recurrence(Function):
    """The scan, which keeps a and h; its backward is the same scan from the other end.

    g_t = dL/dh_t + a_{t+1} g_{t+1},    dL/db_t = g_t,    dL/da_t = g_t h_{t-1}
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        h = tree(a, b)
        ctx.save_for_backward(a, h)
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        a, h = ctx.saved_tensors
        following = a.roll(-1, 0)  # what comes round meets nothing
        g = tree(following.flip(0), grad.flip(0)).flip(0)
        grad_a = g * h.roll(1, 0)
        grad_a[0].zero_()
        return grad_a, g


def tree(a: Tensor, b: Tensor) -> Tensor:
    """Pairs of steps become the steps of a scan half as long; what it gives is h at the odd
    steps, from which the even ones follow. Five kernels for each doubling of L.
    """
    length = len(b)
    if length == 1:
        return b.clone()
    even = slice(0, length - 1, 2)  # the first of each pair
    odd = slice(1, length, 2)
    of_pairs = torch.addcmul(b[odd], a[odd], b[even])

    h = b.clone()
    h[odd] = tree(a[odd] * a[even], of_pairs)
    after_pairs = slice(2, length, 2)
    h[after_pairs].addcmul_(a[after_pairs], h[1 : length - 1 : 2])
    return h


def cross_scan(maps: Tensor) -> Tensor:
    """(N, 4, D, H, W) -> (L, N, 4, D): each of the four in its order of the cells.

    Row by row, column by column, and both from the last cell to the first.
    """
    cells = maps.permute(3, 4, 0, 1, 2)  # (H, W, N, 4, D)
    rows, columns, rows_back, columns_back = cells.unbind(3)
    orders = [
        rows,
        columns.transpose(0, 1),
        rows_back.flip(0, 1),
        columns_back.transpose(0, 1).flip(0, 1),
    ]
    return torch.stack([order.flatten(0, 1) for order in orders], 2)


def cross_merge(sequences: Tensor, height: int, width: int) -> Tensor:
    """(L, N, 4, D) -> (N, 4, D, H, W): every step back in its cell."""
    rows, columns, rows_back, columns_back = sequences.unbind(2)  # (L, N, D)
    maps = [
        rows.unflatten(0, (height, width)),
        columns.unflatten(0, (width, height)).transpose(0, 1),
        rows_back.unflatten(0, (height, width)).flip(0, 1),
        columns_back.unflatten(0, (width, height)).flip(0, 1).transpose(0, 1),
    ]
    return torch.stack(maps, 2).permute(3, 2, 4, 0, 1)


def state_affinity(log_a: Tensor, dt: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """How much of its input each cell s hands on to each cell t, mean over the channels.

    M_ts = C_t exp(S_t - S_s) dt_s B_s for s <= t, S the sums of log a: y = M u + D u
    exactly. log_a, dt (N, 4, D, H, W); b, c (N, 4, 1, H, W), the B and C of the scan ->
    (N, 4, L, L), rows t and columns s cell by cell, whatever the order of the scan.
    Holds 4 D L^2 numbers an image: for maps of a few hundred cells.
    """
    height, width = dt.shape[3:]
    steps = cross_scan(log_a)
    total = scan(torch.ones_like(steps), steps)  # S, (L, N, 4, D)
    later = torch.ones(height * width, height * width, dtype=torch.bool, device=dt.device).triu(1)
    decay = total[:, None] - total[None, :]  # (L of t, L of s, N, 4, D)
    decay = decay.masked_fill(later[..., None, None, None], -torch.inf).exp()
    handed_on = (decay * cross_scan(dt)).mean(4)  # (L of t, L of s, N, 4)
    matrix = cross_scan(c)[:, None, ..., 0] * handed_on * cross_scan(b)[..., 0]
    by_s = cross_merge(matrix.permute(0, 2, 3, 1), height, width)  # (N, 4, L of s, H, W)
    by_t = cross_merge(by_s.flatten(3).permute(2, 0, 1, 3), height, width)
    return by_t.flatten(3)
