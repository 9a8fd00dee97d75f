"""What a step of the main recipe takes of a card, counted on a pretended one:

python -m tests.cuda.count > bench/counted.json

YOLO11m into YOLO11s by attention on six taps, 640 px, bf16, mosaics of up to 48 objects,
nothing compiled, pixels on the card. Kernels and bytes are those of a step of 64 images;
memory is the line through the peaks of 32 and 64, the pixels left out.
"""

import json
import sys
from collections import defaultdict
from contextlib import redirect_stdout
from typing import Any

import torch

from bench.full import HEIGHT, WIDTH
from tests.cuda.scenario import Scenario, play

SMALL = 32
LARGE = 64
IMGSZ = 640
# configs/voc.yaml's, and what docs/small.md compares it with
PAIRS = {"distilled": "m", "student alone": None, "distilled from YOLO11s": "s"}


def counts() -> dict[str, Any]:
    """As bench/counted.json has them."""
    memory = {}
    step: dict[str, Any] = {}
    for name, teacher in PAIRS.items():
        peaks = {}
        for batch in (SMALL, LARGE):
            settings = {"teacher": teacher, "student": "s", "steps": 1, "objects": 12}
            found = play(Scenario(batch=batch, imgsz=IMGSZ, **settings))
            if found.error:
                raise RuntimeError(found.error)
            pictures = batch + batch + 1  # to learn from, and held out
            peaks[batch] = found.peak - 4 * WIDTH * HEIGHT * pictures
        image = (peaks[LARGE] - peaks[SMALL]) / (LARGE - SMALL)
        memory[name] = {"image": round(image), "fixed": round(peaks[LARGE] - LARGE * image)}
        step = step or parts_of(found.kernels, found.bytes)
    return {"torch": torch.__version__, "step": step, "memory": memory}


def parts_of(kernels: dict[str, int], moved: dict[str, int]) -> dict[str, Any]:
    """Part of a step -> its kernels, and the MB that it moves for an image."""
    parts: dict[str, Any] = defaultdict(dict)
    for phase, count in kernels.items():
        if phase.startswith("step") or phase == "batch, images":
            name = phase.split(", ")[-1].replace("step", "student")
            parts[name] = {"kernels": count, "MB": round(moved[phase] / LARGE / 1e6, 1)}
    return dict(parts)


if __name__ == "__main__":
    with redirect_stdout(sys.stderr):
        counted = counts()
    print(json.dumps(counted, indent=1))
