"""Score-weighted imitation at `weight: 6`, `kd_scale: batch` against the competitor's
distillation at its default, `dis=6`: the same loss and the same gradients of the student's
maps, once its projector is taken out.
"""

from pathlib import Path

import pytest
import torch
from oracle import oracle
from torch import Tensor
from witness import witness

from kdmini.contracts import View
from kdmini.terms.score_weighted import ScoreWeighted

pytestmark = pytest.mark.parity

WEIGHT = 6.0
REG_MAX = 16
CLASSES = 5
LEVELS = ((8, 12), (4, 8), (2, 16))  # (H, channels) of a square map
BOUND = 1e-6  # relative, in float32
CASES = [(images, seed) for images in (1, 4) for seed in range(3)]

# argv: folder. Its own `loss`, with stubs in the place of both networks: the detection loss
# is 0 and the projector nothing. Reads folder/given.pt, writes folder/found.pt.
THEIRS = """
import sys
import torch
from torch import nn
from ultralytics import __version__
from ultralytics.cfg import DEFAULT_CFG
from ultralytics.nn.distill_model import DistillationModel

class Stub(nn.Module):
    def __init__(self, keep, maps):
        super().__init__()
        self.keep = keep
        self.maps = maps

    def forward(self, images):
        self.keep.update(enumerate(self.maps))

    def loss(self, batch, preds):
        return torch.zeros(1), {}

found = {"version": __version__}
for n, (student, teacher, scores) in enumerate(torch.load(sys.argv[1] + "/given.pt")):
    model = DistillationModel.__new__(DistillationModel)
    nn.Module.__init__(model)
    model._student_feats = {}
    model._teacher_feats = {}
    feats = [feat.requires_grad_() for feat in student]
    model.student_model = Stub(model._student_feats, feats)
    model.teacher_model = Stub(model._teacher_feats, [*teacher, {"scores": scores}])
    model.projector = nn.ModuleList(nn.Identity() for _ in feats)
    model.feats_idx = [16, 19, 22, 23]
    model.dis = DEFAULT_CFG.dis
    loss, _ = model.loss({"img": torch.zeros(len(scores), 3, 64, 64)})
    loss.sum().backward()
    found[str(n)] = [loss.sum().detach(), *(feat.grad for feat in feats)]
torch.save(found, sys.argv[1] + "/found.pt")
"""


def scene(images: int, seed: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """-> the student's maps, the teacher's, and its preds, (N, 4R + K, H, W) each."""
    rng = torch.Generator().manual_seed(seed)
    sizes = [(images, channels, side, side) for side, channels in LEVELS]
    student = [torch.randn(size, generator=rng) for size in sizes]
    teacher = [torch.randn(size, generator=rng) for size in sizes]
    width = 4 * REG_MAX + CLASSES
    preds = [3 * torch.randn(images, width, side, side, generator=rng) - 4 for side, _ in LEVELS]
    return student, teacher, preds


def ours(images: int, seed: int) -> list[Tensor]:
    """What the loop adds for it -> the loss, and its gradients by the student's maps."""
    student, teacher, preds = scene(images, seed)
    feats = [feat.requires_grad_() for feat in student]
    names = [f"model.{layer}" for layer in (16, 19, 22)]
    nothing = torch.zeros(images, 3, 64, 64)
    classes = [pred[:, 4 * REG_MAX :] for pred in preds]
    views = []
    for maps in (feats, teacher):
        views.append(View(dict(zip(names, maps, strict=True)), preds, nothing, classes))
    loss = images * WEIGHT * ScoreWeighted()(*views, {})  # type: ignore[typeddict-item]
    return [loss.detach(), *torch.autograd.grad(loss, feats)]


def test_its_distillation_is_ours_at_weight_6(tmp_path: Path) -> None:
    given = []
    for images, seed in CASES:
        student, teacher, preds = scene(images, seed)
        scores = torch.cat([pred[:, 4 * REG_MAX :].flatten(2) for pred in preds], 2)
        given.append((student, teacher, scores))
    torch.save(given, tmp_path / "given.pt")
    oracle(THEIRS, tmp_path, version="newest")

    found = torch.load(tmp_path / "found.pt")
    what = "Score-weighted imitation, weight 6 times N: loss and gradients, relative"
    against = f"ultralytics {found['version']}, dis=6"
    for n, (images, seed) in enumerate(CASES):
        for mine, other in zip(ours(images, seed), found[str(n)], strict=True):
            assert mine.shape == other.shape
            difference = ((mine - other).norm() / other.norm()).item()
            witness(what, against, difference, BOUND)
