"""Graphs of positions: how strongly each belongs to each, for kdmini/terms/affinity.py.

Legend: N images, C channels, H W cells, P = grid * grid positions (i, j two of them), h a
head, L and M queries and keys of an attention, z_i the features of position i: mean over
its part of the map, less the mean of the image, of unit length (beside EPS).

    similarity    aff_ij = exp(-|z_i - z_j|^2 / (2 tau)) = exp((cos(z_i, z_j) - 1) / tau)
    of weights    aff_ij = |W_ij + W_ji|,    W the mean over the heads h, pooled to the grid
    query, key    the same, of W_ij = softmax_j((A z_i + a) . B z_j / sqrt(C)), A a B learnt

Weights are those of attention, whose rows sum to 1, or a state-space model's, which have
signs: what counts is how much a position hands on.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from kdmini.contracts import UserError

Matrix = Literal["normalised", "laplacian", "adjacency"]

# beside the mean square: bounds the gradient of a position that is as the image's mean
EPS = 1e-6


# --- from features


def positions(feat: Tensor, grid: int) -> Tensor:
    """(N, C, H, W) -> z, (N, C, P), of mean square 1."""
    height, width = feat.shape[2:]
    rows = pooling(height, grid, feat)
    columns = pooling(width, grid, feat)
    z = (rows.mT @ feat @ columns).flatten(2)  # (N, C, P)
    z = z - z.mean(2, keepdim=True)
    return z / (z.square().mean(1, keepdim=True) + EPS).sqrt()


def similarity(feat: Tensor, grid: int, temperature: float) -> Tensor:
    """(N, C, H, W) -> aff, (N, P, P)."""
    z = positions(feat, grid)
    cosine = z.mT @ z / z.shape[1]  # (N, P, P)
    own = cosine.diagonal(dim1=1, dim2=2)  # (N, P), 1 but for EPS
    of_both = (own[:, :, None] + own[:, None, :]) / 2
    return ((cosine - of_both) / temperature).exp()


class QueryKey(nn.Module):
    """(N, C, H, W) -> weights (N, 1, P, P) of one head of attention, which is learnt."""

    def __init__(self, channels: int, grid: int):
        super().__init__()
        self.grid = grid
        self.query = nn.Linear(channels, channels)
        self.key = nn.Linear(channels, channels, bias=False)  # a bias would change no softmax

    def forward(self, feat: Tensor) -> Tensor:
        z = positions(feat, self.grid).mT  # (N, P, C)
        scores = self.query(z) @ self.key(z).mT / math.sqrt(z.shape[2])
        return scores.softmax(2)[:, None]


# --- from weights


def pooled(weights: Tensor, grid: int) -> Tensor:
    """(N, heads, L, M) -> (N, heads, P, P), the mean over queries and keys of each part.

    L and M are the cells of square maps, row by row. Raises UserError where they are not.
    """
    queries, keys = (parts(count, grid, weights) for count in weights.shape[2:])
    return queries.mT @ weights @ keys


def parts(count: int, grid: int, like: Tensor) -> Tensor:
    """-> (count, P), as `pooling`, of the cells of a square map, row by row."""
    side = math.isqrt(count)
    if side**2 != count:
        raise UserError(f"distill.taps: a graph of {count} positions is of no square map")
    of_side = pooling(side, grid, like)
    return torch.kron(of_side, of_side)


def of_objects(weights: Tensor, regions: Tensor, heads: int) -> Tensor:
    """The heads of each image that keep the largest share of an object's weight in it.

    (N, heads, P, P), regions (N, R, P) in 0..1 -> the weights, 0 in the other heads. All
    heads stay in an image without objects.
    """
    inside = torch.einsum("nri,nhij,nrj->nh", regions, weights, regions)
    heads = min(heads, inside.shape[1])
    least = inside.topk(heads).values[:, -1:]
    return weights * (inside >= least)[..., None, None]


def symmetric(weights: Tensor) -> Tensor:
    """(N, heads, P, P) -> aff, (N, P, P), whose mean is 1."""
    mean = weights.mean(1)
    affinity = (mean + mean.mT).abs()
    return affinity / (affinity.mean((1, 2), keepdim=True) + EPS**2)


# --- the matrix whose spectrum is looked at


def matrix_of(affinity: Tensor, kind: Matrix) -> Tensor:
    """aff, (N, P, P) -> Q, (N, P, P): the larger an eigenvalue, the larger the object."""
    degree = affinity.sum(2).clamp(min=EPS)  # (N, P); of similarities 1 at least
    if kind == "normalised":
        root = degree.sqrt()
        normalised = affinity / outer(root)
        constant = outer(root) / degree.sum(1)[:, None, None]  # u u^T
        return normalised - constant

    scale = degree.mean(1)[:, None, None]
    if kind == "adjacency":
        return affinity / scale
    laplacian = (torch.diag_embed(degree) - affinity) / scale
    count = degree.shape[1]
    return torch.eye(count, device=degree.device, dtype=degree.dtype) - laplacian - 1 / count


def outer(x: Tensor) -> Tensor:
    """(N, P) -> x x^T, (N, P, P)."""
    return x[:, :, None] * x[:, None, :]


# --- parts of a length


def pooling(size: int, grid: int, like: Tensor) -> Tensor:
    """-> (size, grid): x @ this is the mean of x over `grid` equal parts of its length.

    A part need not be of whole cells. In place of adaptive_avg_pool2d, whose gradient
    differs from run to run on CUDA, and whose parts overlap.
    """
    edges = torch.arange(size + 1, device=like.device, dtype=like.dtype) * grid / size
    return overlap(edges[:-1], edges[1:], grid)


def overlap(start: Tensor, end: Tensor, cells: int) -> Tensor:
    """How much of each cell i..i+1, i < cells, lies in start..end.

    (...,) twice -> (..., cells) in 0..1.
    """
    cell = torch.arange(cells, device=start.device, dtype=start.dtype)
    left = torch.maximum(start[..., None], cell)
    right = torch.minimum(end[..., None], cell + 1)
    return (right - left).clamp(min=0)
