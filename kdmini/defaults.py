"""The keys that every config may have: a config with the default of each that it leaves out."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kdmini import config
from kdmini.assemble import make_distillation
from kdmini.data.loader import Augment
from kdmini.data.share import Share
from kdmini.distill.step import Weighted
from kdmini.optim import Recipe
from kdmini.sections import Sections, make_sets

SECTIONS: dict[str, Callable] = {"data": make_sets, "train": Recipe, "distill": make_distillation}


def defaults(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those of all sections that the config has, in the same nesting."""
    found = defaults_of(Sections)
    for name in ("student", "teacher", "metric", "log"):
        add_build(found, name, settings, name)
    for name, target in SECTIONS.items():
        if isinstance(settings.get(name), Mapping):
            found[name] = defaults_of(target)
    data = settings["data"]
    found["data"]["augment"] = defaults_of(Augment)
    add_build(found["data"], "train", data, "data.train")
    if not add_build(found["data"], "val", data, "data.val"):
        found["data"]["val"] = defaults_of(Share)
    distill = settings.get("distill")
    if not isinstance(distill, Mapping):
        return found
    for name in distill:
        if add_build(found["distill"], name, distill, f"distill.{name}"):
            found["distill"][name] |= defaults_of(Weighted)
    return found


def add_build(found: dict[str, Any], name: str, settings: Mapping[str, Any], where: str) -> bool:
    """Whether the section is one with `build`; its defaults go into `found`."""
    section = settings.get(name)
    if not isinstance(section, Mapping) or "build" not in section:
        return False
    found[name] = defaults_of(config.locate(section["build"], f"{where}.build"))
    return True


def defaults_of(target: Callable) -> dict[str, Any]:
    """Key -> default, for those that YAML can hold.

    `names` is left out: where a config does not give it, the data set does.
    """
    known, _ = config.parameters_of(target, "defaults")
    found = {}
    for name, parameter in known.items():
        default = parameter.default
        if isinstance(default, tuple):
            default = [list(item) if isinstance(item, tuple) else item for item in default]
        if default is None or isinstance(default, bool | int | float | str | list):
            found[name] = default
    found.pop("names", None)
    return found


def filled(settings: Any, found: Mapping[str, Any]) -> Any:
    """The settings with what they lack of the defaults, section by section."""
    if not isinstance(settings, Mapping):
        return settings
    full = dict(settings)
    for key, default in found.items():
        if isinstance(default, Mapping):
            value = settings.get(key)
            if value is None and key == "augment":
                value = {}
            full[key] = filled(value, default)
        elif key not in settings:
            full[key] = default
    return full


# --- options that are none


def no_option(unknown: Sequence[str], arguments: Sequence[str]) -> str:
    """What to write in the place of an option that there is not: `--epochs 3` is train.epochs=3.

    arguments: of the command line.
    """
    first = unknown[0]
    name, equals, value = first.partition("=")
    if not equals:
        rest = arguments[list(arguments).index(first) + 1 :] if first in arguments else []
        value = rest[0] if rest and "=" not in rest[0] and not rest[0].startswith("-") else "VALUE"
    paths = paths_of_settings()
    wanted = name.lstrip("-").replace("-", "_")
    near = difflib.get_close_matches(wanted, paths, n=1)
    setting = f"{paths[near[0]]}={value}" if near else "key.path=value"
    return f"{name} is no option; a setting is written as {setting}"


def paths_of_settings() -> dict[str, str]:
    """Name of a setting that every config may have -> its path."""
    places: dict[str, Callable] = {
        "": Sections,
        "data.augment.": Augment,
        "data.": make_sets,
        "train.": Recipe,
    }
    paths = {}
    for place, target in places.items():
        known, _ = config.parameters_of(target, place)
        paths.update({name: f"{place}{name}" for name in known if name not in SECTIONS})
    return paths
