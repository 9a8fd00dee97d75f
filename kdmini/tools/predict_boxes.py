"""What predict writes of a detector: each picture with its boxes.

Legend: N images, A anchor points, K classes.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from kdmini.contracts import Prediction
from kdmini.detection.boxes import select
from kdmini.detection.yolo11.model import YOLO11, decode_maps
from kdmini.tools.canvas import enlarged, font, text_size
from kdmini.typed import short

MAX_DET = 300  # detections of an image

# Okabe and Ito's colours, which the colour-blind tell apart; black is left out
BLUE = "#0072B2"  # the one dark enough for white text
COLOURS = ["#E69F00", "#56B4E9", "#009E73", "#F0E442", BLUE, "#D55E00", "#CC79A7"]


class BoxWriter:
    """A `kdmini.tools.writers.Writer`.

    score: objects under it are not shown. iou: boxes that overlap more are one.
    """

    options = ("score", "iou")

    def __init__(self, detector: YOLO11, score: float = 0.25, iou: float = 0.7):
        self.names = detector.names
        self.score = score
        self.iou = iou

    def decode(self, preds: list[Tensor]) -> list[Prediction]:
        """As YOLO11.decode, but of each box the best class alone.

        Evaluation counts several; a picture shows one.
        """
        boxes_xyxy, scores = decode_maps(preds)  # (N, A, 4), (N, A, K)
        best, label = scores.max(2, keepdim=True)
        only_best = torch.zeros_like(scores).scatter_(2, label, best)
        return [
            select(boxes, scores_of_boxes, self.score, self.iou, MAX_DET)
            for boxes, scores_of_boxes in zip(boxes_xyxy, only_best, strict=True)
        ]

    def entry(self, prediction: Prediction) -> dict[str, Any]:
        return {"detections": as_json(prediction, self.names)}

    def draw(self, image: Image.Image, prediction: Prediction, steady: bool = False) -> Image.Image:
        return draw(image, prediction, self.names)

    def named(self, entry: Mapping[str, Any]) -> list[str]:
        return [found["label"] for found in entry["detections"]]

    def summary(self, found: Counter[str]) -> str:
        return f"{found.total():,} objects of score over {self.score}"


def as_json(prediction: Prediction, names: list[str]) -> list[dict[str, Any]]:
    rows = zip(
        prediction["boxes_xyxy"].tolist(),
        prediction["scores"].tolist(),
        prediction["labels"].tolist(),
        strict=True,
    )
    return [
        {
            "box_xyxy": [round(side, 2) for side in box],
            "label": names[label],
            "score": round(score, 4),
        }
        for box, score, label in rows
    ]


def draw(image: Image.Image, prediction: Prediction, names: list[str]) -> Image.Image:
    """A copy with boxes, class names and scores; small images are enlarged for these."""
    picture = enlarged(image)
    factor = max(picture.size) / max(image.size)
    size = text_size(picture)
    line = max(size // 5, 3)
    pen = ImageDraw.Draw(picture)

    # reversed: the best are drawn last, on top
    boxes = (prediction["boxes_xyxy"] * factor).tolist()[::-1]
    labels = prediction["labels"].tolist()[::-1]
    scores = prediction["scores"].tolist()[::-1]
    colours = [COLOURS[label % len(COLOURS)] for label in labels]
    for box, colour in zip(boxes, colours, strict=True):
        pen.rectangle(box, outline="black", width=line + 1)  # a dark rim shows on any ground
        pen.rectangle(box, outline=colour, width=line)
    for box, label, score, colour in zip(boxes, labels, scores, colours, strict=True):
        name = short(names[label])[1:-1]  # it is out of a file
        write(pen, font(size), f"{name} {score:.2f}", box, colour, line, picture.width)
    return picture


def write(
    pen: ImageDraw.ImageDraw,
    letters: Any,
    text: str,
    box: Sequence[float],
    colour: str,
    margin: int,
    picture_width: int,
) -> None:
    """On a coloured plate above the box, or inside it at the picture's upper edge."""
    left, top = box[:2]
    text_width, text_height = pen.textbbox((0, 0), text, letters)[2:]
    width = text_width + 2 * margin
    height = text_height + margin
    x = max(min(left, picture_width - width), 0)
    y = top - height if top >= height else top
    pen.rectangle((x, y, x + width, y + height), colour)
    pen.text((x + margin, y), text, "white" if colour == BLUE else "black", letters)
