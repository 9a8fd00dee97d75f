"""Affinity distillation: which positions belong together, in the teacher's spectrum.

Source: idea 2 of the research notes, after Kim et al., "Distilling Spectral Graph for
Object-Context Aware Open-Vocabulary Semantic Segmentation" (CASS), CVPR 2025; the graph
is that of Shi & Malik, "Normalized Cuts", 2000.
Legend: N images (n one of them), C channels, H W cells, G padded boxes, l a tap, P =
grid * grid positions (i, j two of them), E = `rank` eigenvectors kept, tau the
temperature, z_i the features of position i: mean over its part of the map, less the
mean of the image, of unit length (beside EPS).

    aff_ij = exp((cos(z_i, z_j) - 1) / tau),    or how much attention i and j pay each other
    d_i    = sum_j aff_ij
    Q_ij   = aff_ij / sqrt(d_i d_j) - u_i u_j,    u_i = sqrt(d_i / sum_j d_j)
    v_i    = background + (1 - background) * (largest share of i that one object covers)
    B      = diag(v)^1/2 U diag(mu)^(emphasis / 2)
    L      = sum_l mean_n ||B^T (Q_S - Q_T) B||^2 / ||B^T B||^2,    in 0..1 a tap for cosines

Q_S and Q_T are the graphs of student and teacher, U (P, E) and mu the eigenvectors of
Q_T with the largest eigenvalues, which lie in 0..1; norms are Frobenius norms.

Which graphs: of a pair of maps, those of similar positions, which stand in for
self-attention: aff_ij / d_i is the softmax over the positions. Where the teacher's tap is
its attention (`...attn.graph` of SegFormer), that is the teacher's graph; the student's
is then its state affinity, where its tap is one (`...mixer.graph` of VMamba), or of its
map the similarities or a learnt query and key. All are made in kdmini/terms/graphs.py.

The graph's normalised Laplacian has the same eigenvectors with 1 - mu, and u with 0, so
`matrix: normalised` is the one and the other. Every graph has its u, which shows no
objects: it is left out, as in spectral clustering, or it would outweigh the others. Large
mu are the low frequencies of the graph: whole objects. With `laplacian` Q is
1 - (D - aff) / mean d, less its constant vector; with `adjacency` aff / mean d: in both a
position counts by its degree.

The student is seen through the teacher's U, which is constant, and is never decomposed.
A gradient through eigenvectors has 1 / (mu - mu') in it: not finite where eigenvalues
are equal, as they are on flat maps. Eigenvalues alone have a gradient, but stay as they
are when positions change places: the object could be elsewhere. Within an eigenspace
the choice of U changes nothing, for B enters as B B^T; only where `rank` cuts through
one is it arbitrary what is kept.

Objects are those of the truth: boxes, or of a mask the classes but the first, which is
the background. Void is in no object.

Simplified: `rank` and `emphasis` are settings, where CASS has an energy-based rank and a
dynamic scaling of eigenvalues. Heads are averaged before the decomposition. Objects as
weights are the notes' own idea: CASS trains nothing and has none.
All of it in float32 outside autocast. It compiles in one graph, with `eigh` as a call
to the library; on CUDA that call waits for the device to learn whether it converged, as
no other term does.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from kdmini.bounds import Count, Power, Range, Temperature
from kdmini.contracts import Targets, UserError, View
from kdmini.distill.align import Shapes
from kdmini.distill.taps import is_graph
from kdmini.terms.graphs import (
    Matrix,
    QueryKey,
    matrix_of,
    of_objects,
    overlap,
    pooled,
    pooling,
    similarity,
    symmetric,
)
from kdmini.terms.pairs import wide

TINY = 1e-12  # a teacher's map without any structure teaches nothing: L is 0, not NaN


class AffinityDistillation(nn.Module):
    """The student's graph of positions against the teacher's, in its eigenvectors.

    grid: positions a side.
    rank: eigenvectors kept, of grid^2 - 1.
    temperature: tau of a graph of similar positions; the smaller, the fewer are alike.
    emphasis: power of the eigenvalues; 0 counts all eigenvectors alike, more gives more
        to those of the larger ones.
    background: weight of a position outside all objects; one inside has 1.
    matrix: `normalised` by the degrees, the `laplacian` that is not, or `adjacency`.
    heads: of the teacher's attention, how many are kept: those that hold objects together
        best; all where it is null.
    student_graph: of a map that an attention teaches, by `similarity`, or by `query_key`,
        which are learnt.
    """

    uses = frozenset({"feats", "targets"})

    def __init__(  # noqa: PLR0913 - its parameters are the schema
        self,
        grid: Annotated[int, Range(2, 20)] = 8,
        rank: Annotated[int, Range(1, 20**2 - 1)] = 16,
        temperature: Temperature = 0.25,
        emphasis: Power = 1.0,
        background: Annotated[float, Range(0, 1, above=True)] = 0.25,
        matrix: Matrix = "normalised",
        heads: Count | None = None,
        student_graph: Literal["similarity", "query_key"] = "similarity",
        graphs: Shapes | None = None,
        names: Sequence[str] = (),
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
        self.matrix: Matrix = matrix
        self.heads = heads
        self.num_classes = len(names)

        channels = {tap: shape[0] for tap, shape in (graphs or {}).items() if not is_graph(tap)}
        learnt = student_graph == "query_key"
        if learnt and not channels:
            raise UserError(
                "distill.taps: query_key is for a map of the student that a graph of the teacher's "
                "teaches; pair one with the other, or use student_graph: similarity"
            )
        self.learnt = list(channels) if learnt else []
        self.query_keys = nn.ModuleList(QueryKey(channels[tap], grid) for tap in self.learnt)

    def forward(self, student: View, teacher: View, targets: Targets) -> Tensor:
        if not teacher.feats and not teacher.graphs:
            raise UserError(
                "distill.taps: a term that compares graphs of positions has no maps; name some"
            )
        with torch.autocast(student.images.device.type, enabled=False):
            regions = self.regions(targets, student.images)  # (N, R, P)
            student_graphs = []
            teacher_graphs = []
            for tap, feat in teacher.feats.items():
                student_graphs.append(self.graph(wide(student.feats[tap])))
                teacher_graphs.append(self.graph(wide(feat).detach()))
            for tap, weights in (teacher.graphs or {}).items():
                student_graphs.append(self.taught(tap, wide((student.graphs or {})[tap])))
                teacher_graphs.append(self.attention(wide(weights).detach(), regions))
            q_s = torch.stack(student_graphs)  # (taps, N, P, P)
            q_t = torch.stack(teacher_graphs)

            v = self.weights(regions).to(q_t.dtype)  # (N, P)
            basis = v.sqrt()[..., None] * self.leading(q_t)  # (taps, N, P, E)
            error = square_norm(basis.mT @ (q_s - q_t) @ basis)  # (taps, N)
            whole = square_norm(basis.mT @ basis)
            return (error / (whole + TINY)).mean(1).sum()

    def graph(self, feat: Tensor) -> Tensor:
        """(N, C, H, W) -> Q, (N, P, P), from features pooled to the grid."""
        return matrix_of(similarity(feat, self.grid, self.temperature), self.matrix)

    def attention(self, weights: Tensor, regions: Tensor) -> Tensor:
        """Of the teacher, (N, heads, L, M) -> Q, (N, P, P)."""
        weights = pooled(weights, self.grid)
        if self.heads is not None:
            weights = of_objects(weights, regions.to(weights.dtype), self.heads)
        return matrix_of(symmetric(weights), self.matrix)

    def taught(self, tap: str, feat: Tensor) -> Tensor:
        """Of the student, where the teacher has its attention: its own weights, or a map -> Q."""
        if is_graph(tap):
            return matrix_of(symmetric(pooled(feat, self.grid)), self.matrix)
        if tap in self.learnt:
            query_key = self.query_keys[self.learnt.index(tap)]
            return matrix_of(symmetric(query_key(feat)), self.matrix)
        return self.graph(feat)

    @torch.no_grad()
    def leading(self, graphs: Tensor) -> Tensor:
        """Q, (taps, N, P, P) -> U diag(mu)^(emphasis / 2), (taps, N, P, E), constant."""
        # eigh raises on NaN; the difference of the graphs still has it, and the loop
        # skips such a step
        finite = graphs.nan_to_num(0.0, 0.0, 0.0)
        eigenvalues, eigenvectors = torch.linalg.eigh(finite)  # smallest first
        mu = eigenvalues[..., None, -self.rank :].clamp(min=0)
        return eigenvectors[..., -self.rank :] * mu ** (self.emphasis / 2)

    def weights(self, regions: Tensor) -> Tensor:
        """(N, R, P) -> v, (N, P) in background..1"""
        return self.background + (1 - self.background) * regions.amax(1)

    def regions(self, targets: Targets, images: Tensor) -> Tensor:
        """-> how much of a position each object covers, (N, R, P) in 0..1: R boxes or classes."""
        if "mask" in targets:
            return self.of_mask(targets["mask"], images.dtype)
        height, width = images.shape[2:]
        x1, y1, x2, y2 = targets["boxes_xyxy"].unbind(2)  # (N, R)
        rows = overlap(y1 * self.grid / height, y2 * self.grid / height, self.grid)
        columns = overlap(x1 * self.grid / width, x2 * self.grid / width, self.grid)

        covered = rows[..., :, None] * columns[..., None, :]  # (N, R, grid, grid)
        covered = covered * (targets["labels"] >= 0)[..., None, None]
        return covered.flatten(2)

    def of_mask(self, mask: Tensor, dtype: torch.dtype) -> Tensor:
        """(N, S, S) uint8 -> (N, R, P), class by class, so that one plane is held at a time."""
        like = torch.empty(0, dtype=dtype, device=mask.device)
        rows = pooling(mask.shape[1], self.grid, like)
        columns = pooling(mask.shape[2], self.grid, like)
        covered = []
        for label in range(1, max(self.num_classes, 2)):  # 0 is the background
            inside = (mask == label).to(dtype)
            covered.append((rows.mT @ inside @ columns).flatten(1))
        return torch.stack(covered, 1)


def square_norm(matrices: Tensor) -> Tensor:
    """(..., E, E) -> (...): the squared Frobenius norm of each."""
    return matrices.square().sum((-2, -1))
