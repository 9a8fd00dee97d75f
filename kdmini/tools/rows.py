"""Run folders as rows of a table: which runs are one row, and what it is called."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from kdmini import checkpoint, config
from kdmini.contracts import UserError
from kdmini.runlog import RunFolder
from kdmini.typed import printable

MAX_NAME = 80  # characters; a longer name of a row does not fit a table
LARGEST = 1e300  # of a value; beyond are infinity and integers that are no float
UNSHARED = ("seed", "run", "log")  # keys in which the runs of one row may differ


def is_finite(value: Any) -> bool:
    """Whether it is a number to draw or to average."""
    return type(value) in (int, float) and abs(value) < LARGEST


class Run(NamedTuple):
    """One run folder, finished or not."""

    path: str
    settings: dict[Any, Any]  # config.yaml
    records: list[Any]  # the lines of metrics.jsonl

    @property
    def seed(self) -> str:
        return str(self.settings.get("seed", 0))

    @property
    def setup(self) -> dict[Any, Any]:
        """What the runs of one row have in common."""
        return {key: value for key, value in self.settings.items() if key not in UNSHARED}

    def names(self) -> list[str]:
        """Of the classes, as best.pt has them; none before it is there."""
        best = Path(self.path) / "best.pt"
        return list(checkpoint.load(best).get("names", [])) if best.exists() else []

    def keys_logged(self) -> list[str]:
        """In the order in which they came."""
        records = [record for record in self.records if isinstance(record, dict)]
        return list(dict.fromkeys(key for record in records for key in record))

    def series(self, key: str) -> dict[int, float]:
        """epoch, from 0 on and in order -> value, where it is a finite number."""
        logged: dict[int, Any] = {}
        for record in self.records:
            if isinstance(record, dict) and type(record.get("epoch")) is int:
                logged[record["epoch"]] = record.get(key)
        return {
            epoch: value
            for epoch, value in sorted(logged.items())
            if epoch >= 0 and is_finite(value)
        }


Row = list[Run]  # of one setup and several seeds


class Difference(NamedTuple):
    """A place at which not all configs are the same."""

    path: tuple  # of keys
    values: dict[int, Any]  # number of the config -> what is there, None for nothing


def read_run(path: str) -> Run:
    """Raises UserError for what is no run folder; an epoch need not be there yet."""
    folder = Path(path)
    if not (folder / "config.yaml").is_file():
        raise UserError(
            f"{path}: has no config.yaml, so it is not a run; "
            "name a folder that train.py has written"
        )
    try:
        records = RunFolder(path, lead=False).records()
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path}/metrics.jsonl: cannot be read ({error}); repair it or leave the run out"
        ) from error
    return Run(path, config.load(folder / "config.yaml"), records)


def group(runs: list[Run]) -> list[Row]:
    """The runs as rows, in the order of their first runs.

    Raises UserError for two runs with one setup and one seed.
    """
    rows: list[Row] = []
    for run in runs:
        row = next((row for row in rows if same_setup(row[0], run)), None)
        if row is None:
            rows.append([run])
            continue
        for twin in row:
            if twin.seed == run.seed:
                raise UserError(
                    f"{run.path}: same config and seed as {twin.path}; name one of the two"
                )
        row.append(run)
    return rows


def same_setup(one: Run, other: Run) -> bool:
    return not list(differences({0: one.setup, 1: other.setup}))


def differences(configs: dict[int, Any], path: tuple = ()) -> Iterator[Difference]:
    """Where configs, or sections at one path of them, are not all the same.

    A config that ends above a path has no value there.
    """
    first = next(iter(configs.values()))
    sections = {i: part for i, part in configs.items() if isinstance(part, Mapping)}
    all_sections = len(sections) == len(configs)
    if not all_sections and any(part != first for part in configs.values()):
        yield Difference(path, configs)

    keys = dict.fromkeys(key for section in sections.values() for key in section)
    for key in keys:
        below = {i: section.get(key) for i, section in sections.items()}
        yield from differences(below, (*path, key))


def names_of(rows: list[Row]) -> list[str]:
    """The settings of the rows, or their first folders if one text is too long."""
    names = settings_of(rows)
    if max(map(len, names)) <= MAX_NAME:
        return names
    return [row[0].path for row in rows]


def settings_of(rows: list[Row]) -> list[str]:
    """The settings in which each row differs from others; of an only row the folder."""
    distinct = list(differences({i: row[0].setup for i, row in enumerate(rows)}))
    paths = [difference.path for difference in distinct]
    parts: list[list[str]] = [[] for _ in rows]
    for difference in distinct:
        key = shortest(difference.path, paths)
        for i, value in difference.values.items():
            text = f"{key} unset" if value is None else f"{key}={in_words(value)}"
            parts[i].append(text)
    texts = [", ".join(part) for part in parts]
    return [text or Path(row[0].path).name for text, row in zip(texts, rows, strict=True)]


def shortest(path: tuple, paths: list[tuple]) -> str:
    """The shortest end of the path that is no other path's; else the whole of it."""
    for length in range(1, len(path)):
        end = path[-length:]
        if sum(other[-length:] == end for other in paths) == 1:
            return ".".join(map(str, end))
    return ".".join(map(str, path))


def in_words(value: Any) -> str:
    """A section by what it builds, or by the sections in it."""
    if isinstance(value, Mapping):
        inner = [str(key) for key, part in value.items() if isinstance(part, Mapping)]
        built = str(value.get("build", "")).rpartition(":")[2]
        return built or "+".join(inner) or "given"
    if isinstance(value, bool):
        return str(value).lower()
    return printable(" ".join(str(value).split()))
