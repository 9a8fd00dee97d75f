"""What is compiled equals its eager twin, in a run and alone, and is compiled once."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

import train as train_script
from kdmini.data.layout import letterbox
from kdmini.data.loader import Augment, TrainLoader
from kdmini.data.render import Axis, compiled_gather, render
from kdmini.data.store import Store
from kdmini.data.tiles import pack_tiles
from kdmini.detection.voc import VOC
from tests.commands import newest, run
from tests.conftest import ROOT
from tests.data.arrays import keep, noise

pytestmark = pytest.mark.long

NAMES = ["circle", "square", "triangle", "star", "ring", "cross"]
LOSSES = ("loss/box", "loss/cls", "loss/dfl", "loss/attention")


def losses(folder: Path) -> list[dict[str, float]]:
    """Those of each epoch of training, by name."""
    epochs = []
    with (folder / "results.csv").open() as file:
        for row in csv.DictReader(file):
            if row["epoch"] != "-1":
                epochs.append({name: float(row[name]) for name in LOSSES if row[name]})
    return epochs


def test_a_compiled_run_equals_an_eager_one(config_file: Path, tmp_path: Path) -> None:
    torch._dynamo.reset()
    counters.clear()
    run(train_script, "--config", config_file, f"run={tmp_path / 'compiled'}", "compile=true")
    assert not counters["graph_break"]
    compiled_frames = counters["frames"]["ok"]
    run(train_script, "--config", config_file, f"run={tmp_path / 'eager'}", "compile=false")
    # the counter counts what was compiled, and eager is eager
    assert counters["frames"]["ok"] == compiled_frames
    # student, loss, teacher, terms and rendering, with and without gradients and mosaic: not once
    # more for every step
    assert compiled_frames <= 8, compiled_frames

    ours = losses(tmp_path / "compiled")
    theirs = losses(tmp_path / "eager")
    assert len(ours) == len(theirs) == 4
    assert [row.keys() for row in ours] == [row.keys() for row in theirs]
    for name, value in theirs[0].items():  # rounding grows from step to step
        assert ours[0][name] == pytest.approx(value, rel=1e-3), name
    compiled = newest(tmp_path / "compiled")
    eager = newest(tmp_path / "eager")
    for part in ("student", "distillation"):
        assert compiled[part].keys() == eager[part].keys()
    run(train_script, "--resume", tmp_path / "compiled")  # finished: says so


@pytest.mark.parametrize("mosaic", [0.0, 1.0])
@pytest.mark.parametrize("colour", [0.0, 0.7])
def test_compiled_rendering_equals_eager(shapes: Path, mosaic: float, colour: float) -> None:
    augment = Augment(mosaic=mosaic, hsv_h=colour / 50, hsv_s=colour, hsv_v=colour, close_mosaic=0)
    epochs = []
    for compiled in (True, False):
        store = Store(VOC(shapes, ["train"], NAMES), 64, compiled=compiled)
        epochs.append(TrainLoader(store, 8, 1, augment).epoch(0))
    batches = 0
    for (ours, our_targets), (theirs, their_targets) in zip(*epochs, strict=True):
        assert (ours - theirs).abs().max() < 1e-5
        assert torch.equal(our_targets["boxes_xyxy"], their_targets["boxes_xyxy"])
        batches += 1
    assert batches == 3


def test_tiles_packed_for_a_card_are_compiled_once_whatever_their_length() -> None:
    store = keep(noise([(64, 40 + n) for n in range(12)]), 64)
    store.compiled = True
    layouts = [letterbox(store, np.arange(n, n + 4), 64) for n in range(8)]
    torch._dynamo.reset()
    counters.clear()
    packed = [render(store, layout, 64, pack_tiles(store, layout)) for layout in layouts]
    assert counters["stats"]["unique_graphs"] == 1
    for layout, images in zip(layouts, packed, strict=True):
        assert torch.equal(render(store, layout, 64), images)


def test_compiled_gathering_takes_offsets_beyond_two_to_the_31() -> None:
    start = 2**31 + 5
    # 8 GiB, of which no more than one page is ever touched
    pixels = torch.empty(start + 8, dtype=torch.int32)
    pixels[start:] = torch.arange(8, dtype=torch.int32)
    here = torch.full((1, 2, 8), 0.0)
    nowhere = torch.full((1, 2, 8), False)
    everywhere = torch.full((1, 2, 8), True)
    first_row = torch.full((1, 2, 8), start)
    first_columns = torch.arange(8).expand(1, 2, 8)
    columns = Axis(nowhere[:, 0], first_columns, first_columns, here, everywhere)
    rows = Axis(nowhere[:, 0], first_row, first_row, here, everywhere)
    images = torch.full((1, 3, 8, 8), torch.nan)
    compiled_gather()(images.unbind(1), pixels, columns, rows, None)
    assert torch.equal(images[0, 0] * 255, torch.arange(8.0).expand(8, 8))


def test_without_a_compiler_a_run_that_wants_one_ends_in_a_line_before_it_decodes(
    config_file: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "never compiled anything"
    broken = {"CXX": "/nonexistent", "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    command = [sys.executable, "train.py", "--config", str(config_file), "compile=true"]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **broken}, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr and "decode" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: compile: torch.compile does not work on cpu here (")
    assert "/nonexistent" in last and last.endswith("or set compile=false")
