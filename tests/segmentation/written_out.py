"""Mean IoU as the field computes it, pixel by pixel in loops, and random masks to score.

The rule is that of mmsegmentation's IoUMetric: void pixels are dropped first; intersection and
union of a class are summed over all images, then divided; means pass over 0 / 0.
"""

import math

import numpy as np
import torch

VOID = 255
Scene = tuple[list[dict], list[dict]]  # predictions and targets of a batch


def batch(*pairs: tuple[np.ndarray, np.ndarray], first: int = 0) -> Scene:
    """Of predicted and true masks."""
    predictions = []
    targets = []
    for number, (predicted, true) in enumerate(pairs, first):
        predictions.append({"mask": torch.from_numpy(np.array(predicted))})
        targets.append({"mask": np.array(true, np.uint8), "id": f"set/{number:06}"})
    return predictions, targets


def random_scene(seed: int, count: int, images: int = 5) -> Scene:
    """Images of unequal sizes, predictions that are often right, some of uint8, some of int64;
    of the classes the last is nowhere, the first but one is only predicted.
    """
    rng = np.random.default_rng(seed)
    pairs = []
    for number in range(images):
        size = rng.integers(3, 12, 2)
        true = rng.integers(0, count - 2, size).astype(np.uint8)
        true[true == 1] = 0
        predicted = np.where(rng.random(size) < 0.6, true, rng.integers(0, count - 1, size))
        true[rng.random(size) < 0.2] = VOID
        pairs.append((predicted.astype([np.uint8, np.int64][number % 2]), true))
    return batch(*pairs)


def scores(scene: Scene, count: int) -> dict[str, list[float]]:
    """iou, acc, images: a number for each class, NaN of nothing; and all: accuracy."""
    shared = [0.0] * count
    true_pixels = [0.0] * count
    predicted_pixels = [0.0] * count
    images = [0.0] * count
    for prediction, target in zip(*scene, strict=True):
        seen = set()
        for row in range(target["mask"].shape[0]):
            for column in range(target["mask"].shape[1]):
                true = int(target["mask"][row, column])
                predicted = int(prediction["mask"][row, column])
                if true == VOID:
                    continue
                seen.add(true)
                true_pixels[true] += 1
                predicted_pixels[predicted] += 1
                shared[true] += true == predicted
        for label in seen:
            images[label] += 1
    unions = [t + p - s for t, p, s in zip(true_pixels, predicted_pixels, shared, strict=True)]
    return {
        "iou": [divided(s, u) for s, u in zip(shared, unions, strict=True)],
        "acc": [divided(s, t) for s, t in zip(shared, true_pixels, strict=True)],
        "images": images,
        "all": [divided(sum(shared), sum(true_pixels))],
    }


def divided(part: float, whole: float) -> float:
    return part / whole if whole else math.nan
