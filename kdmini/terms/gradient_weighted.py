"""Gradient-weighted imitation: features follow the teacher's where its scores depend on them.

Source: the gradient attention of Zagoruyko & Komodakis, "Paying More Attention to Attention",
ICLR 2017, section 3.2, as the weight of an imitation: what the norm of the activations cannot
tell, where a detector has found something, the gradient of its scores can.
Simplified: theirs is the gradient of the loss at the input, and the map that is taught; here it
is that of the scores at the taps, and says where to imitate.
Legend: N images, C channels, H W cells, A cells of all levels (a one of them), K classes (k one
of them), l a tap, n an image, h w a cell, c a channel, S and T the aligned maps of student and
teacher, t_ak the class logits that the teacher's head makes of its maps.

    Z      = sum_a max_k sigmoid(t_ak)
    g_lnhw = sum_c (dZ / dT_lnchw)^2
    L      = sum_l mean_n [ sum_hw g_lnhw * mean_c (S_l - T_l)^2 / sum_hw g_lnhw ]

The taps are the maps that the head reads, in its order, and the head is run on them again.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kdmini.contracts import Targets, UserError, View
from kdmini.distill.align import Shapes
from kdmini.terms.pairs import aligned, confidence, weighted_mean, wide

EMPTY: Shapes = {}


class Head(NamedTuple):
    """Of the frozen teacher. A tuple hides it from nn.Module."""

    module: nn.Module
    network: Any  # for its class_maps


class GradientWeighted(nn.Module):
    """The squared difference of the maps, weighted by the gradient of the teacher's scores.

    head: the teacher's submodule that makes its preds of a list of maps, those of the taps.
    """

    uses = frozenset({"feats"})

    def __init__(
        self, teacher: nn.Module | None = None, shapes: Shapes = EMPTY, head: str = "model.23"
    ):
        super().__init__()
        self.head: Head | None = None
        if teacher is None:  # it is asked for by name, later
            return
        module = dict(teacher.named_modules()).get(head)
        if module is None or not hasattr(teacher, "class_maps"):
            raise UserError(
                f"distill: head: {type(teacher).__name__} has no {head!r}, or no class_maps(preds)"
            )
        self.head = Head(module, teacher)
        self.try_maps(shapes)

    @torch.no_grad()
    def try_maps(self, shapes: Shapes) -> None:
        """Raises UserError where the head cannot read maps of these shapes."""
        if not shapes or self.head is None:
            return
        weight = next(self.head.module.parameters())
        maps = [weight.new_zeros(1, channels, h, w) for _, channels, h, w in shapes.values()]
        try:
            self.scores(maps)
        except (RuntimeError, ValueError, IndexError) as error:
            raise UserError(
                f"distill.taps: the teacher's head does not read the maps of {', '.join(shapes)}; "
                "name those that it reads, in its order"
            ) from error

    def forward(self, student: View, teacher: View, targets: Targets) -> Tensor:
        pairs = aligned(student, teacher).values()
        weights = self.weights([feat.detach() for feat in teacher.feats.values()])
        each = []
        for (s, t), weight in zip(pairs, weights, strict=True):
            distance = (s - t).square().mean(1)  # (N, H, W)
            each.append(weighted_mean(distance, weight, "sample"))
        return torch.stack(each).sum()

    def weights(self, maps: list[Tensor]) -> list[Tensor]:
        """(N, C, H, W) of each tap -> g, (N, H, W), of mean 1 in each image."""
        each = []
        for gradient in torch.func.grad(self.scores)(maps):
            energy = wide(gradient).square().sum(1)
            # the scores of an image may depend on nothing; then all of its cells count alike
            energy = energy + torch.finfo(energy.dtype).tiny
            each.append(energy / energy.mean((1, 2), keepdim=True))
        return each

    def scores(self, maps: list[Tensor]) -> Tensor:
        """Z, of all images: scalar."""
        assert self.head is not None
        levels = self.head.network.class_maps(self.head.module(maps))
        return torch.stack([confidence(wide(level)).sum() for level in levels]).sum()
