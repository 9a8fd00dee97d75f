"""From the sections of a config to the pieces of a run, for train.py, eval.py, --check, tools
and benchmarks alike. What a section names is imported by kdmini/config.py: nothing here
imports a model, a data set or a term.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from kdmini import config, distributed
from kdmini.contracts import Dataset, Metric, UserError
from kdmini.data.loader import Augment, TrainLoader, ValLoader, check_size
from kdmini.data.store import OnBad, Storage, Store
from kdmini.device import precision
from kdmini.distill.step import Distillation, Weighted, tap_shapes
from kdmini.engine import Training
from kdmini.optim import EMA, Recipe, make_sgd
from kdmini.progress import Progress


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
    seed: of weights and augmentation.
    device: auto, cpu, cuda or cuda:1.
    compile: rendering, student, teacher and terms by torch.compile; it takes minutes on a
        CPU, so `auto` is CUDA only.
    deterministic: the same run gives the same bits on CUDA too, more slowly.
    timeout: minutes that one of several processes waits for another before it gives up.
    """

    run: str
    data: dict[str, Any]
    student: Any
    metric: Any
    train: dict[str, Any]
    teacher: Any = None
    distill: Any = None
    seed: int = 0
    device: str = "auto"
    compile: bool | Literal["auto"] = "auto"
    deterministic: bool = False
    timeout: float = 10.0

    def recipe(self) -> Recipe:
        return config.call(Recipe, self.train, "train")

    def sets(self) -> "Sets":
        return config.call(make_sets, self.data, "data")

    def compiled(self, device: torch.device) -> bool:
        return device.type == "cuda" if self.compile == "auto" else self.compile

    def make_metric(self, names: list[str]) -> Metric:
        return config.build(self.metric, "metric", names=names)


class Sets(NamedTuple):
    """The two data sets, and how their images are decoded, kept and augmented."""

    train: Dataset
    val: Dataset
    imgsz: int
    augment: Augment
    storing: dict[str, Any]  # further settings of data/store.py

    def store(self, name: Literal["train", "val"], device: torch.device, **settings: Any) -> Store:
        """One of the sets, decoded. settings: in place of those of the config."""
        dataset = self.train if name == "train" else self.val
        storing = {**self.storing, **settings}
        return Store(dataset, self.imgsz, device, name=name, **storing)


def make_sets(  # noqa: PLR0913 - the schema of a section
    train: dict[str, Any],
    val: dict[str, Any],
    root: str | None = None,
    imgsz: int = 640,
    augment: dict[str, Any] | None = None,
    workers: int = 8,
    storage: Storage = "auto",
    limit: int | None = None,
    on_bad: OnBad = "stop",
    allow_overlap: bool = False,
) -> Sets:
    """The `data` section.

    train: the data set to learn from.
    val: the data set to evaluate on.
    root: folder of both sets, where they do not name their own.
    imgsz: side of the square images, a multiple of 32.
    augment: strengths of the augmentation.
    workers: threads that decode.
    storage: where decoded pixels stay: resident on the device, mapped from a scratch file, or
        auto.
    limit: use a fixed random subset of that many images of each set.
    on_bad: what to do about files that cannot be used: stop, or skip them.
    allow_overlap: accept photographs that are in both sets.
    """
    check_size(imgsz)
    strengths = config.call(Augment, augment or {}, "data.augment")
    offered = {"root": root} if root else {}
    train_set = config.build(train, "data.train", **offered)
    val_set = config.build(val, "data.val", **offered)
    overlap = photographs(train_set) & photographs(val_set)
    if overlap and not allow_overlap:
        raise UserError(
            f"data: {len(overlap):,} images are in train and val both, such as "
            f"{'/'.join(min(overlap))}: `exclude` one split from the other, or set "
            "data.allow_overlap=true"
        )
    if train_set.names != val_set.names:
        raise UserError("data: train and val name different classes, or the same in another order")
    storing = {"workers": workers, "storage": storage, "limit": limit, "on_bad": on_bad}
    return Sets(train_set, val_set, imgsz, strengths, storing)


def photographs(dataset: Dataset) -> set[Any]:
    """What identifies the images of a set, if it knows."""
    return getattr(dataset, "photographs", set())


def make_model(section: Any, where: str, names: list[str], device: torch.device) -> Any:
    model = config.build(section, where, names=names)
    return model.to(device, memory_format=torch.channels_last)


def with_weights(section: Mapping[str, Any], path: str) -> dict[str, Any]:
    """The section of a model with another weight file, and its other settings of weights."""
    weights = section.get("weights")
    if isinstance(weights, Mapping):
        return {**section, "weights": {**weights, "path": path}}
    return {**section, "weights": path}


def make_distillation(
    student: nn.Module,
    teacher: nn.Module | None,
    imgsz: int,
    taps: list[str | tuple[str, str]],
    align: Literal["all", "unequal", "none", "frozen"] = "all",
    kd_scale: float | Literal["batch"] = 1.0,
    **terms: Any,
) -> Distillation:
    """The `distill` section.

    taps: names of submodules, or pairs [student's name, teacher's name].
    align: which taps of the student get a convolution to the teacher's channels.
    kd_scale: what the sum of the terms is multiplied by: a number, or `batch`.

    Every other key is a term, with its `weight` and `schedule`.
    """
    pairs = tap_pairs(taps)
    shapes = tap_shapes(student, teacher or student, pairs, imgsz) if pairs else {}
    weighted = {}
    for name, entry in terms.items():
        where = f"distill.{name}"
        if not isinstance(entry, dict) or "build" not in entry:
            raise UserError(
                f"{where}: neither taps, align, kd_scale nor a term; a term has a `build:` key"
            )
        position = {key: entry[key] for key in ("weight", "schedule") if key in entry}
        settings = {key: value for key, value in entry.items() if key not in position}
        term = config.build(settings, where, shapes=shapes, names=student.names, student=student)
        if teacher is None and getattr(term, "needs_teacher", True):
            raise UserError(
                f"{where}: needs a teacher; add the section `teacher`, or set distill=null"
            )
        weighted[name] = config.call(Weighted, position, where, term=term)
    return Distillation(
        student, teacher, weighted, pairs, shapes if teacher else {}, align, kd_scale
    )


def tap_pairs(taps: list[str | tuple[str, str]]) -> dict[str, str]:
    """-> {student's name: teacher's name}."""
    return dict((tap, tap) if isinstance(tap, str) else tap for tap in taps)


class Run(NamedTuple):
    """All pieces of a run."""

    training: Training
    teacher: Any  # frozen, in no optimiser, no average and no checkpoint
    val_loader: ValLoader
    imgsz: int

    @property
    def names(self) -> list[str]:
        """Of the classes, as the data sets have them."""
        return self.val_loader.store.names


def make_run(
    sections: Sections,
    recipe: Recipe,
    device: torch.device,
    progress: Progress,
    limit: int | None = None,
) -> Run:
    """limit: decode only so many images of each set, whatever the config says."""
    sets = sections.sets()
    names = sets.train.names
    compiled = sections.compiled(device)
    autocast, scaler = precision(recipe.amp, device)

    # The order matters. The copy for the average comes after the weights were loaded, and
    # before taps are attached, which it would take along; taps come before compilation, for a
    # compiled network ignores hooks that are set later.
    student = make_model(sections.student, "student", names, device)
    ema = EMA(student, recipe.ema_decay, recipe.ema_tau)
    teacher = None
    if sections.teacher and sections.distill:
        teacher = make_model(sections.teacher, "teacher", names, device)
    distillation = config.call(
        make_distillation,
        sections.distill or {"taps": []},
        "distill",
        student=student,
        teacher=teacher,
        imgsz=sets.imgsz,
    )
    distillation.to(device)
    if compiled:
        student.compile(dynamic=False)
        distillation.compile(dynamic=False)
    # align modules and terms learn too; the teacher does not
    optimizer = make_sgd([student, distillation], recipe)

    settings: dict[str, Any] = {"compiled": compiled}
    if limit:
        settings["limit"] = limit
    share = {"rank": distributed.rank(), "world": distributed.world()}
    store = sets.store("train", device, **settings)
    loader = TrainLoader(store, recipe.batch, recipe.epochs, sets.augment, sections.seed, **share)
    val_loader = ValLoader(sets.store("val", device, **settings), recipe.batch, **share)
    training = Training(
        loader=loader,
        student=student,
        distillation=distillation,
        optimizer=optimizer,
        scaler=scaler,
        ema=ema,
        recipe=recipe,
        autocast=autocast,
        progress=progress,
    )
    return Run(training, teacher, val_loader, sets.imgsz)


def describe(run: Run) -> None:
    """Prints what is about to happen, and warns where a setting may surprise."""
    training = run.training
    recipe = training.recipe
    loader: Any = training.loader
    student = training.student
    terms = training.distillation.terms
    print(f"student: {summary(student)}, {len(student.names)} classes, on {loader.device}")
    if loader.device.type == "cpu" and not torch.cuda.is_available():
        print("device: torch finds no CUDA device, so this runs on the CPU")
    if run.teacher:
        print(f"teacher: {summary(run.teacher)}, frozen")
        taps = ", ".join(training.distillation.taps)
        print(f"terms: {', '.join(terms) or 'none'}; taps: {taps}")
    world = distributed.world()
    ranks = f", {world} processes" if world > 1 else ""
    print(
        f"data: {len(loader.store)} images, {len(loader)} steps an epoch, "
        f"{recipe.epochs} epochs{ranks}"
    )
    follows_batch = any(getattr(term, "reduction", "") == "notes" for term in terms.values())
    if recipe.accumulate > 1 and follows_batch:
        print(
            f"warning: reduction `notes` falls with the batch: N is {recipe.batch} here, not "
            f"train.nbs={recipe.nbs}; `reduction: sample` does not depend on it"
        )


def summary(model: nn.Module) -> str:
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    return f"{type(model).__name__}, {millions:.2f} M parameters"
