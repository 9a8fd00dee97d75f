"""Attention transfer, in float64, against the research notes' code, the authors' two lines
and torchdistill's two modes.

torchdistill's `paper` is our `sample` and its `code` our `mean_square`, both with factor 1.
`notes` is no constant times either: it is the root of a sum over the batch, divided by the
batch. With one image it is `sample`.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import oracle
from torch import Tensor
from witness import witness

from kdmini.distill.attention import AttentionTransfer, attention_map
from tests.distill.test_attention import authors_map, loss_of, notes_loss, notes_map, pair

pytestmark = pytest.mark.parity

CASES = [(images, seed) for images in (1, 3, 8) for seed in range(4)]
BOUND = 1e-12
# The others' eps stands elsewhere (largest of norm and 1e-12). Where energies are large,
# neither counts.
LOUD = 100.0

# argv: folder. Reads folder/given.pt, [(student's feats, teacher's feats)]; writes
# folder/found.pt.
TORCHDISTILL = """
import sys
import torch
from torchdistill.losses.mid_level import ATLoss

def io(feats):
    return {f"tap{i}": {"output": feat} for i, feat in enumerate(feats)}

def path(i):
    return {"path": f"tap{i}", "io": "output"}

found = {}
for n, (student, teacher) in enumerate(torch.load(sys.argv[1] + "/given.pt", weights_only=True)):
    pairs = {str(i): {"student": path(i), "teacher": path(i)} for i in range(len(student))}
    for mode in ("paper", "code"):
        feats = [feat.detach().clone().requires_grad_() for feat in student]
        loss = ATLoss(pairs, mode)(io(feats), io(teacher))
        loss.backward()
        found[f"{mode} {n}"] = [loss.detach(), *(feat.grad for feat in feats)]
torch.save(found, sys.argv[1] + "/found.pt")
"""


def feats_of(images: int, seed: int, scale: float = 1.0) -> tuple[list[Tensor], list[Tensor]]:
    """Feats of student and teacher at three taps; the student's take gradients."""
    student, teacher = pair(images, seed)
    scaled = [(scale * feat.detach()).requires_grad_() for feat in student]
    return scaled, [scale * feat for feat in teacher]


def slopes(loss: Any, student: list[Tensor]) -> list[Tensor]:
    """-> the loss and its gradients."""
    return [loss.detach(), *torch.autograd.grad(loss, student)]


def ours(
    reduction: Any, images: int, seed: int, scale: float = 1.0, p: float = 2.0
) -> list[Tensor]:
    student, teacher = feats_of(images, seed, scale)
    return slopes(loss_of(AttentionTransfer(reduction, p), student, teacher), student)


def relative(mine: Tensor, other: Tensor) -> float:
    assert mine.shape == other.shape
    assert mine.dtype == other.dtype == torch.float64
    return ((mine - other).norm() / other.norm()).item()


def compare(mine: list[Tensor], others: list[Tensor], against: str) -> None:
    what = "Attention transfer: loss and gradients, relative"
    for one, other in zip(mine, others, strict=True):
        witness(what, against, relative(one, other), BOUND)


@pytest.mark.parametrize("p", [2.0, 1.0, 4.0])
def test_the_notes(p: float) -> None:
    for images, seed in CASES:
        student, teacher = feats_of(images, seed)
        for feat in student + teacher:
            # the eps is the same here, so quiet features must agree as well
            for scale in (1.0, 1e-4 ** (1 / p)):
                scaled = scale * feat
                assert relative(attention_map(scaled, p), notes_map(scaled, p)) < BOUND
        theirs = slopes(notes_loss(student, teacher, p), student)
        compare(ours("notes", images, seed, p=p), theirs, "notes")


def test_the_authors() -> None:
    for images, seed in CASES:
        student, teacher = feats_of(images, seed, LOUD)
        loss: Any = 0
        for s, t in zip(student, teacher, strict=True):
            loss = loss + (authors_map(s) - authors_map(t)).pow(2).mean()
        theirs = slopes(loss, student)
        compare(ours("mean_square", images, seed, LOUD), theirs, "authors' two lines")


def test_torchdistill(tmp_path: Path) -> None:
    given = []
    for images, seed in CASES:
        student, teacher = feats_of(images, seed, LOUD)
        given.append(([feat.detach() for feat in student], teacher))
    torch.save(given, tmp_path / "given.pt")
    oracle(TORCHDISTILL, tmp_path, version="torchdistill")
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    for n, (images, seed) in enumerate(CASES):
        paper = found[f"paper {n}"]
        compare(ours("sample", images, seed, LOUD), paper, "torchdistill, paper")
        code = found[f"code {n}"]
        compare(ours("mean_square", images, seed, LOUD), code, "torchdistill, code")
        if images == 1:
            compare(ours("notes", images, seed, LOUD), paper, "torchdistill, paper")


def same(mine: Tensor, other: Tensor) -> None:
    what = "Attention transfer: scale, sign, order and copies of channels; batch split of `sample`"
    witness(what, "invariance", relative(mine, other), BOUND)


def test_invariances() -> None:
    for images, seed in CASES:
        student, teacher = feats_of(images, seed, LOUD)
        for feat in student + teacher:
            found = attention_map(feat)
            same(attention_map(37.5 * feat), found)
            same(attention_map(-feat), found)
            same(attention_map(feat[:, torch.randperm(feat.shape[1])]), found)
            same(attention_map(torch.cat([feat, feat], 1)), found)
            assert relative(attention_map(feat.flip(3)), found) > 0.1  # but the places matter

        term = AttentionTransfer("sample")
        parts = []
        for n in range(images):
            one_student = [feat[n : n + 1] for feat in student]
            one_teacher = [feat[n : n + 1] for feat in teacher]
            parts.append(loss_of(term, one_student, one_teacher))
        same(torch.stack(parts).mean(), loss_of(term, student, teacher))
