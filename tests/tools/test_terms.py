"""What terms show of themselves: where a self-teacher looks, as the newest checkpoint has it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from examples.shapes import SHAPE_NAMES
from kdmini import checkpoint
from kdmini.assemble import make_distillation
from kdmini.classification.wide_resnet import WideResNet
from kdmini.data.store import Store
from kdmini.detection.voc import VOC
from kdmini.distill.step import Distillation
from kdmini.segmentation.fast_scnn import FastSCNN

pytest.importorskip("matplotlib")
from kdmini.tools.maps import Networks
from kdmini.tools.scenes import feats_at, random_scenes, scenes_at, spread_scenes
from kdmini.tools.terms import of_terms

IMGSZ = 64
SELF_TEACHER = {"build": "kdmini.terms.self_teacher:SelfTeacher", "width": 4, "weight": 1}
OF_NETWORK = {FastSCNN: ["higher", "stages.0", "pooled"], WideResNet: ["group2", "group3"]}


@pytest.fixture(scope="module")
def store(shapes: Path) -> Store:
    """24 images."""
    return Store(VOC(str(shapes), ["train"], SHAPE_NAMES), IMGSZ)


def trained(network: Any, seed: int, width: int = 4) -> tuple[Any, Distillation, dict[str, Any]]:
    """A student with its self-teacher, whose BatchNorms have statistics of their own."""
    torch.manual_seed(seed)
    student = network(SHAPE_NAMES)
    section = {"taps": OF_NETWORK[network], "own": {**SELF_TEACHER, "width": width}}
    distillation = make_distillation(student, None, IMGSZ, **section)
    term: Any = distillation.terms["own"]
    with torch.no_grad():
        for _ in range(3):
            feats = feats_at(OF_NETWORK[network], student, torch.rand(4, 3, IMGSZ, IMGSZ))
            term.train().refine(feats)
    return student, distillation, section


def drawn(folder: Path, network: Any, store: Store, section: dict[str, Any]) -> dict[str, Any]:
    untrained = network(SHAPE_NAMES)
    networks = Networks(untrained, untrained, None)
    return dict(of_terms(folder, section, networks, spread_scenes(store, 2), store))


@torch.no_grad()
@pytest.mark.parametrize("network", OF_NETWORK)
def test_the_maps_are_those_of_the_checkpoint_on_images_at_random(
    network: Any, store: Store, tmp_path: Path
) -> None:
    student, distillation, section = trained(network, 1)
    parts: Any = {"student": student, "distillation": distillation}
    checkpoint.save(tmp_path / "ckpt", 1, parts, {})
    (figure,) = drawn(tmp_path, network, store, section).values()

    scenes = random_scenes(store, 12)
    columns = 1 + len(section["taps"])
    assert [axis.get_xlabel() for axis in figure.axes[: 12 * columns : columns]] == scenes.ids
    term: Any = distillation.terms["own"]
    feats = feats_at(section["taps"], student, scenes.images)
    both = zip(feats, term.eval().refine(feats), strict=True)
    for column, (ours, theirs) in enumerate(both, 1):
        axis = figure.axes[column]  # of the first image
        for layer, feat in zip(axis.images[1::2], (ours, theirs.relu()), strict=True):
            energy = feat[0].double().square().sum(0).numpy()
            expected = energy / np.sqrt((energy**2).sum())
            np.testing.assert_allclose(layer.get_array(), expected, atol=1e-5)


def test_without_a_checkpoint_that_fits_the_maps_are_left_out(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student, _, section = trained(WideResNet, 1)
    assert not drawn(tmp_path, WideResNet, store, section)
    assert "left out: own.png" in capsys.readouterr().out

    _, wider, _ = trained(WideResNet, 1, width=8)
    for parts in ({"student": student}, {"student": student, "distillation": wider}):
        checkpoint.save(tmp_path / "ckpt", 1, parts, {})
        assert not drawn(tmp_path, WideResNet, store, section)
        assert "is not of this run: " in capsys.readouterr().out


def test_images_are_spread_or_drawn_at_random(store: Store) -> None:
    ids = [target["id"] for target in store.targets]
    assert spread_scenes(store, 6).ids == ids[::4]
    assert spread_scenes(store, 99).ids == ids
    few = random_scenes(store, 12).ids
    assert few == random_scenes(store, 12).ids == sorted(few)
    assert few not in (ids[:12], ids[::2])
    assert len(set(few)) == 12
    last = scenes_at(store, np.array([23]))
    assert torch.equal(last.images[0], spread_scenes(store, 24).images[23])
