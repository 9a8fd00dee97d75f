"""A score that a detector has which has not learned to detect anything yet."""

from typing import Any


class Confidence:
    """The mean of the highest scores of the images, without regard to what is there."""

    fitness = "confidence"

    def __init__(self) -> None:
        self.records: list[float] = []

    def update(self, predictions: list[Any], targets: list[Any]) -> None:
        self.records += [
            max(prediction["scores"].tolist(), default=0.0) for prediction in predictions
        ]

    def compute(self) -> dict[str, float]:
        return {"confidence": sum(self.records) / len(self.records)}
