"""The pictures of classes: whose shares are written, and which mistakes are the surest."""

from typing import Any

import numpy as np
import pytest
import torch

from kdmini.classification.accuracy import Accuracy
from kdmini.data.loader import Augment, TrainLoader
from kdmini.data.store import Store
from tests.classification.labelled import NAMES, Animals

pytest.importorskip("matplotlib")
from kdmini.tools import classifications
from kdmini.tools.draw_confusion import confusion
from kdmini.tools.scenes import Material, scenes_at

CAT, DOG, FISH = range(3)


@pytest.fixture(scope="module")
def store() -> Store:
    """Twelve images of NAMES in turn."""
    rng = np.random.default_rng(0)
    return Store(Animals(list(rng.integers(0, 256, (12, 32, 32, 3), np.uint8))), 32)


def drawn(**pieces: Any) -> dict[str, Any]:
    return dict(classifications.figures(Material(**pieces)))


def captions(figure: Any) -> list[str]:
    return [axis.get_xlabel() for axis in figure.axes if axis.get_visible()]


def test_a_batch_has_the_shares_of_its_classes(store: Store) -> None:
    augment = Augment(mosaic=0, translate=0, scale=0, fliplr=0, cutmix=0.5, mixup=0.5)
    loader = TrainLoader(store, 12, 1, augment)
    _, targets = next(loader.epoch(0))
    texts = captions(drawn(train_loader=loader)["batch"])
    several = 0
    for text, labels, shares in zip(texts, targets["labels"], targets["share"], strict=True):
        found = dict(line.rsplit(" ", 1) for line in text.splitlines())
        several += len(found) > 1
        for label, name in enumerate(NAMES):
            share = float(shares[labels == label].sum())
            assert found.get(name, "0%") == f"{share:.0%}" if name in found else share == 0
        percents = [int(percent.rstrip("%")) for percent in found.values()]
        assert percents == sorted(percents, reverse=True)
    assert several > 3


def metric_of(store: Store, answers: dict[int, tuple[int, float]]) -> Accuracy:
    """answers: index of an image -> the class that is said, and its score; right elsewhere."""
    metric = Accuracy(NAMES)
    for index, target in enumerate(store.targets):
        label, score = answers.get(index, (target["label"], 0.99))
        scores = torch.full((3,), (1 - score) / 2)
        scores[label] = score
        metric.update([{"scores": scores}], [target])
    return metric


def test_the_surest_mistakes_come_first(store: Store, capsys) -> None:
    wrong = {1: (CAT, 0.6), 3: (FISH, 0.9), 11: (DOG, 0.7), 4: (FISH, float("nan"))}
    figures = drawn(metric=metric_of(store, wrong), store=store)
    sheet = figures["mistakes"]
    assert captions(sheet)[:3] == [
        "true: cat\nsaid: fish 0.90",
        "true: fish\nsaid: dog 0.70",
        "true: dog\nsaid: cat 0.60",
    ]
    pictures = [axis.images[0].get_array() for axis in sheet.axes[:3]]
    expected = scenes_at(store, np.array([3, 11, 1])).pictures
    assert np.array_equal(pictures, expected)
    assert "of 4 mistakes, of 12 images" in sheet.get_suptitle()

    assert list(drawn(metric=metric_of(store, {}), store=store)) == ["confusion"]
    assert "left out: mistakes.png" in capsys.readouterr().out


def test_the_confusion_has_the_shares_of_each_true_class(store: Store) -> None:
    figure = drawn(metric=metric_of(store, {0: (FISH, 0.9)}), store=store)["confusion"]
    axis = figure.axes[0]
    expected = [[0.75, 0, 0.25], [0, 1, 0], [0, 0, 1]]
    np.testing.assert_array_equal(axis.images[0].get_array(), expected)
    labels = [label.get_text() for label in axis.get_yticklabels()]
    assert labels == ["cat, 0.75 right", "dog, 1.00 right", "fish, 1.00 right"]


def test_a_confusion_of_many_classes_stays_a_picture() -> None:
    names = [str(number) for number in range(1000)]
    figure = confusion(np.eye(1000), names, names, "many", "images")
    assert max(figure.get_size_inches()) < 40
    assert len(figure.axes[0].get_xticks()) < 20


class Constant:
    """A network that always says the same."""

    def __init__(self, scores: list[float], names: list[str] = NAMES):
        self.scores = torch.tensor(scores)
        self.names = names

    def eval(self) -> "Constant":
        return self

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return self.scores.expand(len(images), -1)

    def decode(self, preds: torch.Tensor) -> list[dict[str, torch.Tensor]]:
        return [{"scores": scores} for scores in preds]


def test_answers_stand_beside_the_truth(store: Store) -> None:
    student = Constant([0.1, 0.2, 0.7])
    teacher = Constant([0.6, 0.4], ["lion", "wolf"])
    scenes = scenes_at(store, np.array([1]))
    (text,) = captions(drawn(student=student, teacher=teacher, scenes=scenes)["answers"])
    assert text == "true: dog\nstudent: fish 0.70\nteacher: lion 0.60"
    silent = torch.nn.Identity()  # it teaches by its features alone
    (text,) = captions(drawn(student=student, teacher=silent, scenes=scenes)["answers"])
    assert text == "true: dog\nstudent: fish 0.70"

    unknown = scenes._replace(annotated=False)
    (text,) = captions(drawn(student=student, scenes=unknown)["answers"])
    assert text == "fish 0.70\ndog 0.20\ncat 0.10"


def test_any_name_takes_one_short_line(store: Store) -> None:
    student = Constant([0.9, 0.1], ["$a\n$" + "x" * 100_000, "b"])
    unknown = scenes_at(store, np.array([1]))._replace(annotated=False)
    figure = drawn(student=student, scenes=unknown)["answers"]
    figure.canvas.draw()
    (text,) = captions(figure)
    assert text.startswith("$a\\n$xxx")
    assert len(text.splitlines()[0]) <= 32
