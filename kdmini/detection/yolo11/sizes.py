"""How wide and how deep a YOLO11 of a scale is, as published."""

import math
from collections.abc import Sequence
from typing import Annotated, NamedTuple, TypeAlias

from kdmini.bounds import Range

SCALES = {  # depth, width, max channels
    "n": (0.50, 0.25, 1024),
    "s": (0.50, 0.50, 1024),
    "m": (0.50, 1.00, 512),
    "l": (1.00, 1.00, 512),
    "x": (1.00, 1.50, 512),
}

Depth = Annotated[float, Range(0.01, 4)]
Width = Annotated[float, Range(0.01, 4)]
MaxChannels = Annotated[float, Range(8, 8192)]
Scale: TypeAlias = str | tuple[Depth, Width, MaxChannels]  # str: a key of SCALES


class Sizes(NamedTuple):
    """What the layers are made with."""

    c64: int  # channels of what has 64 before scaling, and so on
    c128: int
    c256: int
    c512: int
    c1024: int
    repeats: int  # blocks in a C3k2 or C2PSA
    wide: bool  # C3k in every C3k2: in m, l and x


def sizes_of(scale: str | Sequence[float]) -> Sizes:
    """scale: a key of SCALES, or (depth, width, max channels)."""
    depth, width, max_channels = SCALES[scale] if isinstance(scale, str) else scale

    def scaled(channels: int) -> int:
        return math.ceil(min(channels, max_channels) * width / 8) * 8

    return Sizes(
        c64=scaled(64),
        c128=scaled(128),
        c256=scaled(256),
        c512=scaled(512),
        c1024=scaled(1024),
        repeats=max(round(2 * depth), 1),
        wide=width >= 1.0,
    )


# channels of layer 0, blocks in layer 2 -> scale
SCALE_OF = {(sizes_of(scale).c64, sizes_of(scale).repeats): scale for scale in SCALES}
