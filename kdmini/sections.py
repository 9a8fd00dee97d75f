"""A config: its sections, checked, and the data sets that it names."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch

from kdmini import config
from kdmini.bounds import Count, ImageSize, Range, Seed, ShareBelowOne
from kdmini.classes import refuse_other_classes
from kdmini.contracts import Dataset, Metric, UserError
from kdmini.data.loader import Augment
from kdmini.data.share import LISTED, Share, divide, text_of
from kdmini.data.storage import Storage
from kdmini.data.store import OnBad, Store, expected_bytes, subset
from kdmini.data.unlabelled import Unlabelled
from kdmini.optim import Recipe
from kdmini.typed import fit, short

HALF = 0.5  # of a batch, where nothing else is said of unlabelled images


@dataclass(frozen=True)
class Sections:
    """A config. Each section is a call, checked when it is made: see config.py.

    run: folder of the run.
    data: images and their ground truth.
    student: the model that learns.
    metric: what scores it.
    train: the recipe.
    teacher: the model that is imitated; null for none.
    distill: taps, alignment and terms; null for none.
    log: what is called with every record of metrics.jsonl besides, such as
        `{build: kdmini.tools.loggers:TensorBoard}`; or a list of them.
    seed: of weights and augmentation.
    device: auto, cpu, cuda or cuda:1.
    compile: rendering, student, loss, teacher and terms by torch.compile; it takes minutes on
        a CPU, so `auto` is CUDA only, where a compiler works.
    deterministic: the same run gives the same bits on CUDA too, more slowly.
    timeout: minutes that one of several processes waits for another before it gives up.
    allow_void: train although a term never has a weight, or the teacher has none.
    allow_changed: resume although images, classes, the teacher or code are not those that the
        run began with.
    """

    run: str
    data: dict[str, Any]
    student: Any
    metric: Any
    train: dict[str, Any]
    teacher: Any = None
    distill: Any = None
    log: Any = None
    seed: Seed = 0
    device: str = "auto"
    compile: bool | Literal["auto"] = "auto"
    deterministic: bool = False
    timeout: Annotated[float, Range(0.01, 1_000_000)] = 10.0
    allow_void: bool = False
    allow_changed: bool = False

    def recipe(self) -> Recipe:
        return config.call(Recipe, self.train, "train")

    def sets(self) -> "Sets":
        data = self.data
        val = data.get("val")
        drawn = Path(self.run) / LISTED
        if isinstance(val, Mapping) and "share" in val and drawn.is_file():
            data = {**data, "val": {**val, "listed": val.get("listed") or str(drawn)}}
        return config.call(make_sets, data, "data")

    def make_loggers(self) -> list[Any]:
        """Raises UserError for one that cannot be called with a record."""
        sections = self.log if isinstance(self.log, list) else [self.log]
        loggers = [config.build(section, "log", run=self.run) for section in sections if section]
        if not all(map(callable, loggers)):
            raise UserError("log.build: what it makes cannot be called with a record; add __call__")
        return loggers

    def make_metric(self, names: list[str]) -> Metric:
        """Raises UserError where it cannot score."""
        metric = config.build(self.metric, "metric", names=names)
        members = ("fitness", "records", "update", "compute")
        lacking = [name for name in members if not hasattr(metric, name)]
        if lacking:
            raise UserError(
                f"metric.build: what {short(self.metric['build'])} makes has no "
                f"{', '.join(lacking)}; see Metric in kdmini/contracts.py"
            )
        return metric


class Sets(NamedTuple):
    """The two data sets, and how their images are decoded, kept and augmented."""

    train: Dataset
    val: Dataset
    imgsz: int
    augment: Augment
    storing: dict[str, Any]  # further settings of data/store.py
    # file of the run folder -> the names of val's images, where they are a share of train's
    drawn: Mapping[str, bytes] = {}
    unlabelled: Unlabelled | None = None  # mixed into the batches
    share: float = 0.0  # of a batch that they are

    def all(self) -> dict[str, Dataset]:
        sets: dict[str, Dataset] = {"train": self.train, "val": self.val}
        return {**sets, "unlabelled": self.unlabelled} if self.unlabelled else sets

    def store(
        self, name: Literal["train", "val", "unlabelled"], device: torch.device, **settings: Any
    ) -> Store:
        """One of the sets, decoded. settings: in place of those of the config."""
        dataset = self.all()[name]
        storing = {**self.storing, **settings}
        return Store(dataset, self.imgsz, device, name=name, training=name == "train", **storing)

    def expected_bytes(self, limit: int | None = None) -> int:
        """Of the pixels of all sets, about. limit: in place of the config's."""
        limit = limit or self.storing["limit"]
        workers = self.storing["workers"]
        total = 0
        for dataset in self.all().values():
            indices = subset(len(dataset), limit)
            total += expected_bytes(dataset, indices, self.imgsz, workers)
        return total

    def images(self) -> int:
        """How many there are to learn from, before it is known whether all can be used."""
        return len(subset(len(self.train), self.storing["limit"]))


def make_sets(  # noqa: PLR0913 - the schema of a section
    train: dict[str, Any],
    val: dict[str, Any],
    root: str | None = None,
    imgsz: ImageSize = 640,
    augment: dict[str, Any] | None = None,
    workers: Annotated[int, Range(0, 1024)] = 8,
    storage: Storage = "auto",
    limit: Count | None = None,
    on_bad: OnBad = "stop",
    allow_overlap: bool = False,
    unlabelled: dict[str, Any] | None = None,
) -> Sets:
    """The `data` section.

    train: the data set to learn from.
    val: the data set to evaluate on; or a share of `train`, as in `{share: 0.2}`.
    root: folder of both sets, where they do not name their own.
    imgsz: side of the square images.
    augment: strengths of the augmentation.
    workers: threads that decode; 0 counts as 1.
    storage: where decoded pixels stay: resident on the device, mapped from a scratch file, or
        auto: resident where both sets fit.
    limit: use a fixed random subset of that many images of each set.
    on_bad: what to do about files and objects that cannot be used: stop, or skip them.
    allow_overlap: accept photographs that are in both sets.
    unlabelled: a third data set, `share` of every batch, from which the terms alone learn;
        its ground truth, if it has any, is not looked at.
    """
    strengths = config.call(Augment, augment or {}, "data.augment")
    offered = {"root": root} if root else {}
    make_train = partial(config.build, train, "data.train", **offered)
    drawn = {}
    train_set: Dataset
    val_set: Dataset
    if "share" in val:
        train_set, val_set, listed = divide(make_train, config.call(Share, val, "data.val"))
        drawn = {LISTED: text_of(listed)}
    else:
        train_set = make_train()
        val_set = config.build(val, "data.val", **offered)
    strengths.refuse_mixing(train_set.truth)
    others, share = make_unlabelled(unlabelled, offered)
    if not allow_overlap:
        refuse_overlap(train_set, val_set, "train")
        refuse_overlap(others, val_set, "unlabelled")
    refuse_other_classes(val_set.names, train_set.names, "data.val", "data.train")
    storing = {"workers": workers, "storage": storage, "limit": limit, "on_bad": on_bad}
    return Sets(train_set, val_set, imgsz, strengths, storing, drawn, others, share)


def make_unlabelled(
    section: Mapping[str, Any] | None, offered: Mapping[str, Any]
) -> tuple[Unlabelled | None, float]:
    """-> the set, and its share of a batch. offered: settings for data sets that name them."""
    if section is None:
        return None, 0.0
    share = fit(section.get("share", HALF), ShareBelowOne, "data.unlabelled.share")
    settings = {key: value for key, value in section.items() if key != "share"}
    return Unlabelled(config.build(settings, "data.unlabelled", **offered)), share


def refuse_overlap(learned: Any, val: Dataset, name: str) -> None:
    """Raises UserError where photographs to learn from are evaluated on too."""
    overlap = photographs(learned) & photographs(val)
    if overlap:
        raise UserError(
            f"data: {len(overlap):,} images are in {name} and val both, such as "
            f"{'/'.join(min(overlap))}: `exclude` one split from the other, or set "
            "data.allow_overlap=true"
        )


def photographs(dataset: Dataset) -> set[Any]:
    """What identifies the images of a set, if it knows."""
    return getattr(dataset, "photographs", set())
