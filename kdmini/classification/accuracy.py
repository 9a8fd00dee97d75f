"""Accuracy: how often the class of an image is the best guess, or among the best five.

Legend: N images of a batch, K classes.
"""

import csv
import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from kdmini.contracts import UserError
from kdmini.files import write_whole

FEW = 5  # classes; with so many, the best five are all


class Answer(NamedTuple):
    """What was said of one image."""

    id: str
    true: int
    predicted: int
    score: float  # of the predicted class


class Accuracy:
    """Counts batch by batch; start afresh with a new object.

    names: of the K classes.
    """

    fitness = "top1"
    figures = "kdmini.tools.classifications:figures"

    def __init__(self, names: list[str]):
        self.names = list(names)
        # (N, 3) int64 of each batch: the true class, the predicted one, and how many classes
        # have a better score than the true one
        self.records: list[np.ndarray] = []
        self.answers: list[Answer] = []
        self.summary = ("top1",) if len(names) <= FEW else ("top1", "top5")

    def update(
        self, predictions: list[Mapping[str, Any]], targets: list[Mapping[str, Any]]
    ) -> None:
        """One batch: `scores` (K,) of predictions, `label` of targets.

        Raises ValueError if the lists differ in length, UserError for classes without a name.
        """
        rows = []
        for prediction, target in zip(predictions, targets, strict=True):
            scores = prediction["scores"].float().cpu()
            true = int(target["label"])
            if len(scores) != len(self.names) or true >= len(self.names):
                raise UserError(
                    f"{target['id']}: label {true} and {len(scores)} scores, but the metric knows "
                    f"{len(self.names)} names: give both the same"
                )
            predicted = int(scores.argmax())
            rows.append([true, predicted, better_than(scores, true)])
            self.answers.append(Answer(target["id"], true, predicted, float(scores[predicted])))
        if rows:
            self.records.append(np.array(rows, np.int64))

    def _counted(self) -> np.ndarray:
        """(images, 3), of all batches."""
        return np.concatenate([np.empty((0, 3), np.int64), *self.records])

    def confusion(self) -> np.ndarray:
        """(K, K) int64, images by true and predicted class."""
        counts = np.zeros((len(self.names), len(self.names)), np.int64)
        true, predicted, _ = self._counted().T
        np.add.at(counts, (true, predicted), 1)
        return counts

    def compute(self) -> dict[str, float]:
        """-> top1, the share of images whose class has the best score; with more than five
        classes top5, those whose class is among the best five. 0 of nothing.
        """
        scores = self._shares(self._counted()[:, 2])
        return {name: 0.0 if math.isnan(score) else score for name, score in scores.items()}

    def _shares(self, better: np.ndarray) -> dict[str, float]:
        """Of these images; NaN of none."""
        bounds = {"top1": 1, "top5": FEW}
        return {
            name: float((better < bounds[name]).mean()) if len(better) else math.nan
            for name in self.summary
        }

    def per_class(self) -> dict[str, dict[str, float]]:
        """-> name -> the scores of its images, and how many `images` it has."""
        counted = self._counted()
        table = {}
        for label, name in enumerate(self.names):
            better = counted[counted[:, 0] == label, 2]
            table[name] = {**self._shares(better), "images": len(better)}
        return table

    def per_image(self) -> dict[str, float]:
        """-> id -> the score of the answer, negative where that is wrong."""
        return {
            answer.id: answer.score if answer.predicted == answer.true else -answer.score
            for answer in self.answers
        }

    def chance(self) -> float:
        """The top1 of saying the commonest class each time."""
        true = self._counted()[:, 0]
        return float(np.bincount(true).max() / len(true)) if len(true) else 0.0

    def save(self, folder: Path) -> Path:
        """Writes FOLDER/confusion.csv, a row for each true class and a column for each predicted
        one, and FOLDER/answers.csv, a row for each image; returns the folder. Raises UserError.
        """
        confusion = [["", *self.names]]
        for name, counts in zip(self.names, self.confusion().tolist(), strict=True):
            confusion.append([name, *counts])
        answers = [["id", "true", "predicted", "score"]]
        for id, true, predicted, score in self.answers:
            answers.append([id, self.names[true], self.names[predicted], f"{score:.4f}"])
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot write {folder} ({error.strerror}); name another folder"
            ) from error
        write_whole(folder / "confusion.csv", csv_text(confusion))
        write_whole(folder / "answers.csv", csv_text(answers))
        return folder


def better_than(scores: Tensor, label: int) -> int:
    """How many of the scores are better than that of a label; of equal ones, the first is.
    NaN is better than all, so that it hits nothing.
    """
    own = scores[label]
    return int((~(scores <= own)).sum() + (scores[:label] == own).sum())


def csv_text(rows: list[list[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
