"""Every config in configs/ names what exists, and the settings of a section are its own."""

import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from kdmini import config
from kdmini.data.loader import Augment
from kdmini.optim import Recipe
from kdmini.sections import Sections, make_sets
from tests.house.source import ROOT

ALL = sorted((ROOT / "configs").rglob("*.yaml"))
CONFIGS = [path for path in ALL if path.parent.name != "sweep"]  # these are of a tool
OF_THE_STEP = {"weight", "schedule"}  # settings of a term that are not its constructor's


def builds(node: object, where: str = "") -> Iterator[tuple[str, dict]]:
    """Every section with `build:`, and where it stands."""
    if isinstance(node, dict):
        if "build" in node:
            yield where, node
        for key, value in node.items():
            yield from builds(value, f"{where}.{key}".lstrip("."))
    elif isinstance(node, list):
        for item in node:
            yield from builds(item, where)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_parses_and_names_what_exists(path: Path) -> None:
    settings = config.load(path)
    assert settings == config.load(path, ["run=" + settings["run"]])
    sections = dict(builds(settings))
    assert {"student", "metric", "data.train", "data.val"} <= sections.keys()
    for where, section in sections.items():
        known = inspect.signature(config.locate(section["build"], where)).parameters
        others = OF_THE_STEP if where.startswith("distill.") else set()
        assert section.keys() - {"build"} - others <= known.keys(), where


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_settings_of_every_config_fit(path: Path) -> None:
    settings = config.load(path)
    config.call(Sections, settings, str(path))
    config.call(Recipe, settings["train"], f"{path}: train")
    config.call(Augment, settings["data"].get("augment", {}), f"{path}: data.augment")
    assert settings["data"].keys() <= inspect.signature(make_sets).parameters.keys()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_begins_with_what_it_is_and_the_command_that_runs_it(path: Path) -> None:
    head = path.read_text().split("\nrun:")[0]
    assert head.startswith("#")
    assert "python train.py --config" in head


def test_there_are_configs_and_plain_yaml_reads_them() -> None:
    assert len(CONFIGS) > 5
    for path in CONFIGS:
        assert isinstance(yaml.safe_load(path.read_text()), dict)
