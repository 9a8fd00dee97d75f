"""Where both sets of a run stay is decided once, before an image of them is decoded."""

from contextlib import nullcontext

import pytest
import torch

from kdmini import assemble, config
from kdmini.assemble import make_networks, make_run, storage_settings
from kdmini.data import storage
from kdmini.data import store as store_module
from kdmini.device import precision
from kdmini.footprint import step_bytes
from kdmini.progress import Progress
from kdmini.sections import Sections

CPU = torch.device("cpu")
CARD = torch.device("cuda", 0)


@pytest.fixture
def sections(config_file):
    return config.call(Sections, config.load(config_file), "config")


@pytest.fixture
def decided(monkeypatch, tmp_path):
    """In order: what `auto` became, and the sets that were then decoded."""
    events = []
    decode_all = store_module.decode_all

    def choose(*settings):
        events.append(storage.choose(*settings))
        return events[-1]

    def noted(*settings):
        events.append(settings[-1])
        return decode_all(*settings)

    monkeypatch.setenv("KDMINI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(assemble, "choose", choose)
    monkeypatch.setattr(store_module, "choose", lambda *settings: pytest.fail("decided again"))
    monkeypatch.setattr(store_module, "decode_all", noted)
    return events


def run_of(sections):
    return make_run(sections, sections.recipe(), CPU, Progress())


@pytest.mark.parametrize("spare, expected", [(1, "resident"), (-1, "mapped")])
def test_both_sets_count_together(sections, decided, monkeypatch, tmp_path, spare, expected):
    total = sections.sets().expected_bytes()
    monkeypatch.setattr(storage, "free_bytes", lambda device: 2 * (total + spare))
    run = run_of(sections)
    assert decided == [expected, "train", "val"]
    assert (tmp_path / "cache").exists() == (expected == "mapped")
    pixels = [run.training.loader.store.pixels, run.val_loader.store.pixels]
    assert total == pytest.approx(sum(each.nbytes for each in pixels), rel=0.1)


def test_what_the_config_says_is_not_decided(sections, decided):
    sections.data["storage"] = "mapped"
    run_of(sections)
    assert decided == ["train", "val"]


def test_the_limit_counts(sections, monkeypatch):
    asked = []
    monkeypatch.setattr(assemble, "choose", lambda expected, *rest: asked.append(expected))
    sets = sections.sets()
    networks = networks_of(sections, sets)
    for limit in (None, 4):
        storage_settings(sets, sections.recipe(), networks, CPU, nullcontext, limit)
    whole, part = asked
    assert part == pytest.approx(whole * 8 / 32, rel=0.2)


def networks_of(sections, sets):
    recipe = sections.recipe()
    autocast, _ = precision(recipe.amp, CPU)
    names = sets.train.names
    return make_networks(sections, recipe, names, sets.imgsz, CPU, autocast, compiled=False)


@pytest.mark.parametrize("spare, expected", [(1000, "resident"), (-1000, "mapped")])
@pytest.mark.parametrize("world", [1, 2])
def test_on_a_card_both_sets_lie_beside_a_step(
    sections, monkeypatch, spare, expected, world
) -> None:
    """Of the images of one rank."""
    monkeypatch.setattr("kdmini.distributed.world", lambda: world)
    sections.train["amp"] = False
    sets = sections.sets()
    networks = networks_of(sections, sets)
    step = step_bytes(
        networks.student, 64, lambda: torch.autocast("cpu", enabled=False), 8 // world
    )
    needed = (sets.expected_bytes() + step) / 0.9
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(needed) + spare, 10**12))
    settings = storage_settings(sets, sections.recipe(), networks, CARD, nullcontext, None)
    assert settings == {"storage": expected}
    # nothing of the pass that was counted is left behind
    assert networks.distillation.student_taps._feats == {}
