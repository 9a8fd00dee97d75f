"""A run that is resumed when what it reads is not what it read: what has changed is named; and
what may change.
"""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

import train as train_script
from kdmini import checkpoint
from tests.commands import newest, records, run
from tests.conftest import CONFIG, TINY
from tests.faults.own import Own
from tests.faults.record import survived

TERM = """
from kdmini.distill.attention import AttentionTransfer

class Mine(AttentionTransfer):
    pass
"""
FAULT = "Saving: resumed on other images, boxes, classes, teacher or code"


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory, shapes: Path, teacher_file: Path) -> Path:
    """A folder with data of its own, a teacher's file, a term, and a run of one epoch of two."""
    folder = tmp_path_factory.mktemp("begun")
    shutil.copytree(shapes, folder / "data")
    shutil.copy(teacher_file, folder / "teacher.pt")
    (folder / "own_term.py").write_text(TERM)
    text = CONFIG.format(run=folder / "run", shapes=folder / "data", tiny=TINY)
    (folder / "config.yaml").write_text(text)
    changes = ["train.epochs=2", f"teacher.weights={folder / 'teacher.pt'}"]
    term = "distill.attention.build=own_term:Mine"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        run(train_script, "--config", folder / "config.yaml", *changes, term)
        last = sorted((folder / "run" / "ckpt").iterdir())[-1]
        last.unlink()
        yield folder


@pytest.fixture
def folder(begun: Path, tmp_path: Path) -> Path:
    """The folder, whose files a test may change: they are put back."""
    shutil.copytree(begun, tmp_path / "kept")
    yield begun
    shutil.rmtree(begun)
    shutil.copytree(tmp_path / "kept", begun)


def first(folder: Path, split: str = "train") -> str:
    return Own(folder / "data").names(split)[0]


def one_column_less(folder: Path) -> str:
    path = Own(folder / "data").image(first(folder))
    image = Image.open(path)
    width, height = image.size
    image.crop((0, 0, width - 1, height)).save(path)
    return f"was size {width}x{height}, pixels"


def another_photograph(folder: Path) -> str:
    path = Own(folder / "data").image(first(folder))
    size = Image.open(path).size
    Image.new("RGB", size, "red").save(path)
    return f"image '{first(folder)}' was pixels"


def another_box(folder: Path) -> str:
    path = Own(folder / "data").xml(first(folder, "val"))
    text = path.read_text()
    box = text.index("<xmin>") + 6
    path.write_text(f"{text[:box]}1{text[text.index('<', box) :]}")
    return f"data.val, image '{first(folder, 'val')}' was truth"


def an_image_less(folder: Path) -> str:
    own = Own(folder / "data")
    names = own.names()
    own.split(*names[1:])
    return f"data.train, image '{names[0]}' was there, is not there"


def another_order(folder: Path) -> str:
    own = Own(folder / "data")
    names = own.names()
    own.split(*reversed(names))
    return f"image '{names[0]}' was at another place in the order"


def another_teacher(folder: Path) -> str:
    path = folder / "teacher.pt"
    content = torch.load(path, weights_only=True)
    content["model"]["model.0.conv.weight"][0, 0, 0, 0] += 1
    checkpoint.save_atomic(content, path)
    return "teacher, weights was"


def other_code(folder: Path) -> str:
    path = folder / "own_term.py"
    path.write_text(f"{TERM}    scale = 2\n")
    return "code of own_term was"


CHANGES = [
    *(one_column_less, another_photograph, another_box, an_image_less, another_order),
    *(another_teacher, other_code),
]


def refused(folder: Path, *overrides: str) -> str:
    with pytest.raises(SystemExit) as left:
        run(train_script, "--resume", folder / "run", *overrides)
    return str(left.value.code)


@pytest.mark.parametrize("change", CHANGES)
def test_what_has_changed_is_named(change: Callable[[Path], str], folder: Path, capsys) -> None:
    words = change(folder)
    before = sorted((folder / "run").rglob("*"))
    told = refused(folder)
    assert words in told
    assert "go on all the same with allow_changed=true" in told
    assert sorted((folder / "run").rglob("*")) == before
    survived(FAULT, of="changes unnoticed")


def test_it_goes_on_where_that_is_allowed(folder: Path, capsys) -> None:
    words = another_box(folder)
    run(train_script, "--resume", folder / "run", "allow_changed=true")
    assert re.search(f"warning: .*{words}.*; not what the run would", capsys.readouterr().out)
    assert len(records(folder / "run")) == 3
    run(train_script, "--resume", folder / "run")  # what it now reads has been noted


def test_class_names_that_the_data_set_itself_states(folder: Path) -> None:
    """Where the config does not give them, as with other layouts."""
    saved = newest(folder / "run")
    saved["inputs"]["data.train, class 3"] = "comet"
    step = sorted((folder / "run" / "ckpt").iterdir())[-1]
    checkpoint.save_atomic(saved, step)
    assert "data.train, class 3 was comet, is star" in refused(folder)


# --- which run is meant, and what may change


def test_a_file_of_a_run_means_the_run(folder: Path, capsys) -> None:
    named = folder / "run"
    step = sorted((named / "ckpt").iterdir())[-1]
    for path in (named / "best.pt", step, named / "config.yaml", step.parent):
        with pytest.raises(SystemExit, match=r"train\.lr0 was 0\.01, is 0\.02"):
            run(train_script, "--resume", path, "train.lr0=0.02")
        assert f"{path}: its run is {named}" in capsys.readouterr().out


def test_fewer_epochs_are_refused_with_a_way_out(folder: Path) -> None:
    told = refused(folder, "train.epochs=1")
    best = folder / "run" / "best.pt"
    assert "train.epochs was 2, is 1: set it back, or begin another run" in told
    assert f"run={folder / 'run'}-2 student.weights={best}" in told


def test_what_only_measures_may_change(folder: Path, capsys) -> None:
    changes = ["metric.build=tests.test_check:Seen", "train.val_every=2", "train.patience=0"]
    run(train_script, "--resume", folder / "run", *changes)
    out = capsys.readouterr().out
    assert "warning: train.val_every was 1, is 2; what is learned stays the same" in out
    assert "warning: metric.build was" in out
    assert "the best score is sought anew" in out
    assert "finished: best epoch 2, 8.0000" in out
    assert records(folder / "run")[-1]["score/seen"] == 8


def test_the_config_of_a_run_states_every_default(begun: Path) -> None:
    text = (begun / "run" / "config.yaml").read_text()
    for line in ("lr0: 0.01", "close_mosaic: 10", "deterministic: false", "kd_scale: 1.0"):
        assert line in text
