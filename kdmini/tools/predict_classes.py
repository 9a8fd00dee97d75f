"""What predict writes of a classifier: each picture with its class.

Legend: N images, K classes.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image, ImageDraw
from torch import Tensor

from kdmini.classification.accuracy import FEW
from kdmini.classification.classifier import Classifier
from kdmini.contracts import Prediction
from kdmini.tools.canvas import enlarged, font, text_size
from kdmini.tools.predict_boxes import BLUE, write
from kdmini.typed import short


class ClassWriter:
    """A `kdmini.tools.writers.Writer`."""

    options: tuple[str, ...] = ()

    def __init__(self, classifier: Classifier):
        self.classifier = classifier
        self.names = classifier.names

    def decode(self, preds: Tensor) -> list[Prediction]:
        return self.classifier.decode(preds)

    def entry(self, prediction: Prediction) -> dict[str, Any]:
        return {"classes": best(prediction["scores"], self.names)}

    def draw(self, image: Image.Image, prediction: Prediction, steady: bool = False) -> Image.Image:
        ((name, score),) = best(prediction["scores"], self.names, 1).items()
        return labelled(image, f"{short(name)[1:-1]} {score:.2f}")

    def named(self, entry: Mapping[str, Any]) -> list[str]:
        return list(entry["classes"])[:1]

    def summary(self, found: Counter[str]) -> str:
        return f"{len(found)} of {len(self.names)} classes found"


def best(scores: Tensor, names: Sequence[str], count: int = FEW) -> dict[str, float]:
    """(K,) -> name -> score of the best few, the best first."""
    values, labels = scores.topk(min(count, len(names)))
    pairs = zip(labels.tolist(), values.tolist(), strict=True)
    return {names[label]: round(value, 4) for label, value in pairs}


def labelled(image: Image.Image, text: str) -> Image.Image:
    """A copy with a text in its corner; a small image is enlarged, and a narrow one widened."""
    picture = enlarged(image)
    size = text_size(picture)
    margin = max(size // 5, 3)
    text_width = round(font(size).getlength(text))
    width = max(picture.width, text_width + 2 * margin)
    page = Image.new("RGB", (width, picture.height), "white")
    page.paste(picture)
    write(ImageDraw.Draw(page), font(size), text, (0, 0), BLUE, margin, width)
    return page
