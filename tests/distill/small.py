"""A small pair of networks, and a term that watches."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kdmini.contracts import Targets, View
from kdmini.distill.step import Distillation, Weighted, tap_shapes

TAPS = {"stem": "stem", "deep": "deep"}
NO_TARGETS: Any = {}
IMGSZ = 32


class Small(nn.Module):
    """A detector that counts how often it is run. It has BatchNorm, and no `fold`."""

    def __init__(self, width: int, names: tuple[str, ...] = ("cat", "dog")):
        super().__init__()
        self.names = list(names)
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU())
        self.deep = nn.Sequential(nn.Conv2d(width, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Conv2d(8, 4, 1)
        self.runs = {"forward": 0, "features": 0}

    def forward(self, images: Tensor) -> Tensor:
        self.runs["forward"] += 1
        return self.head(self.deep(self.stem(images)))

    def features(self, images: Tensor) -> None:
        self.runs["features"] += 1
        self.deep(self.stem(images))


def pair(**teacher: Any) -> tuple[Small, Small]:
    """-> student, teacher; the BatchNorm statistics of the teacher have moved."""
    torch.manual_seed(0)
    student = Small(4)
    other = Small(6, **teacher)
    other.train()(torch.rand(8, 3, 16, 16))
    other.runs["forward"] = 0
    return student, other


def images(count: int = 2, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, IMGSZ, IMGSZ, generator=generator)


class Probe(nn.Module):
    """A term that notes what it sees, and returns its one parameter."""

    def __init__(self, value: float = 1.0, uses: frozenset[str] = frozenset({"feats"})):
        super().__init__()
        self.uses = uses
        self.value = nn.Parameter(torch.tensor(value))
        self.views: list[tuple[View, View | None]] = []  # of student and teacher
        self.targets: list[Targets] = []

    def forward(self, student: View, teacher: View | None, targets: Targets) -> Tensor:
        self.views.append((student, teacher))
        self.targets.append(targets)
        return self.value * 1


def distil(
    student: Any, teacher: Any, terms: Mapping[str, Any], taps: Any = TAPS, **settings: Any
) -> Distillation:
    """Terms that are not Weighted count as they are."""
    shapes = tap_shapes(student, teacher, taps, IMGSZ) if teacher else {}
    if isinstance(teacher, Small):
        teacher.runs["forward"] = 0
    weighted = {}
    for name, term in terms.items():
        weighted[name] = term if isinstance(term, Weighted) else Weighted(term, 1.0)
    return Distillation(student, teacher, weighted, taps, shapes, **settings)
