"""The same seed gives the same bits, also where memory ran out on the way."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import train as train_script
from kdmini import checkpoint
from kdmini.detection.yolo11.model import YOLO11
from tests.conftest import CONFIG, TINY
from tests.faults.children import one_line, run, script
from tests.faults.record import survived
from tests.faults.spoiling import changed


class Reference:
    """Whole runs of two epochs, each made once."""

    def __init__(self, folder: Path, shapes: Path):
        self.folder = folder
        self.finished: dict[str, dict[str, Tensor]] = {}
        text = CONFIG.format(run=folder / "RUN", shapes=shapes, tiny=TINY)
        self.config = folder / "config.yaml"
        self.config.write_text(text.replace("epochs: 4", "epochs: 2"))

    def command(self, name: str, *overrides: str) -> Callable[[], object]:
        run_folder = f"run={self.folder / name}"
        return script(train_script, "--config", self.config, run_folder, *overrides)

    def made(self, name: str, seed: int) -> dict[str, Tensor]:
        """All that a run of this name leaves in its last checkpoint."""
        if name not in self.finished:
            command = self.command(name, f"seed={seed}", "device=auto")

            def work() -> None:
                torch.seed()  # a child begins like its parent
                command()

            done = run(work, self.folder / f"{name}.txt")
            assert done.code == 0, done.text
            if not torch.cuda.is_available():
                assert "no CUDA device, so this runs on the CPU" in done.text
            self.finished[name] = self.newest(name)
        return self.finished[name]

    def newest(self, name: str) -> dict[str, Tensor]:
        content = checkpoint.load(checkpoint.existing(self.folder / name / "ckpt")[-1])
        content["config"] = {}  # names the folder
        content["progress"]["seconds"] = 0
        return dict(leaves(content))


def leaves(content: object, where: str = "") -> Iterator[tuple[str, Tensor]]:
    """Everything in it, as tensors with the place of each."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield from leaves(value, f"{where}/{key}")
    elif isinstance(content, list | tuple):
        yield from leaves(dict(enumerate(content)), where)
    elif isinstance(content, Tensor):
        yield where, content
    elif isinstance(content, int | float):
        yield where, torch.tensor(content, dtype=torch.float64)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, shapes: Path) -> Reference:
    return Reference(tmp_path_factory.mktemp("reference"), shapes)


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(reference: Reference) -> None:
    one = reference.made("one", 3)
    two = reference.made("two", 3)
    other = reference.made("other", 4)
    assert one.keys() == two.keys() == other.keys()
    assert len(one) > 1000
    survived("Numbers: the same seed twice", len(changed(one, two)), of="tensors that differ")

    for name in one:
        is_weight = name.startswith("/student") and name.endswith(".conv.weight")
        if is_weight and "dfl" not in name:
            apart = (one[name] - other[name]).norm() / one[name].norm()
            assert apart > 1, name  # begun elsewhere, not only trained on other images


def test_memory_that_runs_out_is_one_line_and_the_run_goes_on_from_its_checkpoint(
    reference: Reference, tmp_path: Path
) -> None:
    whole = reference.made("one", 3)

    def work() -> None:
        loss = YOLO11.loss
        calls = 0

        def exhausting(self, preds, targets):
            nonlocal calls
            calls += 1
            if calls == 3 + 3:  # step 3 of the second epoch
                asked = "CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ..."
                raise torch.OutOfMemoryError(asked)
            return loss(self, preds, targets)

        YOLO11.loss = exhausting
        reference.command("full", "train.save_every=1")()

    done = run(work, tmp_path / "out")
    one_line(
        done,
        "out of memory",
        "train.batch=8",
        "data.imgsz=64",
        "lower one",
        "checkpoints written so far",
    )
    last = checkpoint.existing(reference.folder / "full" / "ckpt")[-1]
    assert checkpoint.load(last)["progress"]["epoch"] == 1

    done = run(script(train_script, "--resume", reference.folder / "full"), tmp_path / "out")
    assert done.code == 0, done.text
    assert f"resumed from {last}" in done.text
    lost = changed(whole, reference.newest("full"))
    survived("Numbers: a device that is not there, memory that runs out", len(lost), of="tensors")
