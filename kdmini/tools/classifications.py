"""The pictures of classes; Accuracy names `figures` as what draws them.

    batch.png        training images as the loader renders them, with their classes and shares
    answers.png      a few images, their class and what the networks say
    confusion.png    what the images of each class were taken for, over the validation set
    mistakes.png     of that set, the images whose wrong answer was the surest

Legend: N images, S image size, K classes, J parts of a rendered image.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from kdmini.classification.accuracy import Accuracy, Answer
from kdmini.data.loader import TrainLoader
from kdmini.data.store import Store
from kdmini.engine import on_cpu
from kdmini.tools import draw_confusion
from kdmini.tools.draw import SMALL, Figure, blank, grid, show
from kdmini.tools.predict_classes import best
from kdmini.tools.scenes import Material, Scenes, scenes_at
from kdmini.typed import short

COLUMNS = 6  # of images
MISTAKES = 24  # that are shown, at most
LETTERS = 26  # of a name
GUESSES = 3  # that are written of an image whose class is not known

# inches
CELL = 2.0  # that an image is wide
LINE = 0.16  # of what is written below it


def figures(material: Material) -> Iterator[tuple[str, Figure]]:
    """-> name and picture, of what there is."""
    if material.train_loader is not None:
        yield "batch", batch(material.train_loader)
    if material.scenes is not None:
        yield "answers", answers(material, material.scenes)
    if material.metric is not None:
        yield "confusion", confusion(material.metric)
        yield from mistakes(material.metric, material.store)


def batch(loader: TrainLoader) -> Figure:
    """The first batch of the first epoch."""
    images, targets = next(loader.epoch(0))
    names = loader.store.names
    labels = targets["labels"].cpu().numpy()  # (N, J)
    parts = targets["share"].cpu().numpy()
    shares = np.zeros((len(labels), len(names)))
    np.add.at(shares, (np.arange(len(labels))[:, None], labels), parts)
    captions = [mixed(row, names) for row in shares]
    title = "Training images as rendered in the first epoch, with their classes"
    pictures = images.permute(0, 2, 3, 1).cpu().numpy()
    return sheet(pictures, captions, title, targets["ids"])


def mixed(shares: np.ndarray, names: Sequence[str]) -> str:
    """(K,) -> a line for each class that the image is of, the largest share first."""
    present = [label for label in (-shares).argsort(kind="stable") if shares[label] > 0]
    return "\n".join(f"{title_of(names[label])} {shares[label]:.0%}" for label in present)


@torch.no_grad()
def answers(material: Material, scenes: Scenes) -> Figure:
    """Each image with its class, if it is known, and what student and teacher say."""
    networks = {"student": material.student}
    if hasattr(material.teacher, "decode"):  # one from elsewhere says nothing of the images
        networks["teacher"] = material.teacher
    alone = len(networks) == 1 and not scenes.annotated
    captions: list[list[str]] = [[] for _ in scenes.targets]
    if scenes.annotated:
        names = material.student.names
        captions = [[f"true: {title_of(names[target['label']])}"] for target in scenes.targets]
    for side, network in networks.items():
        predictions = on_cpu(network.decode(network.eval()(scenes.images)))
        for lines, prediction in zip(captions, predictions, strict=True):
            guesses = best(prediction["scores"], network.names, GUESSES if alone else 1)
            who = "" if alone else f"{side}: "
            lines += [f"{who}{title_of(name)} {score:.2f}" for name, score in guesses.items()]
    texts = ["\n".join(lines) for lines in captions]
    return sheet(scenes.pictures, texts, f"Answers of {material.weights}", scenes.ids)


def confusion(metric: Accuracy) -> Figure:
    """The metric has seen the whole validation set."""
    names = [title_of(name) for name in metric.names]
    rights = [row["top1"] for row in metric.per_class().values()]
    rows = [
        f"{name}, {'-' if np.isnan(right) else format(right, '.2f')} right"
        for name, right in zip(names, rights, strict=True)
    ]
    top1 = metric.compute()["top1"]
    title = f"What the images of each class were taken for: top1 {top1:.3f}"
    return draw_confusion.confusion(metric.confusion(), names, rows, title, "images")


def mistakes(metric: Accuracy, store: Store | None) -> Iterator[tuple[str, Figure]]:
    """The wrong answers to images of the store that have the highest scores."""
    wrong = [answer for answer in metric.answers if answer.predicted != answer.true]
    if store is None or not wrong:
        print("left out: mistakes.png, as every answer is right")
        return
    surest = np.argsort([-answer.score for answer in wrong], kind="stable")[:MISTAKES]
    shown = [wrong[place] for place in surest]
    number = {target["id"]: index for index, target in enumerate(store.targets)}
    scenes = scenes_at(store, np.array([number[answer.id] for answer in shown]))
    captions = [told(answer, metric.names) for answer in shown]
    title = (
        f"The {len(shown):,} surest of {len(wrong):,} mistakes, of {len(metric.answers):,} images"
    )
    yield "mistakes", sheet(scenes.pictures, captions, title, scenes.ids)


def told(answer: Answer, names: Sequence[str]) -> str:
    true = title_of(names[answer.true])
    predicted = title_of(names[answer.predicted])
    return f"true: {true}\nsaid: {predicted} {answer.score:.2f}"


def sheet(
    pictures: Sequence[np.ndarray] | np.ndarray,
    captions: Sequence[str],
    title: str,
    ids: Sequence[str],
) -> Figure:
    """N images in rows, each under its name and over its caption."""
    rows = -(-len(pictures) // COLUMNS)
    lines = 2 + max(caption.count("\n") + 1 for caption in captions)
    figure = blank(CELL * COLUMNS, (CELL + LINE * lines) * rows + 0.6, title)
    axes = grid(figure, len(pictures), COLUMNS)
    for axis, picture, caption, name in zip(axes, pictures, captions, ids, strict=True):
        show(axis, picture, caption)
        axis.set_title(title_of(name), fontsize=SMALL, parse_math=False)
    return figure


def title_of(name: str) -> str:
    """A name out of a file, on a line that is no longer than its image is wide."""
    line = short(name)[1:-1]
    return line if len(line) <= LETTERS else f"{line[: LETTERS - 1]}…"
