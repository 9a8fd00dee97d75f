"""What is compiled equals its eager twin, in a run and alone, and is compiled once."""

import csv
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

import train as train_script
from kdmini.data.loader import Augment, TrainLoader
from kdmini.data.render import Axis, compiled_gather
from kdmini.data.store import Store
from kdmini.detection.voc import VOC
from tests.test_train import newest, run

pytestmark = pytest.mark.long


def losses(folder: Path) -> list[dict[str, float]]:
    with (folder / "results.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["epoch"] != "-1"]
    return [
        {name: float(row[name]) for name in ("box", "cls", "dfl", "attention") if row[name]}
        for row in rows
    ]


def test_a_compiled_run_equals_an_eager_one(config_file: Path, tmp_path: Path) -> None:
    torch._dynamo.reset()
    counters.clear()
    run(train_script, "--config", config_file, f"run={tmp_path / 'compiled'}", "compile=true")
    assert not counters["graph_break"]
    compiled_frames = counters["frames"]["ok"]
    run(train_script, "--config", config_file, f"run={tmp_path / 'eager'}", "compile=false")
    assert (
        counters["frames"]["ok"] == compiled_frames
    )  # the counter counts what was compiled, and eager is eager
    # student, teacher, terms and rendering, with and without gradients and mosaic: not once more
    # for every step
    assert compiled_frames <= 8, compiled_frames
    ours, theirs = losses(tmp_path / "compiled"), losses(tmp_path / "eager")
    assert len(ours) == len(theirs) == 4 and [set(row) for row in ours] == [
        set(row) for row in theirs
    ]
    for name, value in theirs[0].items():  # rounding grows from step to step
        assert ours[0][name] == pytest.approx(value, rel=1e-3), name
    one, other = newest(tmp_path / "compiled"), newest(tmp_path / "eager")
    assert one["student"].keys() == other["student"].keys()
    assert one["distillation"].keys() == other["distillation"].keys()
    run(train_script, "--resume", tmp_path / "compiled")  # finished: says so


@pytest.mark.parametrize("mosaic", [0.0, 1.0])
def test_compiled_rendering_equals_eager(shapes: Path, mosaic: float) -> None:
    names = ["circle", "square", "triangle", "star", "ring", "cross"]
    stores = [
        Store(VOC(shapes, ["train"], names), 64, compiled=compiled) for compiled in (True, False)
    ]
    for colour in (0.0, 0.7):
        augment = Augment(
            mosaic=mosaic, hsv_h=colour / 50, hsv_s=colour, hsv_v=colour, close_mosaic=0
        )
        epochs = (TrainLoader(store, 8, 1, augment).epoch(0) for store in stores)
        for compiled, eager in zip(*epochs, strict=True):
            assert (compiled[0] - eager[0]).abs().max() < 1e-5
            assert torch.equal(compiled[1]["boxes_xyxy"], eager[1]["boxes_xyxy"])


def test_compiled_gathering_takes_offsets_beyond_two_to_the_31() -> None:
    start = 2**31 + 5
    pixels = torch.empty(
        start + 8, dtype=torch.int32
    )  # 8 GiB, of which no more than one page is ever touched
    pixels[start:] = torch.arange(8, dtype=torch.int32)
    here, nowhere, everywhere = (torch.full((1, 2, 8), value) for value in (0.0, False, True))
    columns = Axis(
        nowhere[:, 0],
        torch.arange(8).expand(1, 2, 8),
        torch.arange(8).expand(1, 2, 8),
        here,
        everywhere,
    )
    rows = Axis(nowhere[:, 0], *(torch.full((1, 2, 8), start) for _ in range(2)), here, everywhere)
    images = torch.full((1, 3, 8, 8), torch.nan)
    compiled_gather()(images.unbind(1), pixels, columns, rows, None)
    assert torch.equal(images[0, 0] * 255, torch.arange(8.0).expand(8, 8))
