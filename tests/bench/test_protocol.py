"""The rows of the evidence: each is a run that can be built, and no two are the same."""

import math
from pathlib import Path

import numpy as np
import pytest

from bench.protocol import TEACHER, Run, protocol_of, schedules
from kdmini import config
from kdmini.assemble import make_distillation
from kdmini.detection.voc import VOC_NAMES
from kdmini.detection.yolo11.model import YOLO11
from kdmini.distill.schedule import check_segments, piecewise_linear
from tests.conftest import ROOT

# of configs/voc.yaml: 150 epochs
NOTES_EPOCHS = 150
NOTES_SCHEDULE = [[0, 2.0, 40, 0.0], [40, 0.3, 100, 0.0], [100, 0.05, math.inf, 0.05]]

NARROW = [0.5, 0.125, 1024]  # scale of a small YOLO11


def mean_lambda(segments: list[list[float]], epochs: int) -> float:
    middles = [epoch + 0.5 for epoch in range(epochs)]
    return float(np.mean([piecewise_linear(segments, middle) for middle in middles]))


def test_the_other_schedules_have_the_mean_of_the_notes() -> None:
    notes = mean_lambda(NOTES_SCHEDULE, NOTES_EPOCHS)
    for name, segments in schedules(60).items():
        check_segments(segments)
        assert mean_lambda(segments, 60) == pytest.approx(notes, rel=0.01), name


def test_one_schedule_ends_with_the_mosaic() -> None:
    segments = schedules(60)["mosaic"]
    assert piecewise_linear(segments, 49) > 0
    assert piecewise_linear(segments, 50) == 0


def test_the_config_of_a_run() -> None:
    run = Run("cpu", "notes", [], seed=1)
    settings = run.settings(Path("runs"), root=Path("photographs"))
    assert settings["run"] == "runs/notes-1"
    assert settings["seed"] == 1
    assert settings["teacher"]["weights"] == "runs/teacher-0/best.pt"
    assert settings["data"]["root"] == "photographs"


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_the_teacher_comes_first_and_once(name: str) -> None:
    protocol = protocol_of(name)
    runs = list(protocol.runs())
    assert runs[0] == Run(name, TEACHER, protocol.teacher, seed=0)
    assert [run.row for run in runs].count(TEACHER) == 1
    assert [(run.row, run.seed) for run in runs[1:]] == [
        (row, seed) for row in protocol.rows for seed in protocol.seeds
    ]


def test_some_rows_and_seeds_of_a_protocol() -> None:
    runs = protocol_of("cpu").runs(rows=["notes", "alone"], seeds=[5, 6])
    assert [run.name for run in runs] == ["alone-5", "alone-6", "notes-5", "notes-6"]


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_every_row_is_a_run_that_can_be_built(name: str) -> None:
    student = YOLO11(VOC_NAMES, NARROW)
    teacher = YOLO11(VOC_NAMES, NARROW)
    protocol = protocol_of(name)
    for run in protocol.runs(list(protocol.rows), seeds=[1]):
        settings = run.settings(Path("runs"))
        assert settings["seed"] == 1
        assert settings["run"] == f"runs/{run.row}-1"
        config.call(
            make_distillation,
            settings["distill"] or {"taps": []},
            "distill",
            student=student,
            teacher=teacher if settings["teacher"] else None,
            imgsz=128,
        )


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_no_two_rows_are_the_same(name: str) -> None:
    protocol = protocol_of(name)
    runs = protocol.runs(list(protocol.rows), seeds=[1])
    settings = [{**run.settings(Path("runs")), "run": ""} for run in runs]
    assert all(settings.count(one) == 1 for one in settings)


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_the_row_of_the_notes_is_what_the_notes_say(name: str) -> None:
    assert protocol_of(name).rows["notes"] == []
    notes = config.load(ROOT / "configs/voc.yaml")["distill"]
    assert notes["attention"].pop("schedule") == NOTES_SCHEDULE

    settings = config.load(ROOT / f"bench/evidence/{name}.yaml")
    share = settings["train"]["epochs"] / NOTES_EPOCHS
    first = round(40 * share)
    second = round(100 * share)
    ours = settings["distill"]
    assert ours["attention"].pop("schedule") == [
        [0, 2.0, first, 0.0],
        [first, 0.3, second, 0.0],
        [second, 0.05, math.inf, 0.05],
    ]
    assert ours == notes
