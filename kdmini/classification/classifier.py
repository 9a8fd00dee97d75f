"""What networks that say one class of an image have in common: loss, decoding, weights.

Legend: N images, K classes, J parts of an image, C channels, H W cells of a map.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from kdmini.checkpoint import misfit
from kdmini.classes import listed, source_rows
from kdmini.contracts import Losses, Prediction, Targets, UserError
from kdmini.typed import short
from kdmini.weightfile import fill
from kdmini.weights.state import State, read_state

# of red, green and blue; what public weights were trained with
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

HEAD = ("fc.weight", "fc.bias")


class Classifier(nn.Module):
    """A network whose `preds` are the logits of an image, (N, K).

    A subclass makes `body(images)`, which gives the last map, and `fc`, the linear layer on the
    mean of its cells.
    """

    mean: Tensor
    std: Tensor
    fc: nn.Linear
    card: dict[str, Any]

    def __init__(self, names: Sequence[str], label_smoothing: float = 0.0):
        super().__init__()
        self.names = list(names)
        self.label_smoothing = label_smoothing
        self.unread: list[str] = []
        # not in the state_dict, as nothing learns them
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1), persistent=False)

    def body(self, images: Tensor) -> Tensor:
        """(N, 3, S, S), normalised -> (N, C, H, W)."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, S, S) RGB 0..1 -> preds."""
        return self.fc(self.body((images - self.mean) / self.std).mean((2, 3)))

    def features(self, images: Tensor) -> None:
        """Runs all but the head, for the hooks."""
        self.body((images - self.mean) / self.std)

    def loss(self, preds: Tensor, targets: Targets) -> Losses:
        """-> {"ce": the mean over the images of sum_j share_j CE(label_j)}, in float32."""
        logits = preds.float()
        parts = F.one_hot(targets["labels"], len(self.names))  # (N, J, K)
        wanted = (parts * targets["share"].unsqueeze(2)).sum(1).to(logits)
        ce = F.cross_entropy(logits, wanted, label_smoothing=self.label_smoothing)
        return {"ce": ce}

    @torch.no_grad()
    def decode(self, preds: Tensor) -> list[Prediction]:
        """-> {"scores": (K,)} of each image, which sum to 1."""
        return [{"scores": scores} for scores in preds.float().softmax(1)]

    def class_maps(self, preds: Tensor) -> list[Tensor]:
        """-> one map of one cell, (N, K, 1, 1)."""
        return [preds[:, :, None, None]]

    def make_head(self, channels: Sequence[int]) -> nn.Module:
        """A fresh head for maps of these channels: it reads the last."""
        return LastMapHead(channels[-1], len(self.names))

    def fold(self) -> Any:
        """Merges each BatchNorm into the convolution that stands, and runs, before it, in place.

        For a frozen copy in eval mode.
        """
        for module in list(self.modules()):
            for (first, conv), (second, norm) in pairwise(list(module.named_children())):
                if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                    setattr(module, first, fuse_conv_bn_eval(conv, norm))
                    setattr(module, second, nn.Identity())
        return self

    def read(self, path: str, categories: Sequence[str] = ()) -> None:
        """Fills the network from a best.pt of it, or from a state_dict of its keys; the head by
        the names of the classes. Prints what becomes of the head; raises UserError.

        categories: the classes of a state_dict whose head has as many rows.
        """
        state = read_state(path)
        known = names_in(state, self.card, categories)
        row_of = source_rows(known, self.names)
        own = self.state_dict()
        for key in HEAD:
            rows = own[key].clone()
            of_file = state.tensors.get(key, rows)
            if of_file.shape[1:] != rows.shape[1:]:
                raise UserError(
                    f"{state.path} has another width in {key}; name a file of {self.card}"
                )
            rows[list(row_of)] = of_file[list(row_of.values())]
            state.tensors[key] = rows
        fill(self, state.tensors, str(state.path))
        self.unread = [name for row, name in enumerate(self.names) if row not in row_of]
        if known != self.names:
            print(
                f"{state.path.name}: the head has {len(row_of)} of {len(self.names)} classes by "
                f"name; new: {listed(self.unread)}"
            )


class LastMapHead(nn.Module):
    """Logits of the mean over the cells of the last of several maps."""

    def __init__(self, channels: int, num_classes: int):
        super().__init__()
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, feats: Sequence[Tensor]) -> Tensor:
        """(N, C, H, W) each -> (N, K)."""
        return self.fc(feats[-1].mean((2, 3)))


def names_in(state: State, card: dict[str, Any], categories: Sequence[str]) -> list[str]:
    """The classes of the rows of a file's head; none where nothing states them.

    Raises UserError for the best.pt of another network.
    """
    shapes = [list(state.tensors[key].shape[:1]) for key in HEAD if key in state.tensors]
    if not state.best:
        return list(categories) if shapes == [[len(categories)]] * 2 else []
    of_file = state.best.get("card")
    # misfit first, for a tensor in the place of a number has no single answer to `!=`
    if misfit(card, of_file) or of_file != card:
        raise UserError(
            f"{state.path} is of {short(of_file)}, the config says {card}: change one of them"
        )
    names: Any = state.best.get("names")
    are_texts = type(names) is list and all(type(name) is str for name in names)
    if not are_texts or shapes != [[len(names)]] * 2:
        raise UserError(f"{state.path} does not name the classes of its head; name another file")
    return names
