"""Affinity distillation written out in loops, and once more without eigenvectors.

The letters are those of kdmini/terms/affinity.py.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tests.terms.views import IMAGES, Scene

GRID = 3  # positions a side
P = GRID**2
SIZE = (32, 64)  # height and width of the images
MAPS = {  # C, H, W
    "even": (4, 6, 6),
    "uneven": (5, 4, 5),
    "small": (3, 2, 4),  # its cells are shared out among the positions
}
TARGETS: Any = {
    "boxes_xyxy": torch.tensor(
        [
            [[5.0, 3.0, 30.0, 20.0], [25.0, 10.0, 60.0, 31.0], [0.0, 0.0, 64.0, 32.0]],
            [[40.0, 0.0, 64.0, 8.0], [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]],
        ]
    ),
    "labels": torch.tensor([[1, 0, -1], [2, -1, -1]]),
    "ids": ["one", "two"],
}


class Settings(NamedTuple):
    rank: int = 4
    emphasis: float = 1.0
    background: float = 0.25
    temperature: float = 0.25


class Span(NamedTuple):
    start: float
    end: float

    def common(self, other: "Span") -> float:
        """The length that both have in common."""
        return max(0.0, min(self.end, other.end) - max(self.start, other.start))


def part(index: int, count: int, length: float = 1.0) -> Span:
    """One of `count` equal parts of a length."""
    return Span(index * length / count, (index + 1) * length / count)


def features(feat: Tensor) -> list[Tensor]:
    """(C, H, W) -> z of each position."""
    _, height, width = feat.shape
    pooled = []
    for i in range(GRID):
        for j in range(GRID):
            total = torch.zeros(())
            for y in range(height):
                for x in range(width):
                    tall = part(i, GRID).common(part(y, height))
                    wide = part(j, GRID).common(part(x, width))
                    total = total + tall * wide * feat[:, y, x]
            pooled.append(total * P)

    mean = sum(pooled) / P
    z = []
    for position in pooled:
        centred = position - mean
        square = centred.dot(centred) + 1e-6 * len(centred)
        z.append(centred / square.sqrt())
    return z


def alike(a: Tensor, b: Tensor, temperature: float) -> Tensor:
    difference = a - b
    return (-difference.dot(difference) / (2 * temperature)).exp()


def plain_graph(feat: Tensor, temperature: float) -> Tensor:
    """(C, H, W) -> Q."""
    z = features(feat)
    affinity = [[alike(a, b, temperature) for b in z] for a in z]
    degrees: list[Any] = [sum(row) for row in affinity]
    rows = []
    for i in range(P):
        row = []
        for j in range(P):
            root = (degrees[i] * degrees[j]).sqrt()
            row.append(affinity[i][j] / root - root / sum(degrees))
        rows.append(torch.stack(row))
    return torch.stack(rows)


def plain_weights(n: int, background: float) -> list[float]:
    """v of image n."""
    height, width = SIZE
    boxes = TARGETS["boxes_xyxy"][n].tolist()
    labels = TARGETS["labels"][n].tolist()
    weights = []
    for i in range(GRID):
        for j in range(GRID):
            covered = [0.0]
            for (x1, y1, x2, y2), label in zip(boxes, labels, strict=True):
                if label >= 0:
                    tall = part(i, GRID, height).common(Span(y1, y2))
                    wide = part(j, GRID, width).common(Span(x1, x2))
                    covered.append(tall * wide * P / (height * width))
            weights.append(background + (1 - background) * max(covered))
    return weights


def plain_basis(graph: Tensor, v: list[float], rank: int, emphasis: float) -> list[Tensor]:
    """-> the columns of B, from the Laplacian of the graph: lowest eigenvalues first."""
    laplacian = np.eye(P) - graph.detach().numpy()
    eigenvalues, eigenvectors = np.linalg.eigh(laplacian)
    columns = []
    for k in range(rank):
        strength = (1 - eigenvalues[k]) ** (emphasis / 2)
        column = np.sqrt(v) * eigenvectors[:, k] * strength
        columns.append(torch.from_numpy(column))
    return columns


def plain(scene: Scene, settings: Settings) -> Any:
    rank, emphasis, background, temperature = settings
    total: Any = 0
    for tap in MAPS:
        for n in range(IMAGES):
            q_s = plain_graph(scene.student.feats[tap][n], temperature)
            q_t = plain_graph(scene.teacher.feats[tap][n], temperature).detach()
            basis = plain_basis(q_t, plain_weights(n, background), rank, emphasis)
            error: Any = 0
            whole = 0.0
            for a in basis:
                for b in basis:
                    error += a.dot((q_s - q_t) @ b) ** 2
                    whole += float(a.dot(b)) ** 2
            total += error / whole / IMAGES
    return total


def plain_without_eigenvectors(scene: Scene, background: float, temperature: float) -> Any:
    """Emphasis 2 and every eigenvalue that is not 0: B B^T = v^1/2 Q_T^2 v^1/2.

    Powers of the teacher's graph then say it all.
    """
    total: Any = 0
    for tap in MAPS:
        for n in range(IMAGES):
            q_s = plain_graph(scene.student.feats[tap][n], temperature)
            q_t = plain_graph(scene.teacher.feats[tap][n], temperature).detach()
            v = torch.tensor(plain_weights(n, background), dtype=torch.float64)
            root = torch.diag(v.sqrt())
            error = q_t @ root @ (q_s - q_t) @ root @ q_t
            whole = root @ q_t @ q_t @ root
            ratio = error.square().sum() / whole.square().sum()
            total += ratio / IMAGES
    return total
