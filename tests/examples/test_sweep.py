"""A sweep on the small shapes: trials are runs, the study is kept, and what falls behind is ended."""

from pathlib import Path

import pytest

optuna = pytest.importorskip("optuna", reason="needs optuna: pip install 'kdmini[sweep]'")

from examples import sweep  # noqa: E402 - after the check for its package
from kdmini.runlog import RunFolder  # noqa: E402
from tests.test_train import newest  # noqa: E402


def test_trials_are_runs_with_the_settings_that_were_drawn(
    config_file: Path, tmp_path: Path, capsys
) -> None:
    ranges = ["train.lr0=1e-3..1e-1", "distill.attention.weight=0.1..10"]
    call = [str(config_file), *ranges, "--trials", "2", "--out", str(tmp_path / "sweep")]
    sweep.main(call)
    sweep.main([*call[:-4], "--trials", "1", "--out", str(tmp_path / "sweep")])  # goes on
    study = optuna.load_study(
        study_name="sweep", storage=f"sqlite:///{tmp_path / 'sweep/study.db'}"
    )
    assert (
        len(study.trials) == 3 and len({trial.params["train.lr0"] for trial in study.trials}) == 3
    )
    for trial in study.trials:
        assert (
            1e-3 <= trial.params["train.lr0"] <= 1e-1
            and 0.1 <= trial.params["distill.attention.weight"] <= 10
        )
        folder = tmp_path / f"sweep/trial_{trial.number:03d}"
        settings = newest(folder)["config"]
        assert settings["train"]["lr0"] == trial.params["train.lr0"]
        assert (
            settings["distill"]["attention"]["weight"] == trial.params["distill.attention.weight"]
        )
        scores = [
            record["AP50-95"]
            for record in RunFolder(folder, lead=False).records()
            if "AP50-95" in record
        ]
        seen = list(trial.intermediate_values.values())
        assert seen[: len(scores)] == scores and len(seen) >= 1
    assert f"best: {tmp_path}/sweep/trial_" in capsys.readouterr().out


def test_a_trial_that_falls_behind_is_ended(config_file: Path, tmp_path: Path, monkeypatch) -> None:
    class Behind(optuna.pruners.BasePruner):
        def prune(self, study, trial) -> bool:
            return trial.number == 1 and len(trial.intermediate_values) == 2

    create = optuna.create_study
    monkeypatch.setattr(
        optuna, "create_study", lambda *args, **kwargs: create(*args, pruner=Behind(), **kwargs)
    )
    study = sweep.sweep(str(config_file), {"train.lr0": (1e-3, 1e-2)}, 2, tmp_path / "sweep")
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "PRUNED"]
    assert [len(trial.intermediate_values) for trial in study.trials] == [4, 2]  # of four epochs
    assert study.best_trial.number == 0


@pytest.mark.parametrize(
    "text, told",
    [
        ("train.lr0=1e-3", "train.lr0=1e-3: write a range as key.path=low..high"),
        ("train.lr0=0..1", "train.lr0=0..1: write a range"),
        ("train.lr0=2..1", "train.lr0=2..1: write a range"),
        ("train.lr9=1e-3..1", "lr9: unknown key"),
        ("trian.lr0=1e-3..1", "there is no `trian`"),
    ],
)
def test_mistakes_are_one_line(config_file: Path, tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(SystemExit) as left:
        sweep.main([str(config_file), text, "--trials", "1", "--out", str(tmp_path / "sweep")])
    assert str(left.value).startswith("error: ") and told in str(left.value)
