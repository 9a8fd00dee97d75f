"""docs/step.md: its program makes the step of the loop, and its picture has the shapes of the
program.
"""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from kdmini import config
from kdmini.assemble import make_run
from kdmini.engine import train_one_epoch
from kdmini.progress import Progress
from kdmini.sections import Sections
from kdmini.signals import Stop
from tests.docs.pages import blocks

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "step.md").read_text()


class FirstBatch:
    """The first batch of a loader's epochs alone."""

    def __init__(self, loader: Any):
        self.loader = loader

    def __len__(self) -> int:
        return 1

    def epoch(self, epoch: int, start: int = 0) -> Any:
        yield next(self.loader.epoch(epoch))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from examples.shapes import write_set

    root = tmp_path_factory.mktemp("data") / "shapes"
    write_set(root, train=32, val=4, size=128, seed=0)
    return root


@pytest.fixture(scope="module")
def program(data: Path) -> dict[str, Any]:
    """What the page's program leaves behind."""
    source = blocks(PAGE, "python")[0]
    assert source.count('"data/shapes"') == 1
    names: dict[str, Any] = {}
    source = source.replace("data/shapes", data.as_posix())
    exec(compile(source, "step.md", "exec"), names)  # noqa: S102 - the page's own program
    return names


def test_it_is_as_long_as_it_says(program: dict[str, Any]) -> None:
    source = blocks(PAGE, "python")[0]
    lines = [line for line in source.splitlines() if line.strip()]
    assert 80 <= len(lines) <= 130


def test_the_program_makes_the_step_of_the_loop(program: dict[str, Any], data: Path) -> None:
    settings = config.load(
        ROOT / "configs" / "demo.yaml",
        [
            f"data.root={data}",
            "device=cpu",
            "teacher.weights=null",
            "allow_void=true",
            "train.warmup_epochs=0",
        ],
    )
    sections = config.call(Sections, settings, "demo.yaml")
    recipe = sections.recipe()
    torch.manual_seed(0)
    run = make_run(sections, recipe, torch.device("cpu"), Progress())
    run.training.loader = FirstBatch(run.training.loader)
    train_one_epoch(run.training, Stop())

    for ours, page in ((run.training.student, "student"), (run.training.ema.average, "average")):
        theirs = program[page].state_dict()
        for name, value in ours.state_dict().items():
            if value.is_floating_point():
                torch.testing.assert_close(theirs[name], value, rtol=1e-5, atol=1e-6, msg=name)
    means = run.training.progress.means()
    for name, loss in program["task"].items():
        assert means[name] == pytest.approx(loss.item(), rel=1e-5)
    assert means["attention"] == pytest.approx(1.5 * program["attention"].item(), rel=1e-5)


def test_a_step_that_differs_would_be_seen(program: dict[str, Any]) -> None:
    """The weights that are compared have moved."""
    torch.manual_seed(0)
    before = program["YOLO11"](program["NAMES"], scale="n").state_dict()
    moved = [
        not torch.equal(value, before[name])
        for name, value in program["student"].state_dict().items()
        if value.is_floating_point() and "dfl" not in name
    ]
    assert sum(moved) > 0.9 * len(moved)


def test_the_picture_has_the_shapes_of_the_program(program: dict[str, Any]) -> None:
    picture = blocks(PAGE, "text")[0]
    shapes = [tuple(map(int, shape.split(","))) for shape in re.findall(r"\(([\d, ]+)\)", picture)]
    maps = {}
    for tap in program["TAPS"]:
        line = next(line for line in picture.splitlines() if f" {tap} " in line)
        maps[tap] = [
            tuple(map(int, shape.split(","))) for shape in re.findall(r"\(([\d, ]+)\)", line)
        ]
        assert maps[tap] == [
            tuple(program["student_feats"][tap].shape),
            tuple(program["teacher_feats"][tap].shape),
        ]
    for tensor in (program["images"], *program["preds"]):
        assert tuple(tensor.shape) in shapes
    assert tuple(program["targets"]["boxes_xyxy"].shape) in shapes
    assert tuple(program["targets"]["labels"].shape) in shapes
