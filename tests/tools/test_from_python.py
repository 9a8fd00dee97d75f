"""kdmini.train and kdmini.evaluate, called from a folder of the user's."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

import kdmini
import train as train_script
from examples.shapes import SHAPE_NAMES
from kdmini import engine
from kdmini.config import load
from kdmini.contracts import UserError
from tests.commands import assert_equal, newest, records, run
from tests.conftest import ROOT

ALONE = {"teacher": None, "distill": None, "train.epochs": 1}
ALONE_AS_WORDS = ("teacher=null", "distill=null", "train.epochs=1")


@pytest.fixture
def here(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the config, which is that of the process; paths in it are relative."""
    monkeypatch.chdir(config_file.parent)
    (config_file.parent / "shapes").symlink_to(load(config_file)["data"]["root"])
    text = config_file.read_text()
    for key, path in (("run", "run"), ("root", "shapes")):
        before = next(line for line in text.splitlines() if line.strip().startswith(f"{key}:"))
        text = text.replace(before, f"{before.partition(':')[0]}: {path}")
    config_file.write_text(text)
    return config_file.parent


def test_a_run_is_that_of_the_command(here: Path) -> None:
    folder = kdmini.train("config.yaml", run=Path("ours"), **ALONE)
    assert folder == Path("ours")
    run(train_script, "--config", "config.yaml", "run=theirs", *ALONE_AS_WORDS)
    assert_equal(newest(here / "ours")["student"], newest(here / "theirs")["student"])

    scored = kdmini.evaluate(folder / "config.yaml", folder / "best.pt")
    assert scored.keys() == {"student"}
    logged = records(folder)[-1]
    for name, value in scored["student"].scores.items():
        assert logged[f"score/{name}"] == pytest.approx(value, abs=1e-6)
    assert SHAPE_NAMES[0] in scored["student"].metric.per_class()


def test_a_config_may_be_a_mapping_and_a_run_goes_on(here: Path) -> None:
    settings = load("config.yaml")
    before = str(settings)
    folder = kdmini.train(settings, **ALONE)
    assert str(settings) == before
    assert kdmini.train(folder, resume=True, **{"train.epochs": 2}) == folder
    assert [record["epoch"] for record in records(folder)] == [0, 1]


def test_ctrl_c_saves_and_comes_back_to_the_caller(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object) -> None:
        step(*arguments)
        signal.raise_signal(signal.SIGINT)

    step = engine.train_one_epoch
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may ignore it
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(engine, "train_one_epoch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        kdmini.train("config.yaml", **ALONE)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    signal.signal(signal.SIGINT, before)
    monkeypatch.undo()
    monkeypatch.chdir(here)
    kdmini.train("run", resume=True)  # no lock is left
    assert [record["epoch"] for record in records(here / "run")] == [0]


@pytest.mark.parametrize(
    "overrides, words",
    [
        ({"train.epoch": 3}, "unknown key; did you mean `epochs`"),
        ({"tarin.epochs": 3}, "there is no `tarin`"),
        ({"seed": "three"}, "seed"),
    ],
)
def test_a_mistake_is_an_error_to_catch(here: Path, overrides: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        kdmini.train("config.yaml", **overrides)
    assert not (here / "run").exists()


def test_the_package_stays_light_and_knows_what_it_offers() -> None:
    code = "import kdmini, sys; print('torch' in sys.modules, 'kdmini.tools' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False False\n"
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        kdmini.trian  # noqa: B018


@pytest.mark.parametrize("script", ["train", "eval"])
def test_the_package_holds_the_scripts(script: str) -> None:
    """As links, so that a wheel has them too, and there is one text of each."""
    link = ROOT / f"kdmini/tools/{script}.py"
    assert link.is_symlink()
    assert link.readlink() == Path(f"../../{script}.py")
