"""Attention transfer, in float64: the research notes' code, the authors' two lines, and
torchdistill's two modes.

torchdistill's `paper` is our `sample` and its `code` our `mean_square`, both with factor 1. `notes`
is no constant
times either: it is the root of a sum over the batch, divided by the batch. With one image it is
`sample`."""

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
# The others' eps stands elsewhere (largest of norm and 1e-12). Where energies are large, neither
# counts.
LOUD = 100.0

# argv: folder. Reads folder/given.pt, [(student's feats, teacher's feats)]; writes folder/found.pt.
TORCHDISTILL = """
import sys
import torch
from torchdistill.losses.mid_level import ATLoss

def io(feats):
    return {f"tap{i}": {"output": feat} for i, feat in enumerate(feats)}

found = {}
for n, (student, teacher) in enumerate(torch.load(sys.argv[1] + "/given.pt", weights_only=True)):
    place = lambda i: {"path": f"tap{i}", "io": "output"}
    pairs = {str(i): {"student": place(i), "teacher": place(i)} for i in range(len(student))}
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
    return [(scale * s.detach()).requires_grad_() for s in student], [scale * t for t in teacher]


def slopes(loss: Any, student: list[Tensor]) -> list[Tensor]:
    """-> the loss and its gradients."""
    return [loss.detach(), *torch.autograd.grad(loss, student)]


def ours(
    reduction: Any, images: int, seed: int, scale: float = 1.0, p: float = 2.0
) -> list[Tensor]:
    student, teacher = feats_of(images, seed, scale)
    return slopes(loss_of(AttentionTransfer(reduction, p), student, teacher), student)


def relative(mine: Tensor, other: Tensor) -> float:
    assert mine.shape == other.shape and mine.dtype == other.dtype == torch.float64
    return ((mine - other).norm() / other.norm()).item()


def compare(mine: list[Tensor], others: list[Tensor], against: str, bound: float) -> None:
    for a, b in zip(mine, others, strict=True):
        witness("Attention transfer: loss and gradients, relative", against, relative(a, b), bound)


@pytest.mark.parametrize("p", [2.0, 1.0, 4.0])
def test_the_notes(p: float) -> None:
    for images, seed in CASES:
        student, teacher = feats_of(images, seed)
        for feat in student + teacher:
            # the eps is the same here, so quiet features must agree as well
            for scale in (1.0, 1e-4 ** (1 / p)):
                assert relative(attention_map(scale * feat, p), notes_map(scale * feat, p)) < 1e-12
        compare(
            ours("notes", images, seed, p=p),
            slopes(notes_loss(student, teacher, p), student),
            "notes",
            1e-12,
        )


def test_the_authors() -> None:
    for images, seed in CASES:
        student, teacher = feats_of(images, seed, LOUD)
        theirs = sum(
            (authors_map(s) - authors_map(t)).pow(2).mean()
            for s, t in zip(student, teacher, strict=True)
        )
        compare(
            ours("mean_square", images, seed, LOUD),
            slopes(theirs, student),
            "authors' two lines",
            1e-12,
        )


def test_torchdistill(tmp_path: Path) -> None:
    given = [feats_of(images, seed, LOUD) for images, seed in CASES]
    torch.save(
        [([s.detach() for s in student], teacher) for student, teacher in given],
        tmp_path / "given.pt",
    )
    oracle(TORCHDISTILL, tmp_path, version="torchdistill")
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    for n, (images, seed) in enumerate(CASES):
        for mode, reduction in (("paper", "sample"), ("code", "mean_square")):
            compare(
                ours(reduction, images, seed, LOUD),
                found[f"{mode} {n}"],
                f"torchdistill, {mode}",
                1e-12,
            )
        if images == 1:
            compare(
                ours("notes", images, seed, LOUD), found[f"paper {n}"], "torchdistill, paper", 1e-12
            )


def test_invariances() -> None:
    def same(mine: Tensor, other: Tensor) -> None:
        what = (
            "Attention transfer: scale, sign, order and copies of channels; batch split of `sample`"
        )
        witness(what, "invariance", relative(mine, other), 1e-12)

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
        parts = [
            loss_of(term, [s[n : n + 1] for s in student], [t[n : n + 1] for t in teacher])
            for n in range(images)
        ]
        same(torch.stack(parts).mean(), loss_of(term, student, teacher))
