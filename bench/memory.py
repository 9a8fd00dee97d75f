"""What memory a training step needs, by batch size: counted on a pretended card, without a GPU.

`python -m bench.complexity` prints the table; tests/cuda/count.py counts.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from bench.meta import table

COUNTED = Path(__file__).with_name("counted.json")
CARDS = (8, 12, 16, 24, 40, 80)  # GiB
SIZES = (4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)  # of a batch
SHARE = 0.9  # of a card that can be filled; assumed
CONTEXT = 1.0  # GiB of CUDA, its libraries and workspaces; assumed
# bytes of VOC2012 and the test set of VOC2007, decoded, where they are kept on the card
STORED = 16.6e9


class Need(NamedTuple):
    """Bytes of a training step."""

    fixed: int  # weights, momentum, averages; CUDA is not in it
    image: int


def counted() -> dict[str, Any]:
    """What a step takes, as tests/cuda/count.py writes it."""
    return json.loads(COUNTED.read_text())


def needs() -> dict[str, Need]:
    """By what is trained."""
    return {name: Need(**numbers) for name, numbers in counted()["memory"].items()}


def largest(card: float, needed: Need, stored: float = 0) -> int:
    """The largest of SIZES that fits a card of `card` GiB, 0 where none does.

    stored: bytes of decoded photographs on it.
    """
    room = (SHARE * card - CONTEXT) * 2**30 - needed.fixed - stored
    return max((size for size in SIZES if size * needed.image <= room), default=0)


def sizing() -> str:
    """Batch sizes by card."""
    needed = needs()
    distilled = needed["distilled"]
    alone = needed["student alone"]
    rows: list[tuple] = []
    for card in CARDS:
        sizes = [
            largest(card, distilled),
            largest(card, alone),
            largest(card, distilled, STORED),
        ]
        rows.append((f"{card} GB", *(size or "-" for size in sizes)))
    head = ("card", "distilled", "student alone", "distilled, VOC on the card")
    lines = [in_words(name, numbers) for name, numbers in needed.items()]
    return f"{table(head, rows)}\n\n{', '.join(lines)}"


def in_words(name: str, needed: Need) -> str:
    return f"{name} {needed.fixed / 1e9:.2f} GB + {needed.image / 1e6:.0f} MB an image"
