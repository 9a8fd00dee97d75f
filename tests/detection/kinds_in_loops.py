"""Kinds of error one detection and one object at a time, and mended in the scene itself."""

import math
from dataclasses import dataclass

import numpy as np
import torch

from kdmini.detection.matching import MAX_DETECTIONS
from tests.detection.reference_scores import detections_of, objects_of
from tests.detection.scenes import Scene, measure


@dataclass
class Thing:
    box: list[float]
    label: int
    difficult: bool
    image: int
    found: bool = False
    meant: bool = False  # a detection of the wrong place or class is about it


@dataclass
class Guess:
    row: int  # among the detections of its image
    image: int
    label: int
    score: float
    box: list[float]
    kind: str = ""
    thing: Thing | None = None  # that it is about


def things_of(scene: Scene) -> list[Thing]:
    return [
        Thing(box, label, difficult, image)
        for image, target in enumerate(scene[1])
        for box, label, difficult in objects_of(target)
    ]


def judged(scene: Scene) -> tuple[list[Guess], list[Thing]]:
    things = things_of(scene)
    guesses: list[Guess] = []
    rows: dict[int, int] = {}
    for image, label, score, box in detections_of(scene):
        rows[image] = rows.get(image, -1) + 1
        guesses.append(Guess(rows[image], image, label, score, box))
    guesses.sort(key=lambda guess: -guess.score)

    seen: dict[tuple[int, int], int] = {}
    kept = []
    for guess in guesses:
        key = (guess.image, guess.label)
        seen[key] = seen.get(key, 0) + 1
        if seen[key] <= MAX_DETECTIONS:
            kept.append(guess)
    for guess in kept:
        look(guess, [thing for thing in things if thing.image == guess.image])
    return kept, things


def look(guess: Guess, things: list[Thing]) -> None:
    """A surer detection has already taken what it found."""
    own = [thing for thing in things if thing.label == guess.label]
    others = [thing for thing in things if thing.label != guess.label]
    free = [thing for thing in own if not thing.found and iou(guess.box, thing.box) >= 0.5]
    best: tuple = ()
    for thing in free:
        worth = (not thing.difficult, iou(guess.box, thing.box))
        if not best or worth >= best:
            best = worth
            guess.thing = thing
    if guess.thing:
        guess.kind = "hit"
        guess.thing.found = True
        return

    own_best, own_iou = nearest(guess, own)
    other_best, other_iou = nearest(guess, others)
    if 0.1 <= own_iou < 0.5:
        guess.kind = "place"
        guess.thing = own_best
    elif other_iou >= 0.5:
        guess.kind = "class"
        guess.thing = other_best
    elif own_iou >= 0.5:
        guess.kind = "double"
    elif other_iou >= 0.1:
        guess.kind = "both"
    else:
        guess.kind = "background"
    if guess.thing:
        guess.thing.meant = True


def nearest(guess: Guess, things: list[Thing]) -> tuple[Thing | None, float]:
    best = None
    largest = 0.0
    for thing in things:
        overlap = iou(guess.box, thing.box)
        if overlap > largest:
            best = thing
            largest = overlap
    return best, largest


def iou(a: list[float], b: list[float]) -> float:
    width = max(min(a[2], b[2]) - max(a[0], b[0]), 0)
    height = max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    inter = width * height
    union = area(a) + area(b) - inter
    return inter / union if union else math.nan


def area(box: list[float]) -> float:
    return max(box[2] - box[0], 0) * max(box[3] - box[1], 0)


def is_missed(thing: Thing) -> bool:
    return not (thing.difficult or thing.found or thing.meant)


def ap_if_mended(scene: Scene, kind: str) -> float:
    """The scene without such errors, scored by the metric; without difficult objects, too, and
    what is about them, or a second detection of one would take it.
    """
    guesses, things = judged(scene)
    standing: list[tuple[Thing, Guess]] = []  # the surest for each thing
    kept: list[Guess] = []
    for guess in guesses:
        stands = guess.kind == "hit" or (guess.kind == kind and guess.thing)
        if not stands:
            kept += [guess] if guess.kind != kind else []
            continue
        first = all(thing is not guess.thing for thing, _ in standing)
        standing.append((guess.thing, guess))
        if first and not guess.thing.difficult:
            if guess.kind == kind:
                guess.box = guess.thing.box
                guess.label = guess.thing.label
            kept.append(guess)

    detections = []
    for image, found in enumerate(scene[0]):
        own = sorted((g for g in kept if g.image == image), key=lambda g: g.row)
        kept_here = {
            "boxes_xyxy": torch.tensor([g.box for g in own], dtype=torch.float64).reshape(-1, 4),
            "scores": found["scores"][[g.row for g in own]],
            "labels": torch.tensor([g.label for g in own], dtype=torch.int64),
        }
        detections.append(kept_here)
    targets = []
    for image, target in enumerate(scene[1]):
        own_things = [thing for thing in things if thing.image == image]
        left = [thing.difficult or (kind == "missed" and is_missed(thing)) for thing in own_things]
        keep = ~np.array(left, bool)
        fields = ("boxes_xyxy", "labels", "difficult")
        targets.append({**target, **{field: target[field][keep] for field in fields}})

    rows = measure((detections, targets)).per_class().values()
    aps = [row["AP50"] for row in rows if row["objects"]]
    emptied = {thing.label for thing in things if not thing.difficult} - {
        label for label, row in enumerate(rows) if row["objects"]
    }
    aps += [1.0] * len(emptied)
    return sum(aps) / len(aps) if aps else 0.0
