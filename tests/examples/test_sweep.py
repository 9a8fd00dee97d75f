"""A sweep on the small shapes: trials are runs, and one that falls behind is ended."""

import io
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest

optuna = pytest.importorskip("optuna", reason="needs optuna: pip install -e '.[sweep]'")

from examples import sweep  # noqa: E402 - after the check for its package
from kdmini import config  # noqa: E402
from kdmini.contracts import UserError  # noqa: E402
from kdmini.detection.average_precision import DetectionMetric  # noqa: E402
from kdmini.runlog import RunFolder  # noqa: E402
from tests.commands import newest  # noqa: E402
from tests.conftest import CONFIG, TINY  # noqa: E402


class Swept(NamedTuple):
    study: optuna.Study
    folder: Path
    metric: dict  # of the config
    printed: str


@pytest.fixture(scope="module")
def swept(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Swept:
    """A sweep of three trials, the last of which was asked for by itself."""
    folder = tmp_path_factory.mktemp("sweep")
    path = folder / "config.yaml"
    path.write_text(CONFIG.format(run=folder / "run", shapes=shapes, tiny=TINY))
    ranges = ["train.lr0=1e-3..1e-1", "distill.attention.weight=0.1..10"]
    command = [str(path), *ranges, "--out", str(folder)]
    with redirect_stdout(io.StringIO()) as printed:
        sweep.main([*command, "--trials", "2"])
        sweep.main([*command, "--trials", "1"])
    study = optuna.load_study(study_name="sweep", storage=f"sqlite:///{folder / 'study.db'}")
    return Swept(study, folder, config.load(path)["metric"], printed.getvalue())


def test_trials_are_runs_with_the_settings_that_were_drawn(swept: Swept) -> None:
    trials = swept.study.trials
    assert len(trials) == 3
    assert len({trial.params["train.lr0"] for trial in trials}) == 3
    for trial in trials:
        lr0 = trial.params["train.lr0"]
        weight = trial.params["distill.attention.weight"]
        assert 1e-3 <= lr0 <= 1e-1
        assert 0.1 <= weight <= 10
        settings = newest(swept.folder / f"trial_{trial.number:03d}")["config"]
        assert settings["train"]["lr0"] == lr0
        assert settings["distill"]["attention"]["weight"] == weight


def test_a_trial_can_be_compared_like_any_run(swept: Swept) -> None:
    settings = config.load(swept.folder / "trial_000/config.yaml")
    assert settings["metric"] == swept.metric


def test_the_study_knows_every_score_of_a_trial(swept: Swept) -> None:
    for trial in swept.study.trials:
        folder = swept.folder / f"trial_{trial.number:03d}"
        records = RunFolder(folder, lead=False).records()
        scores = [record["score/AP50-95"] for record in records if "score/AP50-95" in record]
        reported = list(trial.intermediate_values.values())
        assert len(reported) >= 1
        assert reported[: len(scores)] == scores  # the one that ends a trial is not logged


def test_the_best_trial_is_named(swept: Swept) -> None:
    best = swept.study.best_trial
    line = f"best: {swept.folder}/trial_{best.number:03d}, {best.value:.4f} with"
    assert line in swept.printed


def test_the_metric_is_afterwards_what_it_was(config_file: Path, tmp_path: Path) -> None:
    before = DetectionMetric.compute
    unknown = sweep.Range("train.lr9", 1e-3, 1e-2)
    with pytest.raises(UserError, match="lr9: unknown key"):
        sweep.sweep(str(config_file), [unknown], 1, tmp_path / "sweep")
    assert DetectionMetric.compute is before


def test_a_trial_that_falls_behind_is_ended(config_file: Path, tmp_path: Path, monkeypatch) -> None:
    class Behind(optuna.pruners.BasePruner):
        def prune(self, study, trial) -> bool:
            return trial.number == 1 and len(trial.intermediate_values) == 2

    create_study = partial(optuna.create_study, pruner=Behind())
    monkeypatch.setattr(optuna, "create_study", create_study)
    ranges = [sweep.Range("train.lr0", 1e-3, 1e-2)]
    study = sweep.sweep(str(config_file), ranges, 2, tmp_path / "sweep")
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "PRUNED"]
    evaluations = [len(trial.intermediate_values) for trial in study.trials]
    assert evaluations == [4, 2]  # of four epochs
    assert study.best_trial.number == 0


@pytest.mark.parametrize(
    "text, message",
    [
        ("train.lr0=1e-3", "train.lr0=1e-3: write a range as key.path=low..high"),
        ("train.lr0=0..1", "train.lr0=0..1: write a range"),
        ("train.lr0=2..1", "train.lr0=2..1: write a range"),
        ("train.lr9=1e-3..1", "lr9: unknown key"),
        ("trian.lr0=1e-3..1", "there is no `trian`"),
    ],
)
def test_mistakes_are_one_line(config_file: Path, tmp_path: Path, text: str, message: str) -> None:
    command = [str(config_file), text, "--trials", "1", "--out", str(tmp_path / "sweep")]
    with pytest.raises(SystemExit) as left:
        sweep.main(command)
    line = str(left.value)
    assert line.startswith("error: ")
    assert message in line
