"""Which share of the updates is clipped."""

from pathlib import Path

import pytest

from bench import clipped
from kdmini import config, engine
from tests.conftest import write_config


@pytest.mark.parametrize(("clip", "share"), [(1e-6, "100%"), (1e9, "0%")])
def test_the_share_of_a_row(
    tmp_path: Path, shapes: Path, capsys: pytest.CaptureFixture, clip: float, share: str
) -> None:
    path = tmp_path / "trial.yaml"
    protocol = {
        "title": "",
        "about": "",
        "config": str(write_config(tmp_path, shapes)),
        "score": "AP50",
        "seeds": [1],
        "overrides": ["teacher=null", "distill=null", f"train.clip={clip}"],
        "rows": {"alone": {}},
    }
    path.write_text(config.dump(protocol))
    own = engine.clip_gradients
    clipped.main([str(path), "alone", "--epochs", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["alone, epoch 1", "alone, epoch 2"]
    for line in lines:
        assert f", {share} clipped, norm " in line
        assert float(line.split()[-1]) > 0.1
    assert engine.clip_gradients is own
    assert not (tmp_path / "trial").exists()
