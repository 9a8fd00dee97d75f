"""Numbers at the ends of their ranges, at work: a step is made, and all that comes of it is a
number; where another number stands against them, one line says so.

The numbers are found, not listed: see every_number.py.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from kdmini import config
from kdmini.assemble import make_distillation
from kdmini.bounds import Seed
from kdmini.contracts import UserError
from kdmini.data.loader import Augment, TrainLoader, uniforms
from kdmini.distill.step import Weighted
from kdmini.optim import Recipe
from kdmini.sections import make_sets
from tests.conftest import ROOT, TINY, write_config
from tests.every_number import Key, every_key, high_end, low_end, numbers_in
from tests.faults.record import survived
from tests.faults.spoiling import NAMES, Bench, broken
from tests.terms.teaching import SMALL, build

KEYS = every_key()
EXAMPLES = [ROOT / "configs/voc.yaml", *sorted((ROOT / "configs/terms").glob("*.yaml"))]
CPU = torch.device("cpu")
PIXELS = "kdmini.terms.pixels:PixelRelation"  # no detector's config names it
FAULT = "Numbers: a setting at an end of its range"
SMALLEST = {"YOLO11": {"scale": [0.5, 0.0625, 1024]}, "ATSS": {"backbone": "resnet18"}}
NETWORKS = ("SegFormer", "FastSCNN", "VMamba")  # for segmentation
BOX: Any = {
    "boxes_xyxy": torch.tensor([[[8.0, 8.0, 40.0, 50.0]]] * 4),
    "labels": torch.ones(4, 1).long(),
    "normaliser": torch.tensor(1.0),
}


def ends(*names: str) -> list[Any]:
    """The keys of the targets of these names, with a value at either end."""
    cases = []
    for key in KEYS:
        if key.target.split(":")[1] in names:
            for number in (low_end(key.number), high_end(key.number)):
                cases.append(pytest.param(key, key.number.in_value(number), id=f"{key}={number}"))
    return cases


def target_of(key: Key) -> Any:
    return config.locate(key.target, key.target)


# --- training


@pytest.mark.parametrize("key, value", ends("Recipe"))
def test_a_recipe(key: Key, value: Any, shapes: Path) -> None:
    assert target_of(key) is Recipe
    settings = {"warmup_epochs": 2.0, "warmup_steps": 3, key.name: value}
    batch = settings.pop("batch", 4)
    if batch > 24 or key.name == "epochs":  # Bench has its own
        recipe = config.call(Recipe, {"epochs": 1, "batch": 4, key.name: value}, "train")
        assert recipe.at(0, 6).lr >= 0
        survived(FAULT)
        return
    bench = Bench(shapes, batch=batch, **settings)
    bench.update()
    bench.update()
    assert broken(bench.state()) == []
    survived(FAULT)


@pytest.mark.parametrize("key, value", ends("Augment"))
def test_augmentation(key: Key, value: Any, shapes: Path) -> None:
    assert target_of(key) is Augment
    augment = config.call(Augment, {key.name: value}, "data.augment")
    loader = TrainLoader(Bench(shapes).loader.store, 24, 20, augment)
    images, targets = next(loader.epoch(0))
    assert images.min() >= 0
    assert images.max() <= 1
    assert targets["boxes_xyxy"].isfinite().all()
    survived(FAULT)


@pytest.mark.parametrize("key, value", ends("make_sets"))
def test_data(key: Key, value: Any, shapes: Path, tmp_path: Path) -> None:
    settings = config.load(write_config(tmp_path, shapes))["data"]
    sets = config.call(make_sets, {**settings, key.name: value}, "data")
    store = sets.store("val", CPU)
    assert len(store) == (1 if (key.name, value) == ("limit", 1) else 8)
    survived(FAULT)


@pytest.mark.parametrize("seed", [n for s in numbers_in(Seed) for n in (low_end(s), high_end(s))])
def test_seeds(seed: int) -> None:
    torch.manual_seed(seed)
    drawn = uniforms(seed, 99_999, torch.arange(9).numpy(), 14)
    assert 0 <= drawn.min() < drawn.max() < 1
    survived(FAULT)


# --- models


@pytest.mark.parametrize("key, value", ends("YOLO11", "ATSS", *NETWORKS))
def test_a_model(key: Key, value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As large as can be, without its memory."""
    # autocast knows nothing of tensors without memory
    monkeypatch.setattr(torch, "autocast", lambda *args, **settings: nullcontext())
    model_type = target_of(key)
    settings = {**SMALLEST.get(model_type.__name__, {}), key.name: value}
    with torch.device("meta"):
        model = config.call(model_type, settings, "student", names=NAMES)
        preds = model(torch.zeros(2, 3, 64, 64))
    assert preds
    if key.name in getattr(model, "gains", {}):
        assert model.gains[key.name] == value
    survived(FAULT)


# --- distillation


def term_keys() -> Iterator[tuple[Path, str, str]]:
    """Config, name in it, target of every term."""
    for path in EXAMPLES:
        for name, section in config.load(path)["distill"].items():
            if isinstance(section, dict):
                yield path, name, section["build"]


TERMS = {target: (path, name) for path, name, target in term_keys()}


def test_every_term_has_a_config() -> None:
    terms = {key.target for key in KEYS if ".terms." in key.target or "attention" in key.target}
    assert len(terms) > 8
    assert terms - {PIXELS} <= TERMS.keys()


@pytest.mark.parametrize(
    "key, value", [case for target in TERMS for case in ends(target.split(":")[1])]
)
def test_a_term(key: Key, value: Any) -> None:
    if key.name == "shapes":  # are measured
        return
    path, name = TERMS[key.target]
    assert_teaches(path, f"distill.{name}.{key.name}", value)


@pytest.mark.parametrize("key, value", ends("PixelRelation"))
def test_a_term_of_masks(key: Key, value: Any) -> None:
    term = f"distill.pixels={{build: {PIXELS}, weight: 1}}"
    assert_teaches(ROOT / "configs/voc.yaml", f"distill.pixels.{key.name}", value, term)


@pytest.mark.parametrize("key, value", ends("Weighted", "make_distillation"))
def test_the_place_of_a_term(key: Key, value: Any) -> None:
    assert target_of(key) in (Weighted, make_distillation)
    if key.name == "imgsz":  # is that of data
        return
    term = "attention." if target_of(key) is Weighted else ""
    assert_teaches(ROOT / "configs/voc.yaml", f"distill.{term}{key.name}", value)


def assert_teaches(path: Path, key: str, value: Any, *before: str) -> None:
    text = config.dump({"value": value}).partition(": ")[2].strip()
    if isinstance(value, dict):
        text = "{model.16: " + str(value["model.6"]) + "}"
    usual = ["student.weights=null", f"student.scale={TINY}"]
    overrides = [*SMALL, *usual, *before, f"{key}={text}"]
    try:
        student, _, distillation, images = build(path, overrides, 64)
        losses = distillation(images, student(images), BOX, 0)
    except UserError as error:
        line = str(error)
        assert "out of range" not in line
        assert "\n" not in line
        survived(FAULT)
        return
    total = sum(losses.values(), torch.zeros((), requires_grad=True))
    total.backward()
    assert total.isfinite()
    assert broken({n: p.grad for n, p in student.named_parameters() if p.grad is not None}) == []
    survived(FAULT)
