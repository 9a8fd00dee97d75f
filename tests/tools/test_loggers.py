"""Loggers: what TensorBoard and W&B read of the records of a run, begun and resumed."""

import importlib
import sys
from pathlib import Path

import pytest

from kdmini import config
from kdmini.contracts import UserError
from kdmini.tools import loggers

BUILD = "kdmini.tools.loggers:"


def record(epoch: int, box: float = 0.5) -> dict[str, float]:
    return {"epoch": epoch, "loss/box": box + epoch, "skipped": 0}


def build(name: str, run: Path, **settings: object) -> object:
    return config.build({"build": BUILD + name, **settings}, "log", run=str(run))


def test_nothing_is_imported_or_written_before_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("wandb", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, package, None)
    importlib.reload(loggers)
    for name, package in (("WandB", "wandb"), ("TensorBoard", "tensorboard")):
        with pytest.raises(UserError, match=f"log: {package} is not installed; pip install"):
            build(name, tmp_path)
    assert not list(tmp_path.iterdir())


def test_tensorboard_shows_a_resumed_run_once(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    begun = build("TensorBoard", tmp_path / "run")
    assert not list(tmp_path.iterdir())
    for epoch in range(-1, 4):
        begun(record(epoch))
    resumed = build("TensorBoard", tmp_path / "run")
    for epoch in range(2, 5):  # two of them once more
        resumed(record(epoch, box=0.25))

    reader = EventAccumulator(str(tmp_path / "run" / "events"), size_guidance={"scalars": 0})
    reader.Reload()
    assert reader.Tags()["scalars"] == ["loss/box", "skipped"]
    points = [(event.step, event.value) for event in reader.Scalars("loss/box")]
    first = [(epoch + 1, 0.5 + epoch) for epoch in range(-1, 2)]
    assert points == first + [(epoch + 1, 0.25 + epoch) for epoch in range(2, 5)]


def test_wandb_offline_has_the_records_and_goes_on_under_one_name(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="Weights & Biases is not installed")
    (tmp_path / "config.yaml").write_text("seed: 1234567\n")
    names = []
    for epochs in (range(-1, 2), range(2, 3)):
        logger = build("WandB", tmp_path, project="marbles")
        for epoch in epochs:
            logger(record(epoch))
        names.append((logger.run.id, logger.run.name, logger.run.config["seed"]))
        logger.run.finish()
    assert names == [(names[0][0], tmp_path.name, 1234567)] * 2
    files = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2
    for content in (file.read_bytes() for file in files):
        assert b"marbles" in content
        assert b"loss/box" in content
