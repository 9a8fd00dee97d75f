"""Affinity distillation: which positions belong together, in the leading part of the spectrum of
the teacher's graph.

Source: idea 2 of the research notes, after Kim et al., "Distilling Spectral Graph for
Object-Context Aware Open-Vocabulary Semantic Segmentation" (CASS), CVPR 2025; the graph is that of
Shi & Malik, "Normalized Cuts", 2000.
Legend: N images, C channels, H W cells, G padded boxes, L taps, M = grid * grid positions, R rank,
l a tap, S and T student and teacher; f_i the features of position i: mean over its part of the map,
less the mean of the image, of unit length (beside EPS).

    W_ij  = exp(-|f_i - f_j|^2 / (2 temperature)) = exp((cos(f_i, f_j) - 1) / temperature)
    A     = D^-1/2 W D^-1/2 - u u^T,   D_ii = sum_j W_ij,   u_i ~ D_ii^1/2 of unit length
    A_T   = U diag(lambda) U^T,   lambda in 0..1
    B     = diag(m)^1/2 U_R diag(lambda_R)^(emphasis / 2)       the R largest lambda
    m_i   = background + (1 - background) * (largest share of position i that one ground-truth box covers)
    L     = sum_l mean_n ||B^T (A_S - A_T) B||^2 / ||B^T B||^2, in 0..1 a tap       Frobenius norms

W stands in for self-attention: D^-1 W is the softmax over the positions. The graph's normalised
Laplacian has the eigenvectors U with 1 - lambda, and u with 0. Every graph has its u, which shows
no objects: it is left out, as in spectral clustering, or it would outweigh the others. Large lambda
are the low frequencies of the graph: whole objects.

The student is seen through the teacher's U, which is constant, and is never decomposed. A gradient
through eigenvectors has 1 / (lambda_i - lambda_j) in it: not finite where eigenvalues are equal, as
they are on flat maps. Eigenvalues alone have a gradient, but stay as they are when positions change
places: the object could be elsewhere. Within an eigenspace the choice of U changes nothing, for B
enters as B B^T; only where `rank` cuts through one is it arbitrary what is kept.

Simplified: pairwise similarity in place of attention heads, so there are none to choose among or to
average; `rank` and `emphasis` are settings, where CASS has an energy-based rank and a dynamic
scaling of eigenvalues. Boxes as weights are the notes' own idea: CASS trains nothing and has none.
All of it in float32 outside autocast. It compiles in one graph, with `eigh` as a call to the
library; on CUDA that call waits for the device to learn whether it converged, as no other term
does."""

import math

import torch
from torch import Tensor, nn

from kdmini.contracts import Targets, UserError, View
from kdmini.terms.pairs import check_temperature, wide

TINY = 1e-12  # a teacher's map without any structure teaches nothing: L is 0, not NaN
EPS = 1e-6  # beside the mean square: bounds the gradient of a position that is as the mean of the image


class AffinityDistillation(nn.Module):
    """grid: positions a side. rank: eigenvectors kept. emphasis: 0 counts them alike, more the
    larger ones the more.
    """

    uses = frozenset({"feats"})

    def __init__(
        self,
        grid: int = 8,
        rank: int = 16,
        temperature: float = 0.25,
        emphasis: float = 1.0,
        background: float = 0.25,
    ):
        super().__init__()
        if grid < 2:
            raise UserError(f"distill: grid is {grid}, the positions a side; use 2 or more")
        if not 1 <= rank < grid**2:
            raise UserError(
                f"distill: rank is {rank}, the eigenvectors kept of {grid**2 - 1}; use 1 to {grid**2 - 1}"
            )
        if not 0 <= emphasis < math.inf:
            raise UserError(
                f"distill: emphasis is {emphasis}, the power of the eigenvalues; use 0 or more"
            )
        if not 0 < background <= 1:
            raise UserError(
                f"distill: background is {background}, its weight beside 1 in a box; use above 0 to 1"
            )
        self.grid, self.rank, self.temperature = grid, rank, check_temperature(temperature)
        self.emphasis, self.background = emphasis, background

    def forward(self, student: View, teacher: View, targets: Targets) -> Tensor:
        if not teacher.feats:
            raise UserError(
                "distill.taps: a term that compares graphs of positions has no maps; name some"
            )
        with torch.autocast(student.images.device.type, enabled=False):
            ours = torch.stack(
                [self.graph(wide(student.feats[tap])) for tap in teacher.feats]
            )  # (L, N, M, M)
            theirs = torch.stack(
                [self.graph(wide(feat).detach()) for feat in teacher.feats.values()]
            )
            basis = self.weights(targets, student.images).to(theirs.dtype).sqrt()[
                ..., None
            ] * self.leading(theirs)
            difference, whole = basis.mT @ (ours - theirs) @ basis, basis.mT @ basis  # (L, N, R, R)
            return (
                (difference.square().sum((2, 3)) / (whole.square().sum((2, 3)) + TINY))
                .mean(1)
                .sum()
            )

    def graph(self, feat: Tensor) -> Tensor:
        """(N, C, H, W) -> A, (N, M, M), from features pooled to the grid."""
        rows, columns = (pooling(size, self.grid, feat) for size in feat.shape[2:])
        f = (rows.mT @ feat @ columns).flatten(2)  # (N, C, M)
        f = f - f.mean(2, keepdim=True)
        f = f / (f.square().mean(1, keepdim=True) + EPS).sqrt()
        gram = f.mT @ f / f.shape[1]  # (N, M, M)
        own = gram.diagonal(dim1=1, dim2=2)
        affinity = ((gram - (own[:, :, None] + own[:, None, :]) / 2) / self.temperature).exp()
        degree = affinity.sum(2)  # (N, M), at least 1: the diagonal is
        root = degree.sqrt()
        return affinity / outer(root) - outer(root) / degree.sum(1)[:, None, None]

    @torch.no_grad()
    def leading(self, graph: Tensor) -> Tensor:
        """(L, N, M, M) -> U_R diag(lambda_R)^(emphasis / 2), (L, N, M, R); constant."""
        # eigh raises on NaN; the difference of the graphs still has it, and the loop skips such a
        # step
        values, vectors = torch.linalg.eigh(graph.nan_to_num(0.0, 0.0, 0.0))  # smallest first
        strength = values[..., None, -self.rank :].clamp(min=0) ** (self.emphasis / 2)
        return vectors[..., -self.rank :] * strength

    def weights(self, targets: Targets, images: Tensor) -> Tensor:
        """-> m, (N, M) in background..1."""
        height, width = images.shape[2:]
        x1, y1, x2, y2 = targets["boxes_xyxy"].unbind(2)  # (N, G)
        rows = overlap(y1 * self.grid / height, y2 * self.grid / height, self.grid)  # (N, G, grid)
        columns = overlap(x1 * self.grid / width, x2 * self.grid / width, self.grid)
        covered = (
            rows[..., :, None] * columns[..., None, :] * (targets["labels"] >= 0)[..., None, None]
        )
        return self.background + (1 - self.background) * covered.amax(1).flatten(1)


def outer(x: Tensor) -> Tensor:
    """(N, M) -> x x^T, (N, M, M)."""
    return x[:, :, None] * x[:, None, :]


def pooling(size: int, grid: int, like: Tensor) -> Tensor:
    """-> (size, grid): x @ this is the mean of x over `grid` equal parts of its length, whole cells
    or not.

    In place of adaptive_avg_pool2d, whose gradient differs from run to run on CUDA, and whose parts
    overlap."""
    edges = torch.arange(size + 1, device=like.device, dtype=like.dtype) * grid / size
    return overlap(edges[:-1], edges[1:], grid)


def overlap(start: Tensor, end: Tensor, cells: int) -> Tensor:
    """How much of each cell i..i+1, i < cells, lies in start..end: (...,) twice -> (..., cells) in
    0..1.
    """
    cell = torch.arange(cells, device=start.device, dtype=start.dtype)
    return (torch.minimum(end[..., None], cell + 1) - torch.maximum(start[..., None], cell)).clamp(
        min=0
    )
