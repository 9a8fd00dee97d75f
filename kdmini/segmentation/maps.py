"""What networks that give a map of logits have in common: loss, decoding, folding.

Legend: N images, S image size, K classes, H W cells of a map.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from kdmini.contracts import Losses, Prediction, Targets
from kdmini.segmentation.decoder import Decoder
from kdmini.segmentation.truth import VOID

# of red, green and blue; what public weights were trained with
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


class Segmenter(nn.Module):
    """A network whose `preds` are maps of logits, (N, K, H, W) each, of any size: the one
    that counts, then auxiliary ones.

    aux: what the loss of the auxiliary maps is multiplied by.
    """

    mean: Tensor
    std: Tensor
    stride = 32  # what the sides of the images must divide by

    def __init__(self, names: Sequence[str], aux: float = 0.4):
        super().__init__()
        self.names = list(names)
        self.aux = aux
        # not in the state_dict, as nothing learns them
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1), persistent=False)

    def normalised(self, images: Tensor) -> Tensor:
        """RGB 0..1 -> mean 0 and standard deviation 1, by ImageNet's."""
        return (images - self.mean) / self.std

    def loss(self, preds: Sequence[Tensor], targets: Targets) -> Losses:
        """-> {"ce": of the first map, "aux": of the others, times their gain}."""
        mask = targets["mask"]
        losses = {"ce": cross_entropy(preds[0], mask)}
        if len(preds) > 1:
            auxiliary = [cross_entropy(logits, mask) for logits in preds[1:]]
            losses["aux"] = self.aux * torch.stack(auxiliary).sum()
        return losses

    @torch.no_grad()
    def decode(self, preds: Sequence[Tensor]) -> list[Prediction]:
        """-> {"logits": (K, H, W)} of each image, in the cells of the first map."""
        return [{"logits": logits} for logits in preds[0]]

    def class_maps(self, preds: Sequence[Tensor]) -> list[Tensor]:
        """-> what a student learns from: the first map."""
        return [preds[0]]

    def make_head(self, channels: Sequence[int]) -> nn.Module:
        """A fresh head for maps of these channels: it reads all."""
        return PyramidHead(channels, len(self.names))

    def fold(self) -> Any:
        """Merges each BatchNorm into the convolution before it in an nn.Sequential, in place.

        For a frozen copy in eval mode.
        """
        sequences = [module for module in self.modules() if isinstance(module, nn.Sequential)]
        for sequence in sequences:
            for (first, conv), (second, norm) in pairwise(list(sequence.named_children())):
                if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                    setattr(sequence, first, fuse_conv_bn_eval(conv, norm))
                    setattr(sequence, second, nn.Identity())
        return self

    def hold_in(self, dtype: torch.dtype) -> None:
        """Keeps the weights of convolutions and linear layers in the type in which autocast
        computes them, in place.

        For a frozen copy: of weights that do not learn, autocast makes a copy at every step.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.to(dtype)


class PyramidHead(nn.Module):
    """A map of logits of several maps, in the cells of the first."""

    def __init__(self, channels: Sequence[int], num_classes: int):
        super().__init__()
        self.decoder = Decoder(channels, channels[0])
        self.classifier = nn.Conv2d(channels[0], num_classes, 1)

    def forward(self, feats: Sequence[Tensor]) -> list[Tensor]:
        """(N, C, H, W) each -> preds of one map."""
        return [self.classifier(self.decoder(feats))]


def cross_entropy(logits: Tensor, mask: Tensor) -> Tensor:
    """Of a map that is brought to the size of the mask, in float32.

    logits (N, K, H, W), mask (N, S, S) uint8 -> scalar: the sum over the pixels that are
    not void, divided by N * S * S. By the number of the others it would depend on which
    images share a batch. Rows, for the same in two dimensions is not deterministic on CUDA.
    """
    # channels last, so that the rows are a view
    logits = logits.float().contiguous(memory_format=torch.channels_last)
    logits = F.interpolate(logits, mask.shape[1:], mode="bilinear", align_corners=False)
    rows = logits.permute(0, 2, 3, 1).flatten(0, 2)  # (N * S * S, K)
    labels = mask.flatten().long()
    total = F.cross_entropy(rows, labels, ignore_index=VOID, reduction="sum")
    return total / labels.numel()
