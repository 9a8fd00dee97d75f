"""What a sweep searches: its config, and the keys of a run that it draws."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from kdmini import config
from kdmini.bounds import Count, Natural, Range
from kdmini.contracts import UserError
from kdmini.defaults import SECTIONS, defaults, filled
from kdmini.distill.step import Weighted
from kdmini.optim import Recipe
from kdmini.sections import Augment, Sections
from kdmini.typed import fit, nearest, short

# whose parameters are the keys of a section without `build`
KEYS_OF: dict[str, Callable] = {"": Sections, "data.augment": Augment, **SECTIONS}

Scalar = bool | int | float | str | None


@dataclass(frozen=True)
class Stop:
    """When a trial that falls behind ends before its time.

    rule: hyperband, median or none.
    min: evaluations before a trial is first judged.
    eta: of hyperband: it judges again at every eta-fold, and lets one of eta go on.
    brackets: of hyperband: trial i is first judged after min * eta^(i mod brackets), and only
        beside trials of its own bracket.
    """

    rule: Literal["hyperband", "median", "none"] = "hyperband"
    min: Count = 8
    eta: Annotated[int, Range(2, 100)] = 2
    brackets: Annotated[int, Range(1, 20)] = 1


@dataclass(frozen=True)
class Sweep:
    """The config of a sweep.

    config: of the runs, a file.
    space: key of a run -> {low, high, scale} or {choices}.
    count: trials, of all processes together.
    out: folder of the runs, the table and the picture.
    overrides: of the config, the same for all trials, as on the command line.
    metric: name of the score; null for the fitness of the run's metric.
    direction: whether a high score or a low one is sought.
    sampler: bayes, which learns from the trials so far, or random.
    random_first: trials that end before bayes has learned enough.
    stop: when a trial ends before its time.
    storage: URL of the database; null for OUT/study.db.
    name: of the study in the database.
    silence: seconds after which a trial whose process says nothing is taken over.
    """

    config: str
    space: dict[str, dict[str, Any]]
    count: Count
    out: str
    overrides: tuple[str, ...] = ()
    metric: str | None = None
    direction: Literal["maximize", "minimize"] = "maximize"
    sampler: Literal["bayes", "random"] = "bayes"
    random_first: Natural = 10
    stop: dict[str, Any] | None = None
    storage: str | None = None
    name: str = "sweep"
    silence: Annotated[int, Range(2, 86_400)] = 60


@dataclass(frozen=True)
class Span:
    """All numbers from low to high; of integers where both are.

    scale: whether equal steps are equally likely, or equal factors.
    """

    low: int | float
    high: int | float
    scale: Literal["uniform", "log"]

    def draw(self, trial: Any, key: str) -> Any:
        """trial: of Optuna, which here is not needed to check a config."""
        log = self.scale == "log"
        if isinstance(self.low, int) and isinstance(self.high, int):
            return trial.suggest_int(key, self.low, self.high, log=log)
        return trial.suggest_float(key, self.low, self.high, log=log)


@dataclass(frozen=True)
class Choices:
    """A few values, none of which is nearer to another."""

    choices: tuple[Scalar, ...]

    def draw(self, trial: Any, key: str) -> Any:
        return trial.suggest_categorical(key, self.choices)


class Plan(NamedTuple):
    """A sweep that has been checked."""

    sweep: Sweep
    stop: Stop
    settings: dict[str, Any]  # of the runs, without what is drawn
    space: dict[str, Span | Choices]
    score: str

    @property
    def out(self) -> Path:
        return Path(self.sweep.out)

    @property
    def sign(self) -> int:
        """By which a score is multiplied, so that more is better."""
        return 1 if self.sweep.direction == "maximize" else -1

    @property
    def evaluations(self) -> int:
        """Of a trial that is not stopped."""
        recipe = config.call(Recipe, self.settings["train"], "train")
        return -(-recipe.epochs // recipe.val_every)

    def folder(self, number: int) -> Path:
        return self.out / f"trial_{number:03d}"

    def with_values(self, values: Mapping[str, Any], run: Path) -> dict[str, Any]:
        """The config of a run with what was drawn."""
        settings = {**self.settings, "run": str(run)}
        for key, value in values.items():
            settings = config.replaced(settings, key.split("."), value, f"space.{key}")
        return settings

    def identity(self) -> dict[str, Any]:
        """What all processes of a sweep have in common."""
        shared = {key: value for key, value in self.settings.items() if key != "run"}
        space = self.sweep.space
        direction = self.sweep.direction
        return {"config": shared, "space": space, "metric": self.score, "direction": direction}


def make_plan(settings: Mapping[str, Any], path: str) -> Plan:
    """settings: the config of a sweep. path: its file, for messages.

    Raises UserError for what is no sweep, or searches a key that a run does not have or
    values that it does not take.
    """
    sweep: Sweep = config.call(Sweep, settings, path)
    stop = config.call(Stop, sweep.stop or {}, f"{path}: stop")
    if not sweep.space:
        raise UserError(f"{path}: space: nothing to search; name a key and its bounds")
    base = config.load(sweep.config, sweep.overrides)
    sections = config.call(Sections, base, sweep.config)
    sections.recipe()
    base = filled(base, defaults(base))
    space = {}
    for key, entry in sweep.space.items():
        space[key] = dimension(entry, kind_of(key, base, path), f"{path}: space.{key}")
    # any names do: it is asked what it calls its score, and scores nothing
    score = sweep.metric or sections.make_metric(["one", "two"]).fitness
    return Plan(sweep, stop, base, space, score)


def kind_of(key: str, settings: Mapping[str, Any], path: str) -> Any:
    """The annotation of the parameter that a key of a run sets."""
    where = f"{path}: space.{key}"
    *place, name = key.split(".")
    section: Any = settings
    for part in place:
        if not isinstance(section, Mapping) or part not in section:
            known = section if isinstance(section, Mapping) else ()
            raise UserError(f"{where}: there is no `{part}`; {nearest(part, known)}")
        section = section[part]
    if not isinstance(section, Mapping):
        raise UserError(f"{where}: `{'.'.join(place)}` is {short(section)}, which has no keys")

    targets = [KEYS_OF[".".join(place)]] if ".".join(place) in KEYS_OF else []
    if "build" in section:
        targets.append(config.locate(section["build"], f"{'.'.join(place)}.build"))
    if place[:1] == ["distill"] and len(place) == 2:
        targets.append(Weighted)
    kinds: dict[str, Any] = dict.fromkeys(section, Any)
    for target in targets:
        known, _ = config.parameters_of(target, where)
        kinds |= {name: parameter.annotation for name, parameter in known.items()}
    if name not in kinds:
        raise UserError(f"{where}: unknown key; {nearest(name, kinds)}")
    return kinds[name]


def dimension(entry: Mapping[str, Any], kind: Any, where: str) -> Span | Choices:
    """An entry of the space, all of whose values the parameter takes."""
    if "choices" in entry:
        listed = config.call(Choices, entry, where).choices
        if len(listed) < 2:
            raise UserError(f"{where}.choices: {short(list(listed))}; give two or more")
        return Choices(tuple(fit(value, kind, f"{where}.choices") for value in listed))

    span: Span = config.call(Span, entry, where)
    low = fit(span.low, kind, f"{where}.low")
    high = fit(span.high, kind, f"{where}.high")
    if not low < high:
        raise UserError(f"{where}: {low} to {high}; the lower end goes first")
    if span.scale == "log" and low <= 0:
        raise UserError(f"{where}: {low} has no logarithm; begin above 0, or set scale: uniform")
    if isinstance(low, int) and isinstance(high, int):
        fit(low + 1, kind, f"{where}, which takes no {low + 1}: list its `choices`")
    return Span(low, high, span.scale)
