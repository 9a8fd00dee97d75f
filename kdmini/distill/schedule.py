"""lambda(t): how strongly a term counts in epoch t."""

from collections.abc import Sequence
from typing import Annotated, TypeAlias

from kdmini.bounds import Gain, Range
from kdmini.contracts import UserError

Start = Annotated[float, Range(0, 100_000)]
End = Annotated[float, Range(0, float("inf"))]
Segment: TypeAlias = tuple[Start, Gain, End, Gain]  # start epoch, value, end epoch, value


def check_segments(segments: Sequence[Sequence[float]]) -> None:
    """Raises UserError unless the segments [start, value, end, value] follow one another in
    time.
    """
    previous = -float("inf")
    for segment in segments:
        if len(segment) != 4 or not previous <= segment[0] < segment[2]:
            raise UserError(
                f"schedule: {list(segment)} is not [start epoch, value, end epoch, value] "
                f"after epoch {previous:g}"
            )
        previous = segment[2]


def piecewise_linear(segments: Sequence[Sequence[float]], epoch: float) -> float:
    """Value at `epoch` of segments [start, value at start, end, value at end], start
    included, end not.

    A segment that ends at infinity keeps its first value. Outside all segments the value
    is 0.
    """
    for start, first, end, last in segments:
        if start <= epoch < end:
            return first + (last - first) * (epoch - start) / (end - start)
    return 0.0
