"""Detections and objects of a few images, by hand and at random, for the metrics."""

import numpy as np
import torch
from numpy.typing import ArrayLike

from kdmini.detection.average_precision import DetectionMetric
from kdmini.detection.truth import Detections, Target

NAMES = ["cat", "dog", "bird", "boat"]
Scene = tuple[list[Detections], list[Target]]


def detections(boxes_xyxy: ArrayLike, scores: ArrayLike, labels: ArrayLike) -> Detections:
    return {
        "boxes_xyxy": torch.tensor(boxes_xyxy, dtype=torch.float32).reshape(-1, 4),
        "scores": torch.tensor(scores, dtype=torch.float32),
        "labels": torch.tensor(labels, dtype=torch.int64),
    }


def target(
    name: str,
    boxes_xyxy: ArrayLike,
    labels: ArrayLike,
    difficult: ArrayLike | None = None,
) -> Target:
    labels = np.array(labels, np.int64)
    if difficult is None:
        difficult = np.zeros(len(labels))
    return {
        "boxes_xyxy": np.array(boxes_xyxy, np.float32).reshape(-1, 4),
        "labels": labels,
        "difficult": np.array(difficult, bool),
        "id": name,
    }


def measure(scene: Scene, names: list[str] = NAMES, batch: int = 3) -> DetectionMetric:
    metric = DetectionMetric(names)
    all_detections, targets = scene
    for start in range(0, len(targets), batch):
        chosen = slice(start, start + batch)
        metric.update(all_detections[chosen], targets[chosen])
    return metric


def random_scene(
    seed: int,
    images: int = 12,
    per_object: float = 3,
    noise: int = 60,
    grid: bool = False,
) -> Scene:
    """Detections scattered about the objects, and noise. The last class has no objects.

    grid: whole pixels and four scores, so that boxes, IoUs and scores tie all over and
    IoUs fall exactly on thresholds.
    """
    rng = np.random.default_rng(seed)
    predictions = []
    targets = []
    for image in range(images):
        count = int(rng.integers(0, 9))
        boxes = random_boxes(rng, count, least=8)
        labels = rng.integers(0, len(NAMES) - 1, count)
        copies = np.repeat(np.arange(count), rng.poisson(per_object, count))
        near = boxes[copies] + rng.normal(0, 2.5, (len(copies), 4))
        stray = random_boxes(rng, int(rng.integers(0, noise)), least=4)
        stray_labels = rng.integers(0, len(NAMES), len(stray))
        guesses = np.vstack([near, stray])
        # boxes inside out have a test of their own
        guesses[:, 2:] = np.maximum(guesses[:, 2:], guesses[:, :2])
        scores = rng.uniform(0, 1, len(guesses))
        if grid:
            boxes = (boxes / 10).round() * 10
            guesses = (guesses / 10).round() * 10
            scores = (scores * 4).round() / 4
        guess_labels = np.concatenate([labels[copies], stray_labels])
        predictions.append(detections(guesses, scores, guess_labels))
        difficult = rng.uniform(size=count) < 0.3
        targets.append(target(f"{image:06d}", boxes, labels, difficult))
    return predictions, targets


def random_boxes(rng: np.random.Generator, count: int, least: float) -> np.ndarray:
    """(count, 4), with sides of `least` to 40 pixels."""
    corner = rng.uniform(0, 60, (count, 2))
    return np.hstack([corner, corner + rng.uniform(least, 40, (count, 2))])


SCENES = {
    **{f"random {seed}": random_scene(seed) for seed in range(6)},
    **{f"ties {seed}": random_scene(100 + seed, grid=True) for seed in range(6)},
    "crowded 0": random_scene(200, images=3, per_object=70),
    "crowded 1": random_scene(201, images=3, per_object=70, grid=True),
    "sparse": random_scene(300, images=20, per_object=0.2, noise=2),
}
