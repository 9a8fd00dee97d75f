"""What a number of a config may be. A range stands with its parameter, as in
`momentum: Annotated[float, Range(0, 1, below=True)]`: kdmini/typed.py holds the values of a
config to it, and docs/config.md prints it.

The highest numbers are no advice: they are beyond any use, so that a slip of the keyboard is
told from a setting.
"""

import math
from dataclasses import dataclass
from typing import Annotated


@dataclass(frozen=True)
class Range:
    """low to high, both included. NaN is in no range, infinity only where it is an end.

    above, below: the end itself is excluded. step: of an integer, which must divide by it.
    """

    low: float
    high: float
    above: bool = False
    below: bool = False
    step: int = 1

    def __contains__(self, value: float) -> bool:
        if not self.low <= value <= self.high:
            return False
        at_open_end = (self.above and value == self.low) or (self.below and value == self.high)
        divides = self.step == 1 or value % self.step == 0
        return divides and not at_open_end

    def __str__(self) -> str:
        low = f"above {in_words(self.low)}" if self.above else in_words(self.low)
        high = f"below {in_words(self.high)}" if self.below else in_words(self.high)
        multiple = f", a multiple of {self.step}" if self.step > 1 else ""
        return f"{low} to {high}{multiple}"


def in_words(number: float) -> str:
    if isinstance(number, int):
        return f"{number:,}"
    return ".inf" if math.isinf(number) else f"{number:g}"


Count = Annotated[int, Range(1, 10**9)]
Natural = Annotated[int, Range(0, 10**9)]
Epochs = Annotated[int, Range(1, 100_000)]
ImageSize = Annotated[int, Range(32, 8192, step=32)]  # 32 is the largest stride
Seed = Annotated[int, Range(0, 2**63 - 1)]

Share = Annotated[float, Range(0, 1)]
ShareBelowOne = Annotated[float, Range(0, 1, below=True)]
Zoom = Annotated[float, Range(0.01, 100)]
Gain = Annotated[float, Range(0, 1_000_000)]  # what a loss is multiplied by
Alpha = Annotated[float, Range(0.01, 100)]  # of a Beta distribution
Temperature = Annotated[float, Range(0.001, 1000)]
Power = Annotated[float, Range(0, 100)]
Bins = Annotated[int, Range(0, 256)]  # of a side of a box
