"""Affinity distillation: which positions belong together, in the teacher's spectrum.

Source: idea 2 of the research notes, after Kim et al., "Distilling Spectral Graph for
Object-Context Aware Open-Vocabulary Semantic Segmentation" (CASS), CVPR 2025; the graph
is that of Shi & Malik, "Normalized Cuts", 2000.
Legend: N images (n one of them), C channels, H W cells, G padded boxes, l a tap, P =
grid * grid positions (i, j two of them), E = `rank` eigenvectors kept, tau the
temperature, z_i the features of position i: mean over its part of the map, less the
mean of the image, of unit length (beside EPS).

    aff_ij = exp(-|z_i - z_j|^2 / (2 tau)) = exp((cos(z_i, z_j) - 1) / tau)
    d_i    = sum_j aff_ij
    Q_ij   = aff_ij / sqrt(d_i d_j) - u_i u_j,    u_i = sqrt(d_i / sum_j d_j)
    v_i    = background + (1 - background) * (largest share of i that one box covers)
    B      = diag(v)^1/2 U diag(mu)^(emphasis / 2)
    L      = sum_l mean_n ||B^T (Q_S - Q_T) B||^2 / ||B^T B||^2,    in 0..1 a tap

Q_S and Q_T are the graphs of student and teacher, U (P, E) and mu the eigenvectors of
Q_T with the largest eigenvalues, which lie in 0..1; norms are Frobenius norms.

The affinities stand in for self-attention: aff_ij / d_i is the softmax over the
positions. The graph's normalised Laplacian has the same eigenvectors with 1 - mu, and u
with 0. Every graph has its u, which shows no objects: it is left out, as in spectral
clustering, or it would outweigh the others. Large mu are the low frequencies of the
graph: whole objects.

The student is seen through the teacher's U, which is constant, and is never decomposed.
A gradient through eigenvectors has 1 / (mu - mu') in it: not finite where eigenvalues
are equal, as they are on flat maps. Eigenvalues alone have a gradient, but stay as they
are when positions change places: the object could be elsewhere. Within an eigenspace
the choice of U changes nothing, for B enters as B B^T; only where `rank` cuts through
one is it arbitrary what is kept.

Simplified: pairwise similarity in place of attention heads, so there are none to choose
among or to average; `rank` and `emphasis` are settings, where CASS has an energy-based
rank and a dynamic scaling of eigenvalues. Boxes as weights are the notes' own idea:
CASS trains nothing and has none.
All of it in float32 outside autocast. It compiles in one graph, with `eigh` as a call
to the library; on CUDA that call waits for the device to learn whether it converged, as
no other term does.
"""

from typing import Annotated

import torch
from torch import Tensor, nn

from kdmini.bounds import Power, Range, Temperature
from kdmini.contracts import Targets, UserError, View
from kdmini.terms.pairs import wide

TINY = 1e-12  # a teacher's map without any structure teaches nothing: L is 0, not NaN

# beside the mean square: bounds the gradient of a position that is as the image's mean
EPS = 1e-6


class AffinityDistillation(nn.Module):
    """The student's graph of positions against the teacher's, in its eigenvectors.

    grid: positions a side.
    rank: eigenvectors kept, of grid^2 - 1.
    temperature: tau; the smaller, the fewer positions are alike.
    emphasis: power of the eigenvalues; 0 counts all eigenvectors alike, more gives more
        to those of the larger ones.
    background: weight of a position outside all boxes; one inside has 1.
    """

    uses = frozenset({"feats"})

    def __init__(
        self,
        grid: Annotated[int, Range(2, 20)] = 8,
        rank: Annotated[int, Range(1, 20**2 - 1)] = 16,
        temperature: Temperature = 0.25,
        emphasis: Power = 1.0,
        background: Annotated[float, Range(0, 1, above=True)] = 0.25,
    ):
        super().__init__()
        most = grid**2 - 1
        if rank > most:
            raise UserError(
                f"distill: rank is {rank}, the eigenvectors kept of {most}; use 1 to {most}"
            )
        self.grid = grid
        self.rank = rank
        self.temperature = temperature
        self.emphasis = emphasis
        self.background = background

    def forward(self, student: View, teacher: View, targets: Targets) -> Tensor:
        if not teacher.feats:
            raise UserError(
                "distill.taps: a term that compares graphs of positions has no maps; name some"
            )
        with torch.autocast(student.images.device.type, enabled=False):
            student_graphs = []
            teacher_graphs = []
            for tap, feat in teacher.feats.items():
                student_graphs.append(self.graph(wide(student.feats[tap])))
                teacher_graphs.append(self.graph(wide(feat).detach()))
            q_s = torch.stack(student_graphs)  # (taps, N, P, P)
            q_t = torch.stack(teacher_graphs)

            v = self.weights(targets, student.images).to(q_t.dtype)  # (N, P)
            basis = v.sqrt()[..., None] * self.leading(q_t)  # (taps, N, P, E)
            error = square_norm(basis.mT @ (q_s - q_t) @ basis)  # (taps, N)
            whole = square_norm(basis.mT @ basis)
            return (error / (whole + TINY)).mean(1).sum()

    def graph(self, feat: Tensor) -> Tensor:
        """(N, C, H, W) -> Q, (N, P, P), from features pooled to the grid."""
        height, width = feat.shape[2:]
        rows = pooling(height, self.grid, feat)
        columns = pooling(width, self.grid, feat)
        z = (rows.mT @ feat @ columns).flatten(2)  # (N, C, P)
        z = z - z.mean(2, keepdim=True)
        z = z / (z.square().mean(1, keepdim=True) + EPS).sqrt()

        cosine = z.mT @ z / z.shape[1]  # (N, P, P)
        own = cosine.diagonal(dim1=1, dim2=2)  # (N, P), 1 but for EPS
        of_both = (own[:, :, None] + own[:, None, :]) / 2
        affinity = ((cosine - of_both) / self.temperature).exp()

        degree = affinity.sum(2)  # (N, P), at least 1: the diagonal is
        root = degree.sqrt()
        normalised = affinity / outer(root)
        constant = outer(root) / degree.sum(1)[:, None, None]  # u u^T
        return normalised - constant

    @torch.no_grad()
    def leading(self, graphs: Tensor) -> Tensor:
        """Q, (taps, N, P, P) -> U diag(mu)^(emphasis / 2), (taps, N, P, E), constant."""
        # eigh raises on NaN; the difference of the graphs still has it, and the loop
        # skips such a step
        finite = graphs.nan_to_num(0.0, 0.0, 0.0)
        eigenvalues, eigenvectors = torch.linalg.eigh(finite)  # smallest first
        mu = eigenvalues[..., None, -self.rank :].clamp(min=0)
        return eigenvectors[..., -self.rank :] * mu ** (self.emphasis / 2)

    def weights(self, targets: Targets, images: Tensor) -> Tensor:
        """-> v, (N, P) in background..1."""
        height, width = images.shape[2:]
        x1, y1, x2, y2 = targets["boxes_xyxy"].unbind(2)  # (N, G)
        rows = overlap(y1 * self.grid / height, y2 * self.grid / height, self.grid)
        columns = overlap(x1 * self.grid / width, x2 * self.grid / width, self.grid)

        covered = rows[..., :, None] * columns[..., None, :]  # (N, G, grid, grid)
        covered = covered * (targets["labels"] >= 0)[..., None, None]
        return self.background + (1 - self.background) * covered.amax(1).flatten(1)


def square_norm(matrices: Tensor) -> Tensor:
    """(..., E, E) -> (...): the squared Frobenius norm of each."""
    return matrices.square().sum((-2, -1))


def outer(x: Tensor) -> Tensor:
    """(N, P) -> x x^T, (N, P, P)."""
    return x[:, :, None] * x[:, None, :]


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
