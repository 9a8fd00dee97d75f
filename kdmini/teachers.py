"""A frozen network from elsewhere, which teaches by its features: of torchvision, timm or
transformers, or made by a function of your own.

It knows nothing of the classes of the data, so it serves the terms that read feats alone.
Legend: N images, S image size, C channels, H W cells, L tokens.
"""

import math
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdmini import config
from kdmini.bounds import Natural, Range
from kdmini.contracts import UserError
from kdmini.typed import nearest, short
from kdmini.weightfile import fill
from kdmini.weights.state import read_state

Side = Annotated[int, Range(1, 8192)]
Mean = Annotated[float, Range(-1000, 1000)]
Deviation = Annotated[float, Range(0, 1000, above=True)]

LONGEST = 200  # characters of what another package says
# what torchvision and timm download weights by; torchvision's detectors do so by themselves
OFF = {"weights": None, "weights_backbone": None, "pretrained": False}


class Frozen(nn.Module):
    """A network as a teacher. Its taps are `network.NAME`, of any submodule NAME that gives one
    map, or one row of tokens.

    network: the section that makes it, `{build: package.module:Name, ...}`; weights are none of
        its settings.
    weights: a file of its state_dict, in the form of torch.save or safetensors.
    part: the submodule that is run, such as `backbone` of torchvision's detectors; null: all.
    imgsz: side that the images are resized to for it; null: `data.imgsz`.
    mean, std: of red, green and blue, by which its images were normalised.
    prefix: tokens before those of the patches: the class, and registers.
    channels_last: whether its maps are (N, H, W, C), as Swin's.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: dict[str, Any],
        weights: str | None = None,
        part: str | None = None,
        imgsz: Side | None = None,
        mean: tuple[Mean, Mean, Mean] = (0.485, 0.456, 0.406),
        std: tuple[Deviation, Deviation, Deviation] = (0.229, 0.224, 0.225),
        prefix: Natural = 1,
        channels_last: bool = False,
    ):
        super().__init__()
        self.names: list[str] = []  # of the classes of the data it predicts none
        self.network = make_network(network)
        self.imgsz = imgsz
        self.prefix = prefix
        self.channels_last = channels_last
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        modules = dict(self.network.named_modules())
        self.part = part or ""  # which names the whole
        if self.part not in modules:
            raise UserError(
                f"teacher.part: no submodule {self.part!r}; {nearest(self.part, modules)}"
            )
        if weights:
            fill(self.network, read_state(weights).tensors, weights)

    def forward(self, images: Tensor) -> None:
        """(N, 3, S, S) RGB 0..1. Runs the part, for the hooks on it."""
        if self.imgsz and images.shape[2] != self.imgsz:
            size = [self.imgsz, self.imgsz]
            images = F.interpolate(images, size, mode="bilinear", antialias=True)
        run = self.network.get_submodule(self.part)
        try:
            run((images - self.mean) / self.std)
        except (AssertionError, ValueError) as error:  # as a ViT refuses images of other sizes
            raise UserError(
                f"teacher.network cannot run on images of {images.shape[2]} px "
                f"({in_a_line(error)}); set teacher.imgsz"
            ) from error

    def to_map(self, name: str, output: Any) -> Any:
        """What a tapped submodule gives -> (N, C, H, W): tokens (N, L, C) without those before
        the patches, and maps (N, H, W, C) turned; all else as it is.

        Raises UserError where the patches are no square, or the map is none.
        """
        feat = output[0] if isinstance(output, tuple) else output
        if not isinstance(feat, Tensor) or feat.ndim not in (3, 4):
            return output
        if feat.ndim == 3:
            return self.map_of_tokens(name, feat)
        if self.channels_last:
            feat = feat.permute(0, 3, 1, 2)
        if feat.shape[2] != feat.shape[3]:
            raise UserError(
                f"distill.taps: {name!r} gives {list(output.shape)}, no square map (N, C, H, W); "
                f"set teacher.channels_last={str(not self.channels_last).lower()}, or name "
                "another layer"
            )
        return feat

    def map_of_tokens(self, name: str, tokens: Tensor) -> Tensor:
        """(N, L, C) -> (N, C, H, W)."""
        count = tokens.shape[1]
        side = math.isqrt(max(count - self.prefix, 0))
        if not side or self.prefix + side**2 != count:
            others = count - math.isqrt(count) ** 2
            raise UserError(
                f"distill.taps: {name!r} gives {count} tokens, and without teacher.prefix="
                f"{self.prefix} of them they fill no square; perhaps it is {others}"
            )
        return tokens[:, self.prefix :].mT.unflatten(2, (side, side))


def make_network(section: dict[str, Any]) -> nn.Module:
    """Without weights. Raises UserError where the section would download them."""
    if wanted := [key for key in OFF if section.get(key)]:
        raise UserError(
            f"teacher.network.{wanted[0]}: nothing is downloaded; leave it out, and name a file "
            "as teacher.weights"
        )
    try:
        network = config.build(section, "teacher.network", **OFF)
    except UserError:
        raise
    except Exception as error:  # whatever the constructor of somebody else trips over
        raise UserError(
            f"teacher.network: {short(section['build'])} fails ({in_a_line(error)}); correct its "
            "settings"
        ) from error
    if not isinstance(network, nn.Module):
        raise UserError(
            f"teacher.network.build: {short(section['build'])} makes no network but a "
            f"{type(network).__name__}; name a class or function that makes one"
        )
    return network


def in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:LONGEST]}"
